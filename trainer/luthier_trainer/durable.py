"""Directories that are there whole or not at all."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from luthier_trainer.errors import TrainingError

MANIFEST = "manifest.json"
ASIDE = ".tmp-"
_CHUNK = 1 << 20
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yields a directory beside `path` to write into, and makes it `path` durably at the end: files 0644, all synced,
    then renamed. What stood at `path` is replaced. Nothing stays when the body raises.

    Raises TrainingError STORAGE_FULL when the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.parent / f"{ASIDE}{path.name}"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        yield aside
        for file in _files(aside):
            file.chmod(0o644)
            _sync(file)
        for folder in (each for each in aside.rglob("*") if each.is_dir()):
            _sync(folder)
        _sync(aside)
        if path.exists():
            shutil.rmtree(path)
        aside.rename(path)
        _sync(path.parent)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        if error.errno not in _NO_ROOM:
            raise
        raise TrainingError(
            "STORAGE_FULL",
            f"The disk is full: {path.name} could not be written.",
            "Make room and resume the job.",
            True,
        ) from error
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def sweep(folder: Path) -> None:
    """Removes what an earlier attempt left half-written in a folder."""
    for left in folder.glob(f"{ASIDE}*"):
        shutil.rmtree(left, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON for machines that people may read."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def size(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in _files(folder))


def write_manifest(folder: Path) -> None:
    """Notes the size and the SHA-256 of every file below the folder."""
    files = {
        file.relative_to(folder).as_posix(): {"size_bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in _files(folder)
    }
    write_json(folder / MANIFEST, {"files": files})


def verify_manifest(folder: Path) -> None:
    """Raises TrainingError CHECKPOINT_DAMAGED when a file is missing or differs from what the manifest says."""
    try:
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
        wrong = [
            name
            for name, noted in files.items()
            if not (folder / name).is_file()
            or (folder / name).stat().st_size != noted["size_bytes"]
            or _sha256(folder / name) != noted["sha256"]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        wrong = [MANIFEST]
    if wrong:
        raise TrainingError(
            "CHECKPOINT_DAMAGED",
            f"The checkpoint {folder.name} is damaged: {', '.join(wrong)}.",
            "Resume from an older checkpoint, or start the job anew.",
        )


def _files(folder: Path) -> list[Path]:
    return sorted(each for each in folder.rglob("*") if each.is_file())


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
