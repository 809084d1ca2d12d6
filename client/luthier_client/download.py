"""The receiving end of a download: files come one after the other, are checked, and appear all at once.

What arrives is not trusted: files come in the order and with the size and SHA-256 of the manifest. A download that
broke off goes on where it stopped, here and when it is called anew; what it took up is hashed again, so that every byte
of every file is under the hash that is compared in the end.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

from luthier.v1.model_pb2 import ModelFile
from luthier.v1.models_pb2 import DownloadManifest, DownloadModelRequest, DownloadModelResponse, FileChunk
from luthier_client import errors, manifest
from luthier_client.connection import Tries
from luthier_client.errors import DownloadDamaged
from luthier_client.manifest import Manifest
from luthier_client.persistence import Persistence

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

_RESTARTS = 2


@dataclass(frozen=True)
class TakenUp:
    """What an earlier download left: the files before `index` are whole, and `received` bytes of that one are there."""

    files: Manifest
    index: int
    received: int
    digest: Any
    """The hash of those bytes."""


class Sink(Protocol):
    """Where the files of a download go, in their order. A context manager: leaving it with DownloadDamaged takes away
    what has arrived, any other end keeps it for take_up."""

    can_start_over: bool

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def take_up(self) -> TakenUp | None:
        """What is there of an earlier download and is what its manifest says; None: nothing. Reads and hashes all of
        it. A file of which there are bytes is open and takes the next ones."""

    def begin(self, files: Manifest) -> None:
        """Starts these files; nothing of an earlier download stays."""

    def open(self, file: ModelFile) -> None:
        """Starts the next file."""

    def write(self, data: bytes) -> None:
        """Takes the next bytes of it."""

    def close(self) -> None:
        """Ends it: it is whole."""

    def finish(self) -> None:
        """Ends the download: all files are whole."""


class StartOver(Exception):
    """What was there belongs to other files than the server has now: ask for them from the beginning."""


class Download:
    """One download into a sink, over as many calls as it takes. Use as a context manager."""

    def __init__(self, sink: Sink, on_progress: Progress | None = None) -> None:
        self._sink = sink
        self._on_progress = on_progress
        self._files: Manifest | None = None
        self._index = 0
        self._received = 0
        self._is_open = False
        self._digest: Any = hashlib.sha256()
        self._done = 0
        self._total = 0
        self._found_on_disk = False
        self._awaits_manifest = True
        self._may_repeat = False
        self._met = False
        self._restarts = 0
        self._tries = Tries(None)
        self._persistence = Persistence()

    def __enter__(self) -> Self:
        self._sink.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._sink.__exit__(kind, error, traceback)

    def take_up(self) -> None:
        """Goes on with what an earlier download left. Hashes all of it, so it may take its time. Raises OSError."""
        taken = self._sink.take_up()
        if taken is None:
            return
        self._files, self._index, self._received = taken.files, taken.index, taken.received
        self._digest, self._is_open = taken.digest, taken.received > 0
        self._found_on_disk = taken.received > 0
        self._total = sum(file.size_bytes for file in taken.files)
        self._done = sum(file.size_bytes for file in taken.files[: taken.index]) + taken.received

    def request(self, model_id: str) -> DownloadModelRequest:
        """What asks for everything that is not there yet."""
        self._awaits_manifest, self._may_repeat = True, self._files is not None
        if not self._files:
            return DownloadModelRequest(model_id=model_id)
        if self._index == len(
            self._files
        ):  # all is there: what comes is the manifest, which says whether it is still so
            last = self._files[-1]
            return DownloadModelRequest(model_id=model_id, from_path=last.path, from_offset=last.size_bytes)
        path = self._files[self._index].path
        return DownloadModelRequest(model_id=model_id, from_path=path, from_offset=self._received)

    def accept(self, response: DownloadModelResponse) -> None:
        """Takes the next message. Raises DownloadDamaged, and StartOver when other files come than those before."""
        self._met = True
        part = response.WhichOneof("part")
        if part == "manifest" and self._awaits_manifest:
            self._begin(response.manifest)
        elif part == "chunk" and not self._awaits_manifest:
            self._write(response.chunk)
        else:
            raise DownloadDamaged(f"an unexpected message in a download: {part}", reason="OUT_OF_ORDER")

    def finish(self) -> None:
        """Checks the last file and ends the download. Raises DownloadDamaged, and StartOver as accept does."""
        if self._files is None or self._awaits_manifest:
            raise DownloadDamaged("the download brought no list of files", reason="INCOMPLETE")
        while self._index < len(self._files):
            self._close_file()
        self._sink.finish()

    def pause_after(self, error: errors.LuthierError) -> float:
        """The seconds to wait before the next call, after one that failed. Raises the error when there is none."""
        if self._files and self._awaits_manifest and isinstance(error, errors.InvalidSpec | errors.OutOfRange):
            # There is no such place any more in what the server has.
            self._forget()
            return 0.0
        if not self._met:
            return self._tries.pause_after(error)
        self._persistence.met(self._done)
        return self._persistence.pause_after(error)

    def _begin(self, told: DownloadManifest) -> None:
        files = manifest.checked(told.files)
        if self._files is not None and files != self._files:
            self._forget()
            raise StartOver
        self._awaits_manifest = False
        if self._files is None:
            self._sink.begin(files)
            self._files, self._total = files, sum(file.size_bytes for file in files)
        self._tell()

    def _write(self, chunk: FileChunk) -> None:
        assert self._files is not None
        data, offset = self._new(chunk), chunk.offset
        if not data and chunk.data:
            return
        offset += len(chunk.data) - len(data)
        while self._index < len(self._files) and self._files[self._index].path != chunk.path:
            self._close_file()
        if self._index == len(self._files) or offset != self._received:
            raise DownloadDamaged(f"{chunk.path!r} at {chunk.offset} came out of order", reason="OUT_OF_ORDER")
        if self._received + len(data) > self._files[self._index].size_bytes:
            raise DownloadDamaged(f"{chunk.path!r} is longer than announced", reason="SIZE_MISMATCH")
        self._open_file()
        self._sink.write(data)
        self._digest.update(data)
        self._received += len(data)
        self._done += len(data)
        self._tell()

    def _new(self, chunk: FileChunk) -> bytes:
        """The bytes of a chunk that are not there yet: a server that cannot go on begins at the first file again."""
        if not self._may_repeat or not self._files:
            return chunk.data
        place = next((place for place, file in enumerate(self._files) if file.path == chunk.path), self._index)
        if place < self._index:
            return b""
        if place > self._index or chunk.offset >= self._received:
            self._may_repeat = False
            return chunk.data
        return chunk.data[self._received - chunk.offset :]

    def _open_file(self) -> None:
        assert self._files is not None
        if not self._is_open:
            self._sink.open(self._files[self._index])
            self._digest, self._is_open = hashlib.sha256(), True

    def _close_file(self) -> None:
        """Closes the current file and goes on to the next one."""
        assert self._files is not None
        expected = self._files[self._index]
        self._open_file()
        if self._received != expected.size_bytes:
            raise DownloadDamaged(
                f"{expected.path!r} has {self._received} bytes, not {expected.size_bytes}", reason="SIZE_MISMATCH"
            )
        if self._digest.hexdigest() != expected.sha256:
            if self._found_on_disk:  # the beginning of it was there before: a disk can lose what was written last
                self._forget()
                raise StartOver
            raise DownloadDamaged(f"{expected.path!r} does not have its SHA-256", reason="SHA256_MISMATCH")
        self._sink.close()
        self._is_open, self._found_on_disk = False, False
        self._received = 0
        self._index += 1

    def _forget(self) -> None:
        """Lets the next call begin anew. Raises DownloadDamaged when it must not."""
        self._restarts += 1
        if not self._sink.can_start_over or self._restarts > _RESTARTS:
            raise DownloadDamaged("the files changed while they were downloaded", reason="MANIFEST_CHANGED")
        self._files, self._index, self._received, self._done = None, 0, 0, 0
        self._is_open = self._found_on_disk = False

    def _tell(self) -> None:
        if self._on_progress is not None:
            self._on_progress(self._done, self._total)
