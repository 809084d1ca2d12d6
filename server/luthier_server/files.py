"""Files of models, checkpoints and exports, with their hashes; no file is hashed twice while it stays as it is."""

import asyncio
import hashlib
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from luthier.v1.model_pb2 import ModelFile
from luthier_server.errors import NotFound

_KEPT = 20_000


@dataclass(frozen=True, slots=True)
class File:
    """A file of a model, checkpoint or export: its path on disk and as it is called from outside."""

    path: Path
    name: str
    size_bytes: int
    sha256: str


class Files:
    """Lists directories."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int, int, int, int], str] = {}

    async def below(self, directory: Path, kind: str = "model") -> list[File]:
        """Every file below a directory, in a stable order. Raises NotFound."""
        if not directory.is_dir():
            raise NotFound(kind, directory.name, "its files are gone")
        try:
            return await asyncio.to_thread(self._below, directory)
        except FileNotFoundError as error:
            raise NotFound(kind, directory.name, "it was deleted meanwhile") from error

    def _below(self, directory: Path) -> list[File]:
        found = []
        for path in sorted(directory.rglob("*")):
            # Raises for one that is gone: a list that is short by it would look whole.
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                name = path.relative_to(directory).as_posix()
                found.append(File(path, name, status.st_size, self._sha256(path)))
        return found

    def _sha256(self, path: Path) -> str:
        """By what changes when the file does: one that is replaced has another inode, one that is written to and dated
        back another change time."""
        status = path.stat()
        key = (str(path), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if key not in self._known:
            with open(path, "rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            while len(self._known) >= _KEPT:
                self._known.pop(next(iter(self._known)), None)
            self._known[key] = sha256
        return self._known[key]


def noted(directory: Path, files: Iterable[ModelFile]) -> list[File]:
    """The files of an export's directory as they were noted when they were written: nothing is read. Raises NotFound
    for one that lies elsewhere."""
    below = directory.resolve()
    found = []
    for each in files:
        path = (below / each.path).resolve()
        if not path.is_relative_to(below):
            raise NotFound("file", each.path, "it lies outside its export")
        found.append(File(path, each.path, each.size_bytes, each.sha256))
    return found
