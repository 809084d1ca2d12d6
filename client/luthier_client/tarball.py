"""A download as one tar: uncompressed, the same bytes for the same files, the list of them first.

It is written as the stream comes, so it takes its own size and no more, and may go into a pipe.
"""

import contextlib
import hashlib
import os
import tarfile
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from luthier.v1.model_pb2 import ModelFile
from luthier_client import manifest
from luthier_client.download import TakenUp
from luthier_client.errors import DownloadDamaged
from luthier_client.lock import lock_or_refuse
from luthier_client.manifest import Manifest

_BLOCK = 1024 * 1024
_LONGEST_LIST = 64 * 1024 * 1024
_NAMES = ("manifest.json", "luthier-manifest.json")


class TarStream:
    """A tar into a binary stream that only goes forward."""

    can_start_over = False

    def __init__(self, stream: IO[bytes], written: int = 0) -> None:
        self._stream = stream
        self._written = written

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    def take_up(self) -> TakenUp | None:
        return None

    def begin(self, files: Manifest) -> None:
        self._put(list_member(files))

    def open(self, file: ModelFile) -> None:
        self._put(header(file.path, file.size_bytes))

    def write(self, data: bytes) -> None:
        self._put(data)

    def close(self) -> None:
        self._put(padding(self._written))

    def finish(self) -> None:
        # Two empty blocks end a tar, which is filled up to the records that tapes had.
        self._put(bytes(2 * tarfile.BLOCKSIZE))
        self._put(bytes(-self._written % tarfile.RECORDSIZE))
        self._stream.flush()

    def _put(self, data: bytes) -> None:
        self._stream.write(data)
        self._written += len(data)


class TarFile:
    """A tar in a file that does not exist yet, `target`.

    It is written to `TARGET.partial`, which is kept when the download breaks off: the tar's own first member says what
    it is the beginning of. Raises FileExistsError when there is a file already, and while another download writes it.
    """

    can_start_over = True

    def __init__(self, target: Path) -> None:
        self.path = Path(target).absolute()
        if os.path.lexists(self.path):
            raise FileExistsError(f"{self.path} exists already")
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._file: IO[bytes] | None = None
        self._tar: TarStream | None = None

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._partial.is_symlink() or (self._partial.exists() and not self._partial.is_file()):
            raise FileExistsError(f"{self._partial} exists and is not a broken download: move it away")
        # A file that is there must be the beginning of a tar of ours, or nothing.
        self._file = open(self._partial, "r+b" if self._partial.exists() else "x+b")
        try:
            lock_or_refuse(self._file, f"another download into {self.path} goes on")
            if os.fstat(self._file.fileno()).st_size and not _is_ours(self._file):
                raise FileExistsError(f"{self._partial} exists and is not a broken download: move it away")
        except BaseException:
            self._file.close()
            raise
        self._tar = TarStream(self._file)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is None:
            return
        with contextlib.closing(self._file):
            self._file.flush()
            if isinstance(error, DownloadDamaged) or os.fstat(self._file.fileno()).st_size == 0:
                self._partial.unlink(missing_ok=True)
        self._file = None

    def take_up(self) -> TakenUp | None:
        assert self._file is not None
        taken, end = _beginning(self._file)
        if taken is not None:
            self._file.seek(end)
            self._file.truncate()
            self._tar = TarStream(self._file, written=end)
        return taken

    def begin(self, files: Manifest) -> None:
        assert self._file is not None
        self._file.seek(0)
        self._file.truncate()
        self._tar = TarStream(self._file)
        self._tar.begin(files)

    def open(self, file: ModelFile) -> None:
        self._stream.open(file)

    def write(self, data: bytes) -> None:
        self._stream.write(data)

    def close(self) -> None:
        self._stream.close()

    def finish(self) -> None:
        assert self._file is not None
        self._stream.finish()
        self._file.close()
        self._file = None
        self._partial.rename(self.path)

    @property
    def _stream(self) -> TarStream:
        assert self._tar is not None
        return self._tar


def header(path: str, size: int) -> bytes:
    """What stands before a file's bytes; with nothing in it of times, owners or the machine."""
    member = tarfile.TarInfo(path)
    member.size, member.mode = size, 0o644
    return member.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")


def padding(length: int) -> bytes:
    """What fills up the last block of so many bytes."""
    return bytes(-length % tarfile.BLOCKSIZE)


def list_member(files: Manifest) -> bytes:
    """The first member: the list of files, under a name that none of them has."""
    taken = {file.path for file in files}
    name = next((each for each in _NAMES if each not in taken), f".{_NAMES[-1]}")
    data = manifest.to_json(files)
    return header(name, len(data)) + data + padding(len(data))


def _is_ours(file: IO[bytes]) -> bool:
    """Whether a file begins as our tars do."""
    file.seek(0)
    start = file.read(tarfile.BLOCKSIZE)
    with contextlib.suppress(tarfile.HeaderError):
        return tarfile.TarInfo.frombuf(start, "utf-8", "strict").name.lstrip(".") in _NAMES
    return len(start) < tarfile.BLOCKSIZE and any(start.startswith(name.encode()) for name in _NAMES)


def _beginning(file: IO[bytes]) -> tuple[TakenUp | None, int]:
    """What a file holds of a tar, and where that ends; (None, 0) when it holds less than the list of files."""
    file.seek(0)
    start = file.read(tarfile.BLOCKSIZE)
    try:
        size = tarfile.TarInfo.frombuf(start, "utf-8", "strict").size
    except tarfile.HeaderError:
        return None, 0
    files = manifest.from_json(file.read(size)) if 0 < size <= _LONGEST_LIST else None
    if files is None:
        return None, 0
    first = list_member(files)
    file.seek(0)
    if file.read(len(first)) != first:
        return None, 0
    for index, each in enumerate(files):
        began = file.tell()
        head = header(each.path, each.size_bytes)
        if file.read(len(head)) != head:
            return TakenUp(files, index, 0, hashlib.sha256()), began
        digest, received = hashlib.sha256(), 0
        while block := file.read(min(_BLOCK, each.size_bytes - received)):
            digest.update(block)
            received += len(block)
        whole = received == each.size_bytes and digest.hexdigest() == each.sha256
        filled = file.read(len(padding(received)))
        if whole and filled == padding(received):
            continue
        if received and (received < each.size_bytes or whole):  # a whole file may lack what fills its last block
            return TakenUp(files, index, received, digest), began + len(head) + received
        return TakenUp(files, index, 0, hashlib.sha256()), began
    return TakenUp(files, len(files), 0, hashlib.sha256()), file.tell()
