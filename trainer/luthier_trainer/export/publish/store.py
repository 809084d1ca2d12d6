"""Copies in object stores.

The prefix must be empty, or hold what an earlier attempt of the same export left. A claim is written first and only
where there is none, so that two exports never mix; the manifest is written last, when every object was verified; then
the claim goes. Objects appear whole or not at all: large ones are multipart uploads, which are aborted when they fail.

An object is verified by its size and its ETag where that is the MD5 of the bytes, or of its parts, as with S3. Any
other ETag (Google Cloud Storage, Azure, S3 with keys of KMS) tells nothing, so the object is read back and its SHA-256
taken. Stores that know S3's checksums also check the SHA-256 of each part as it comes.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from luthier.v1.model_pb2 import ModelFile
from luthier_trainer.data.fetching import objects
from luthier_trainer.durable import MANIFEST
from luthier_trainer.errors import TrainingError
from luthier_trainer.export.publish import credentials
from luthier_trainer.export.publish.contents import Contents, Meter, export_of
from luthier_trainer.export.publish.place import Prefix
from luthier_trainer.stop import Check, StopRequested

if TYPE_CHECKING:
    from luthier_trainer.data.fetching.objects import Store

CLAIM = ".luthier-publishing.json"
PART_BYTES = 8 << 20
PARTS_IN_FLIGHT = 4
_MOST_PARTS = 9_000  # S3 takes 10,000
_MD5 = re.compile(r'"?([0-9a-f]{32}(?:-[0-9]+)?)"?', re.ASCII)


def publish(place: Prefix, contents: Contents, secret: str, secret_name: str, meter: Meter, check: Check) -> str:
    """Copies the export; returns its URI. Raises TrainingError DESTINATION_FAILED, and StopRequested."""
    from obstore.exceptions import BaseError

    settings = credentials.variables(place.scheme, secret, secret_name)
    try:
        _Copy(_opened(place, settings), place, contents, meter, check).perform()
    except (TrainingError, StopRequested):
        raise
    except (BaseError, OSError, ValueError, TypeError) as error:
        # Neither the text nor the cause is kept: they may hold addresses, signed requests and keys.
        raise _failed(error, place, secret_name) from None
    return str(place)


def _opened(place: Prefix, settings: Mapping[str, str]) -> "Store":
    if place.scheme == "s3":
        # Not every store of S3's kind can delete several objects at once.
        settings = {"AWS_CHECKSUM_ALGORITHM": "sha256", "AWS_DISABLE_BULK_DELETE": "true", **settings}
    with credentials.nobody(place.scheme):
        return objects.opened(place.scheme, place.bucket, settings)


@dataclass(frozen=True, slots=True)
class _Copy:
    """One attempt to copy an export below a prefix."""

    store: "Store"
    place: Prefix
    contents: Contents
    meter: Meter
    check: Check

    def perform(self) -> None:
        """Leaves the whole export with its manifest, or raises and leaves none."""
        import obstore
        from obstore.exceptions import BaseError

        found = self._read(MANIFEST)
        if found is not None:
            if export_of(found) != self.contents.export:
                raise self._taken("another export")
            if found == self.contents.manifest and all(self._is_whole(file) for file in self.contents.files):
                self.meter.reach(self.contents.size)
                return
            obstore.put(self.store, self._key(CLAIM), self._claim)
            obstore.delete(self.store, self._key(MANIFEST))
        self._take()
        for file in self.contents.files:
            self.check()
            done = self.meter.done + file.size_bytes
            if not self._is_whole(file):
                etag = self._send(file)
                if not self._is_whole(file, etag):
                    raise self._damaged(file.path)
            self.meter.reach(done)
        self.check()
        obstore.put(self.store, self._key(MANIFEST), self.contents.manifest, use_multipart=False)
        if self._read(MANIFEST) != self.contents.manifest:
            raise self._damaged(MANIFEST)
        with contextlib.suppress(BaseError, OSError):  # the copy is whole all the same
            obstore.delete(self.store, self._key(CLAIM))

    @property
    def _claim(self) -> bytes:
        return json.dumps({"export": self.contents.export}).encode()

    def _take(self) -> None:
        """Makes the prefix this export's. Raises TrainingError when there is something else."""
        import obstore
        from obstore.exceptions import AlreadyExistsError

        if self._read(CLAIM) is None:
            if any(True for batch in obstore.list(self.store, self.place.prefix, chunk_size=10) for _ in batch):
                raise self._taken("something else")
            with contextlib.suppress(AlreadyExistsError):  # somebody came first: it is seen below who
                obstore.put(self.store, self._key(CLAIM), self._claim, mode="create")
        if self._read(CLAIM) != self._claim:
            raise self._taken("a copy of another export, on its way or broken off")

    def _send(self, file: ModelFile) -> str:
        """Uploads a file; returns the ETag that S3 gives to such an upload."""
        import obstore

        size = _part_size(file.size_bytes)
        parts = _Parts(self.contents, file, size, self.meter, self.check)
        try:
            if file.size_bytes <= size:
                obstore.put(self.store, self._key(file.path), b"".join(parts), use_multipart=False)
            else:
                obstore.put(
                    self.store,
                    self._key(file.path),
                    iter(parts),
                    use_multipart=True,
                    chunk_size=size,
                    max_concurrency=PARTS_IN_FLIGHT,
                )
        except Exception:
            if parts.error is not None:  # ours, however the library wrapped it
                raise parts.error from None
            raise
        return parts.etag

    def _is_whole(self, file: ModelFile, etag: str = "") -> bool:
        """Whether an object has a file's bytes. etag: the one that S3 gives to it, when it is known."""
        import obstore

        try:
            found = obstore.head(self.store, self._key(file.path))
        except FileNotFoundError:
            return False
        if found["size"] != file.size_bytes:
            return False
        given = _MD5.fullmatch(found["e_tag"] or "")
        if given and given[1] == (etag or self._etag(file)):
            return True
        digest = hashlib.sha256()
        for chunk in obstore.get(self.store, self._key(file.path)).stream(min_chunk_size=1 << 20):
            self.check()
            digest.update(chunk)
        return digest.hexdigest() == file.sha256

    def _etag(self, file: ModelFile) -> str:
        parts = _Parts(self.contents, file, _part_size(file.size_bytes), None, self.check)
        for _ in parts:
            pass
        return parts.etag

    def _read(self, name: str) -> bytes | None:
        import obstore

        try:
            return bytes(obstore.get(self.store, self._key(name)).bytes())
        except FileNotFoundError:
            return None

    def _key(self, name: str) -> str:
        return f"{self.place.prefix}/{name}"

    def _taken(self, what: str) -> TrainingError:
        message = f"There is {what} below {self.place} already."
        hint = "Name a prefix with nothing below it, or delete what is there if it is not wanted."
        return TrainingError("DESTINATION_FAILED", message, hint)

    def _damaged(self, name: str) -> TrainingError:
        message = f"{self.place}/{name} is not what was sent to it."
        return TrainingError("DESTINATION_FAILED", message, "Try again later, or another store.", retryable=True)


