"""Files on their way in: received piece by piece, hashed, and kept for a while when an upload breaks off.

    INCOMING/SHA256.part   what came of a file whose hash was announced; an upload may go on from its end
    INCOMING/RANDOM        a file without one, or scratch; gone with the call

Bytes that came are trusted only once the whole file has the announced hash, so a torn end costs a new upload at worst.
"""

import asyncio
import contextlib
import errno
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeVar

from luthier.v1.datasets_pb2 import DatasetMetadata
from luthier_server.errors import Aborted, Exhausted, InvalidArgument, StorageFull, Violation

T = TypeVar("T")
_PART = ".part"
_KEPT_SECONDS = 24 * 3600
_BATCH = 1024 * 1024
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class Received:
    """A whole file, at a place that lasts as long as its upload."""

    path: Path
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class _Owner:
    """The upload that writes a file now. superseded: a newer one of the same file has come; released: this one writes
    no more."""

    superseded: asyncio.Event = field(default_factory=asyncio.Event)
    released: asyncio.Event = field(default_factory=asyncio.Event)


class Uploads:
    """Receives files. One file at a time comes by one upload: a newer one of the same file takes over."""

    def __init__(self, incoming: Path, *, max_bytes: int) -> None:
        self._incoming = incoming
        self._max_bytes = max_bytes
        self._owners: dict[str, _Owner] = {}

    def prepare(self) -> None:
        """Makes the folder, and clears what an earlier server left and nobody will go on with."""
        self._incoming.mkdir(parents=True, exist_ok=True)
        for left in self._incoming.iterdir():
            if left.suffix != _PART:
                _remove(left)
        self.sweep()

    def sweep(self) -> None:
        """Deletes what broke off a day ago."""
        for part in self._incoming.glob(f"*{_PART}"):
            with contextlib.suppress(FileNotFoundError):
                if part.stem not in self._owners and time.time() - part.stat().st_mtime > _KEPT_SECONDS:
                    part.unlink()

    def received(self, sha256: str) -> int:
        """Bytes of a file that an upload left here."""
        try:
            return self._part(sha256).stat().st_size
        except FileNotFoundError:
            return 0

    @contextlib.asynccontextmanager
    async def scratch(self) -> AsyncIterator[Path]:
        """A folder for work on files, gone at the end. Raises StorageFull for a disk that is."""
        folder = self._incoming / uuid.uuid4().hex
        folder.mkdir()
        try:
            with storage_errors():
                yield folder
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    @contextlib.asynccontextmanager
    async def receive(self, metadata: DatasetMetadata, chunks: AsyncIterator[bytes]) -> AsyncIterator[Received]:
        """The file, once all of it came; whoever wants it moves it away, and else it is deleted. What came of a file
        that was announced with its hash stays when it was not judged: the caller went away, or the server had no time.

        Raises InvalidArgument for a wrong hash or size, Aborted when less is here than the offset says or a newer
        upload took over, Exhausted for a file over the limit, StorageFull.
        """
        if max(metadata.size_bytes, metadata.offset) > self._max_bytes:
            raise self._too_large()
        announced = metadata.sha256
        path = self._part(announced) if announced else self._incoming / uuid.uuid4().hex
        async with self._alone(announced) as owner:
            over = not announced
            try:
                with storage_errors():
                    sha256, size = await self._write(path, metadata.offset, _until(owner.superseded, chunks))
                    _compare(metadata, sha256, size)
                    yield Received(path, sha256, size)
                over = True
            except InvalidArgument:
                over = True
                raise
            finally:
                if over or not self.received(announced):
                    path.unlink(missing_ok=True)

    @contextlib.asynccontextmanager
    async def _alone(self, sha256: str) -> AsyncIterator[_Owner]:
        """Ends an earlier upload of the same file, whose caller may be long gone, and waits until it let go."""
        while sha256 and (earlier := self._owners.get(sha256)):
            earlier.superseded.set()
            await earlier.released.wait()
        owner = _Owner()
        if sha256:
            self._owners[sha256] = owner
        try:
            yield owner
        finally:
            owner.released.set()
            if self._owners.get(sha256) is owner:
                del self._owners[sha256]

    async def _write(self, path: Path, offset: int, chunks: AsyncIterator[bytes]) -> tuple[str, int]:
        digest = hashlib.sha256()
        with await _finished(_open, path, offset, digest) as file:
            size = offset
            batch: list[bytes] = []
            waiting = 0
            async for chunk in chunks:
                batch.append(chunk)
                waiting += len(chunk)
                if size + waiting > self._max_bytes:
                    raise self._too_large()
                if waiting >= _BATCH:
                    await _finished(_append, file, digest, batch)
                    size, batch, waiting = size + waiting, [], 0
            await _finished(_append, file, digest, batch)
            await _finished(os.fsync, file.fileno())
        return digest.hexdigest(), size + waiting

    def _part(self, sha256: str) -> Path:
        return self._incoming / f"{sha256}{_PART}"

    def _too_large(self) -> Exhausted:
        return Exhausted(
            f"the file has more than {self._max_bytes:,} bytes", subject="dataset size", reason="TOO_LARGE"
        )


