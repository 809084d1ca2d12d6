"""Directories that are there whole or not at all."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from luthier_trainer.errors import TrainingError

MANIFEST = "manifest.json"
ASIDE = ".tmp-"
_CHUNK = 1 << 20
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OS_ERROR = re.compile(r"\(os error (\d+)\)$", re.ASCII)


def is_full(error: BaseException) -> bool:
    """Whether an exception says that the disk, a quota or a file's limit is full.

    safetensors and tokenizers are written in Rust and raise exceptions of their own, with the number in their text.
    """
    if isinstance(error, OSError):
        return error.errno in _NO_ROOM
    found = _OS_ERROR.search(str(error))
    return found is not None and int(found[1]) in _NO_ROOM


def storage_full(what: str) -> TrainingError:
    """The error of something that could not be written because the disk is full; it cures itself with room."""
    message = f"The disk is full: {what} could not be written."
    return TrainingError("STORAGE_FULL", message, "Make room; the job goes on by itself then.", retryable=True)


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
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if not is_full(error):
            raise
        raise storage_full(path.name) from error


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
        wrong = [name for name, noted in files.items() if not _is_whole(folder / name, noted)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        wrong = [MANIFEST]
    if wrong:
        raise TrainingError(
            "CHECKPOINT_DAMAGED",
            f"The checkpoint {folder.name} is damaged: {', '.join(wrong)}.",
            "Resume from an older checkpoint, or start the job anew.",
        )


def _is_whole(file: Path, noted: dict[str, Any]) -> bool:
    """Whether a file is what the manifest noted. One that cannot be read is as good as gone."""
    size_bytes, sha256 = noted["size_bytes"], noted["sha256"]
    try:
        return file.is_file() and file.stat().st_size == size_bytes and _sha256(file) == sha256
    except OSError:
        return False


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
