"""A download into a directory: written beside it, and renamed once all of it is whole."""

import contextlib
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from luthier.v1.model_pb2 import ModelFile
from luthier_client import manifest
from luthier_client.download import TakenUp
from luthier_client.errors import DownloadDamaged
from luthier_client.lock import lock_or_refuse
from luthier_client.manifest import MARKER, Manifest

_BLOCK = 1024 * 1024


class Directory:
    """A directory that does not exist yet or is empty, `target`.

    Everything is written to `TARGET.partial`, whose marker holds the manifest; it is kept when the download breaks off.
    Raises FileExistsError when there is something at the target already, when the partial directory is somebody else's,
    and while another download writes to it.
    """

    can_start_over = True

    def __init__(self, target: Path) -> None:
        self.path = Path(target).absolute()
        if self.path.exists() and not (self.path.is_dir() and not any(self.path.iterdir())):
            raise FileExistsError(f"{self.path} exists already")
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._marker: IO[bytes] | None = None
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        marker = self._partial / MARKER
        if not os.path.lexists(self._partial):
            self._partial.mkdir(parents=True)
            marker.touch()
        elif self._partial.is_symlink() or not _is_plain(marker):
            raise FileExistsError(f"{self._partial} exists and is not a broken download: move it away")
        self._marker = open(marker, "r+b")
        try:
            lock_or_refuse(self._marker, f"another download into {self.path} goes on")
        except BaseException:
            self._marker.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close_file()
        if self._marker is None:
            return
        with contextlib.closing(self._marker):
            has_begun = os.fstat(self._marker.fileno()).st_size > 0
            if isinstance(error, DownloadDamaged) or not has_begun:
                shutil.rmtree(self._partial, ignore_errors=True)
        self._marker = None

    def take_up(self) -> TakenUp | None:
        assert self._marker is not None
        self._marker.seek(0)
        files = manifest.from_json(self._marker.read())
        if files is None or not self._holds_only(files):
            return None
        for index, file in enumerate(files):
            path = self._partial / file.path
            received, digest = _hashed(path) if path.exists() else (0, hashlib.sha256())
            if path.exists() and received == file.size_bytes and digest.hexdigest() == file.sha256:
                continue
            for later in files[index + 1 :]:
                (self._partial / later.path).unlink(missing_ok=True)
            if not 0 < received < file.size_bytes:
                path.unlink(missing_ok=True)
                return TakenUp(files, index, 0, hashlib.sha256())
            self._file = open(path, "ab")  # noqa: SIM115 - open until the next file begins
            return TakenUp(files, index, received, digest)
        return TakenUp(files, len(files), 0, hashlib.sha256())

    def begin(self, files: Manifest) -> None:
        assert self._marker is not None
        self._close_file()
        for each in list(self._partial.iterdir()):
            if each.name == MARKER:
                continue
            if each.is_dir() and not each.is_symlink():
                shutil.rmtree(each)
            else:
                each.unlink()
        self._marker.seek(0)
        self._marker.truncate()
        self._marker.write(manifest.to_json(files))
        self._marker.flush()

    def open(self, file: ModelFile) -> None:
        path = self._partial / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "xb")  # noqa: SIM115 - open until the next file begins

    def write(self, data: bytes) -> None:
        assert self._file is not None
        self._file.write(data)

    def close(self) -> None:
        self._close_file()

    def finish(self) -> None:
        assert self._marker is not None
        self._marker.close()  # which some systems want before the directory is renamed
        self._marker = None
        (self._partial / MARKER).unlink()
        if self.path.exists():
            self.path.rmdir()
        self._partial.rename(self.path)

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _holds_only(self, files: Manifest) -> bool:
        """Whether there are only plain files here, and only such as the manifest names: no link leads out."""
        expected = {MARKER, *(file.path for file in files)}
        return all(
            _is_plain(path) and path.relative_to(self._partial).as_posix() in expected
            for path in _leaves(self._partial)
        )


def _leaves(root: Path) -> Iterator[Path]:
    """Everything below a directory that is none; links are not followed."""
    for each in root.iterdir():
        if each.is_dir() and not each.is_symlink():
            yield from _leaves(each)
        else:
            yield each


def _is_plain(path: Path) -> bool:
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def _hashed(path: Path) -> tuple[int, "hashlib._Hash"]:
    """(bytes, their SHA-256)."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return size, digest