class _Parts:
    """The parts of a file on their way. etag: what S3 gives to them, once all were taken; error: why there are no
    more of them."""

    def __init__(self, contents: Contents, file: ModelFile, size: int, meter: Meter | None, check: Check) -> None:
        self._parts = contents.parts(file, size)
        self._meter = meter
        self._check = check
        self._is_one = file.size_bytes <= size
        self._hashes: list[bytes] = []
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[bytes]:
        try:
            for part in self._parts:
                self._check()
                self._hashes.append(hashlib.md5(part, usedforsecurity=False).digest())
                yield part
                if self._meter is not None:
                    self._meter.add(len(part))
        except Exception as error:
            self.error = error
            raise

    @property
    def etag(self) -> str:
        """MD5 of the bytes of an object that was sent in one; else of the MD5s of its parts, and their number."""
        if self._is_one:
            return (self._hashes[0] if self._hashes else hashlib.md5(b"", usedforsecurity=False).digest()).hex()
        whole = hashlib.md5(b"".join(self._hashes), usedforsecurity=False).hexdigest()
        return f"{whole}-{len(self._hashes)}"


def _part_size(size: int) -> int:
    """Bytes of each part of an object: more than PART_BYTES only where there would be too many."""
    return max(PART_BYTES, -(-size // _MOST_PARTS))


def _failed(error: Exception, place: Prefix, secret_name: str) -> TrainingError:
    """What an error of the library means."""
    from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

    if isinstance(error, FileNotFoundError):
        return _no_bucket(place)
    if isinstance(error, (PermissionDeniedError, UnauthenticatedError)):
        message = f"The credentials of the secret {secret_name!r} may not write to {place}."
        hint = "They must list, read and write below it, and delete what they wrote; the operator keeps them."
        return TrainingError("DESTINATION_FAILED", message, hint)
    text = str(error)
    if "NoSuchBucket" in text:
        return _no_bucket(place)
    if "redirect without LOCATION" in text or "AuthorizationHeaderMalformed" in text or "PermanentRedirect" in text:
        message = f"The bucket {place.scheme}://{place.bucket} is in another region."
        return TrainingError("DESTINATION_FAILED", message, "Name it in the secret: AWS_REGION.")
    message = (
        f"The object store of {place.scheme}://{place.bucket} did not answer as it should ({type(error).__name__})."
    )
    hint = "The job tries again; if it stays, look at the network, and at endpoint and region in the secret."
    return TrainingError("DESTINATION_FAILED", message, hint, retryable=True)


def _no_bucket(place: Prefix) -> TrainingError:
    message = f"There is no bucket {place.scheme}://{place.bucket}."
    return TrainingError("DESTINATION_FAILED", message, "Check its name, and the endpoint that the secret names.")
