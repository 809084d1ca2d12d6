"""Noticing that files were replaced: by asking for their state when it matters, without thread and timer."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

Stamp: TypeAlias = tuple[tuple[int, int, int, int], ...]


def stamp(paths: Sequence[Path]) -> Stamp:
    """What changes when one of the files does: inode, times and size of each; four zeros for one that is not there."""
    return tuple(_of(path) for path in paths)


def _of(path: Path) -> tuple[int, int, int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return (0, 0, 0, 0)
    return (found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size)
