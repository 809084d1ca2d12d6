"""What is copied: the files of an export as it was proven, and the manifest that makes a copy complete."""

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from luthier.v1.model_pb2 import ModelFile
from luthier_trainer.durable import MANIFEST
from luthier_trainer.errors import TrainingError

Progress = Callable[[int, int], None]
LINEAGE = "luthier.json"

_ID = re.compile(r"[A-Za-z0-9_-]{1,100}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Contents:
    """The files of an export, in order of their paths, without a manifest. export: its id."""

    folder: Path
    files: tuple[ModelFile, ...]
    export: str

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size_bytes for file in self.files)

    @property
    def manifest(self) -> bytes:
        """The export's id, and the size and SHA-256 of each file: what is written last."""
        files = {file.path: {"size_bytes": file.size_bytes, "sha256": file.sha256} for file in self.files}
        return json.dumps({"export": self.export, "files": files}, indent=2, sort_keys=True).encode() + b"\n"

    def opened(self, file: ModelFile) -> io.FileIO:
        """A file, open to be read. Raises TrainingError when it is not there."""
        try:
            return io.FileIO(self.folder / file.path)
        except OSError as error:
            raise changed(file.path) from error

    def parts(self, file: ModelFile, size: int) -> Iterator[bytes]:
        """The bytes of a file, in parts of this size. Raises TrainingError instead of ending when they are not those
        that were proven."""
        digest, length = hashlib.sha256(), 0
        with self.opened(file) as stream:
            while part := stream.read(size):
                digest.update(part)
                length += len(part)
                yield part
        if (length, digest.hexdigest()) != (file.size_bytes, file.sha256):
            raise changed(file.path)


def contents(folder: Path, files: Sequence[ModelFile]) -> Contents:
    """The contents of an export's folder. Its id is what its luthier.json says; without one it is made of the files, so
    that the same files are the same export. Raises TrainingError for files that are none of it."""
    chosen = tuple(sorted((file for file in files if file.path != MANIFEST), key=lambda file: file.path))
    for file in chosen:
        path = PurePosixPath(file.path)
        if path.is_absolute() or not path.parts or ".." in path.parts or str(path) != file.path:
            raise TrainingError("INTERNAL", f"the export names a file that is not below its folder: {file.path!r}")
    export = _noted(folder)
    if not export:
        listed = json.dumps([[file.path, file.size_bytes, file.sha256] for file in chosen])
        export = f"sha256-{hashlib.sha256(listed.encode()).hexdigest()}"
    return Contents(folder, chosen, export)


def _noted(folder: Path) -> str:
    """The id that an export's luthier.json tells; empty for none, and for one that could mean something to a path."""
    try:
        found = json.loads((folder / LINEAGE).read_bytes())["export"]["id"]
        return found if isinstance(found, str) and _ID.fullmatch(found) else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def export_of(manifest: bytes) -> str:
    """The id of the export that a manifest is of; empty for a file that is no manifest of an export."""
    try:
        found = json.loads(manifest)
        return str(found["export"]) if isinstance(found["files"], dict) else ""
    except (ValueError, KeyError, TypeError):
        return ""


def changed(path: str) -> TrainingError:
    """The error of a file that is not what was proven any more."""
    message = f"{path} changed on the server's disk after the export was proven."
    return TrainingError("DESTINATION_FAILED", message, "Export the model again, and have the disk looked at.")


class Meter:
    """Tells how many bytes are done: at most once for each STEP of them, and when all are."""

    STEP = 8 << 20

    def __init__(self, total: int, tell: Progress) -> None:
        self._total = total
        self._tell = tell
        self._told = -self.STEP
        self._done = 0

    def add(self, size: int) -> None:
        """So many more are done."""
        self.reach(self._done + size)

    def reach(self, done: int) -> None:
        """So many are done in all; a transfer that starts again never counts back."""
        self._done = max(self._done, done)
        if self._done - self._told >= self.STEP or (self._done == self._total and self._told < self._total):
            self._told = self._done
            self._tell(self._done, self._total)

    @property
    def done(self) -> int:
        """Bytes that are done."""
        return self._done
