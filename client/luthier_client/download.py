"""The receiving end of a download: files are written aside, checked, and appear all at once.

What arrives is not trusted: a path may only name a file below the target, in the order and with the size and SHA-256 of
the manifest.
"""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from luthier.v1.model_pb2 import ModelFile
from luthier.v1.models_pb2 import DownloadManifest, DownloadModelResponse, FileChunk
from luthier_client.errors import DownloadDamaged

_MARKER = ".luthier-download"
_FORBIDDEN = set('\\:*?"<>|')


class Download:
    """One download into `target`, a directory that does not exist yet or is empty.

    Everything is written to `TARGET.partial`; `finish` renames it. Use as a context manager: what was not finished is
    removed. Raises FileExistsError when there is something at the target already.
    """

    def __init__(self, target: Path, on_progress: Callable[[int, int], None] | None = None) -> None:
        self._target = Path(target).absolute()
        if self._target.exists() and not (self._target.is_dir() and not any(self._target.iterdir())):
            raise FileExistsError(f"{self._target} exists already")
        self._partial = self._target.with_name(self._target.name + ".partial")
        self._on_progress = on_progress
        self._files: list[ModelFile] | None = None
        self._index = 0
        self._file: IO[bytes] | None = None
        self._digest: Any = None
        self._received = 0
        self._done = 0
        self._total = 0

    def __enter__(self) -> "Download":
        if self._partial.exists():
            if not (self._partial / _MARKER).is_file():
                raise FileExistsError(f"{self._partial} exists and is not a broken download: move it away")
            shutil.rmtree(self._partial)
        self._partial.mkdir(parents=True)
        (self._partial / _MARKER).touch()
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        if self._partial.exists():
            shutil.rmtree(self._partial, ignore_errors=True)

    def accept(self, response: DownloadModelResponse) -> None:
        """Takes the next message. Raises DownloadDamaged."""
        part = response.WhichOneof("part")
        if part == "manifest" and self._files is None:
            self._begin(response.manifest)
        elif part == "chunk" and self._files is not None:
            self._write(response.chunk)
        else:
            raise DownloadDamaged(f"an unexpected message in a download: {part}", reason="OUT_OF_ORDER")

    def finish(self) -> Path:
        """Checks the last file and puts the directory in its place. Raises DownloadDamaged."""
        if self._files is None:
            raise DownloadDamaged("the download brought no list of files", reason="INCOMPLETE")
        while self._index < len(self._files):
            self._close_file()
        (self._partial / _MARKER).unlink()
        if self._target.exists():
            self._target.rmdir()
        self._partial.rename(self._target)
        return self._target

    def _begin(self, manifest: DownloadManifest) -> None:
        seen: set[str] = set()
        for file in manifest.files:
            _check_path(file.path)
            if file.path.casefold() in seen:
                raise _unsafe(file.path, "it comes twice")
            seen.add(file.path.casefold())
        self._files = list(manifest.files)
        self._total = sum(file.size_bytes for file in self._files)

    def _write(self, chunk: FileChunk) -> None:
        assert self._files is not None
        while self._index < len(self._files) and self._files[self._index].path != chunk.path:
            self._close_file()
        if self._index == len(self._files) or chunk.offset != self._received:
            raise DownloadDamaged(f"{chunk.path!r} at {chunk.offset} came out of order", reason="OUT_OF_ORDER")
        if self._received + len(chunk.data) > self._files[self._index].size_bytes:
            raise DownloadDamaged(f"{chunk.path!r} is longer than announced", reason="SIZE_MISMATCH")
        file = self._open_file()
        file.write(chunk.data)
        self._digest.update(chunk.data)
        self._received += len(chunk.data)
        self._done += len(chunk.data)
        if self._on_progress is not None:
            self._on_progress(self._done, self._total)

    def _open_file(self) -> IO[bytes]:
        assert self._files is not None
        if self._file is None:
            path = self._partial / self._files[self._index].path
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(path, "xb")  # noqa: SIM115 - open until the next file begins
            except (FileExistsError, NotADirectoryError) as error:
                raise _unsafe(self._files[self._index].path, "another file is in its way") from error
            self._digest = hashlib.sha256()
        return self._file

    def _close_file(self) -> None:
        """Closes the current file and goes on to the next one."""
        assert self._files is not None
        expected = self._files[self._index]
        self._open_file().close()
        if self._received != expected.size_bytes:
            raise DownloadDamaged(
                f"{expected.path!r} has {self._received} bytes, not {expected.size_bytes}", reason="SIZE_MISMATCH"
            )
        if self._digest.hexdigest() != expected.sha256:
            raise DownloadDamaged(f"{expected.path!r} does not have its SHA-256", reason="SHA256_MISMATCH")
        self._file = None
        self._received = 0
        self._index += 1


def _check_path(path: str) -> None:
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise _unsafe(path, "it leaves the directory")
    if any(character in _FORBIDDEN or ord(character) < 32 or ord(character) == 127 for character in path):
        raise _unsafe(path, "it has a character that no file name of a model has")
    if _MARKER in parts:
        raise _unsafe(path, "the name is taken")


def _unsafe(path: str, why: str) -> DownloadDamaged:
    return DownloadDamaged(f"the server names a file {path!r}: {why}", reason="UNSAFE_PATH")