@contextlib.contextmanager
def storage_errors() -> Iterator[None]:
    """Raises StorageFull for an error that says so."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageFull() from error
        raise


async def _finished(call: Callable[..., T], *arguments: object) -> T:
    """Calls in a thread, and returns when it is done also when the caller is cancelled: no write comes later."""
    done = asyncio.ensure_future(asyncio.to_thread(call, *arguments))
    try:
        return await asyncio.shield(done)
    except asyncio.CancelledError:
        await asyncio.wait([done])
        raise


async def _until(superseded: asyncio.Event, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The chunks, until a newer upload takes over: also while none comes. Raises Aborted then."""
    over = asyncio.ensure_future(superseded.wait())
    try:
        while True:
            coming = asyncio.ensure_future(anext(chunks, None))
            try:
                await asyncio.wait((coming, over), return_when=asyncio.FIRST_COMPLETED)
            finally:
                coming.cancel()
            if over.done():
                raise Aborted("a newer upload of the same file took over", reason="UPLOAD_SUPERSEDED")
            chunk = coming.result()
            if chunk is None:
                return
            yield chunk
    finally:
        over.cancel()


def _open(path: Path, offset: int, digest: "hashlib._Hash") -> BinaryIO:
    """The file, ready for what follows `offset`; what lies before is hashed. Raises Aborted for a gap."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    file = open(descriptor, "r+b", buffering=0)  # noqa: SIM115 - the caller closes it
    try:
        there = os.fstat(descriptor).st_size
        if offset > there:
            raise Aborted(f"the upload cannot go on from {offset}: {there} bytes are here", reason="UPLOAD_OFFSET")
        file.truncate(offset)
        left = offset
        while left and (data := file.read(min(left, _BATCH))):
            digest.update(data)
            left -= len(data)
    except BaseException:
        file.close()
        raise
    return file


def _append(file: BinaryIO, digest: "hashlib._Hash", batch: list[bytes]) -> None:
    for chunk in batch:
        view = memoryview(chunk)
        while view:
            view = view[file.write(view) :]
        digest.update(chunk)


def _compare(metadata: DatasetMetadata, sha256: str, size: int) -> None:
    violations = []
    if metadata.size_bytes and metadata.size_bytes != size:
        violations.append(Violation("metadata.size_bytes", f"says {metadata.size_bytes}, but {size} bytes came"))
    if metadata.sha256 and metadata.sha256 != sha256:
        violations.append(Violation("metadata.sha256", f"says {metadata.sha256}, but the bytes have {sha256}"))
    if violations:
        first = violations[0]
        raise InvalidArgument(f"{first.field}: {first.description}", violations)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
