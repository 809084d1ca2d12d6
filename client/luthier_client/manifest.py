"""The list of files that a download brings: what is refused of it, and how it is kept beside what has arrived.

A list is not trusted, neither the server's nor one that is found on disk: a path may only name a file below the target.
"""

import json
import re
from collections.abc import Iterable

from luthier.v1.model_pb2 import ModelFile
from luthier_client.errors import DownloadDamaged

MARKER = ".luthier-download"
"""The file in an unfinished download that holds its list."""

Manifest = tuple[ModelFile, ...]

_FORBIDDEN = set('\\:*?"<>|')
_SHA256 = re.compile(r"^[0-9a-f]{64}\Z")


def checked(files: Iterable[ModelFile]) -> Manifest:
    """The list, once nothing in it leads out of a directory or stands in another file's way. Raises DownloadDamaged."""
    manifest = tuple(files)
    seen: set[str] = set()
    for file in manifest:
        _check_path(file.path)
        if file.path.casefold() in seen:
            raise _unsafe(file.path, "it comes twice")
        seen.add(file.path.casefold())
        if file.size_bytes < 0:
            raise DownloadDamaged(f"{file.path!r} has {file.size_bytes} bytes", reason="SIZE_MISMATCH")
    for file in manifest:
        parts = file.path.casefold().split("/")
        if any("/".join(parts[:count]) in seen for count in range(1, len(parts))):
            raise _unsafe(file.path, "another file is in its way")
    return manifest


def to_json(manifest: Manifest) -> bytes:
    """The list as JSON, the same bytes for the same list."""
    files = [{"path": each.path, "size_bytes": each.size_bytes, "sha256": each.sha256} for each in manifest]
    return json.dumps({"files": files}, ensure_ascii=True, indent=1).encode() + b"\n"


def from_json(data: bytes) -> Manifest | None:
    """What to_json made; None for anything else, and for a list that would be refused."""
    try:
        files = [
            ModelFile(path=each["path"], size_bytes=each["size_bytes"], sha256=each["sha256"])
            for each in json.loads(data)["files"]
        ]
        manifest = checked(files)
    except (ValueError, TypeError, KeyError, RecursionError, DownloadDamaged):
        return None
    return manifest if to_json(manifest) == data and all(_SHA256.match(each.sha256) for each in manifest) else None


def _check_path(path: str) -> None:
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise _unsafe(path, "it leaves the directory")
    if any(character in _FORBIDDEN or ord(character) < 32 or ord(character) == 127 for character in path):
        raise _unsafe(path, "it has a character that no file name of a model has")
    if MARKER in parts:
        raise _unsafe(path, "the name is taken")


def _unsafe(path: str, why: str) -> DownloadDamaged:
    return DownloadDamaged(f"the server names a file {path!r}: {why}", reason="UNSAFE_PATH")
