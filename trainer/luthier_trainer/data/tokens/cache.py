"""Directories of the cache: there whole or not at all, shared by processes, bounded by size.

    CACHE_DIR/tokenised/KEY/            one entry; its files are the builder's
    CACHE_DIR/tokenised/KEY/counts.json in every entry: locked by whoever uses it, touched whenever it is opened

An entry is built aside and renamed when it is complete and on disk, so a reader sees all of it or nothing; of two
processes that build the same one, the first to finish wins and the other takes its work. Whoever uses an entry holds a
shared lock on its counts.json, so that `drop_unused` and `shrink` can tell what nobody needs. Whoever builds one holds
a lock on the directory aside, so that others can tell whether it is worth while to wait (`is_being_built`).
"""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from luthier_trainer import durable

COUNTS = "counts.json"
_FOLDER = "tokenised"
_STALE_SECONDS = 24 * 3600
_UNLOCKED_SECONDS = 60
"""Whoever builds locks the directory long before it is so old; `.doomed-` ones are being deleted at once."""


def entry(cache_dir: Path, key: str) -> Path:
    """The directory of an entry."""
    return cache_dir / _FOLDER / key


def use(directory: Path) -> int:
    """A descriptor that holds the entry until it is closed; it counts as used now. Raises FileNotFoundError, also for
    an entry that was deleted while its lock was waited for."""
    lock = os.open(directory / COUNTS, os.O_RDONLY | os.O_CLOEXEC)
    fcntl.flock(lock, fcntl.LOCK_SH)
    if os.fstat(lock).st_nlink == 0:
        os.close(lock)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(directory / COUNTS))
    with contextlib.suppress(OSError):  # a cache that may only be read is used all the same
        os.utime(lock)
    return lock


def build(directory: Path, write: Callable[[Path], None], is_whole: Callable[[Path], bool]) -> None:
    """Has `write` fill a directory aside, and makes it the entry durably; an entry that another process put there in
    the meantime stays when `is_whole` says so, and is replaced otherwise. Nothing stays when `write` raises."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    _sweep(directory.parent)
    aside = Path(tempfile.mkdtemp(prefix=_aside(directory), dir=directory.parent))
    held = os.open(aside, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: nobody knows that we build
            fcntl.flock(held, fcntl.LOCK_SH)
        write(aside)
        for path in (*sorted(aside.iterdir()), aside):
            _sync(path)
        _move(aside, directory, is_whole)
        _sync(directory.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        os.close(held)


def is_being_built(directory: Path) -> bool:
    """Whether a process that lives builds the entry now."""
    for aside in directory.parent.glob(f"{_aside(directory)}*"):
        try:
            fd = os.open(aside, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # it has just been moved, or was given up
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            continue
        finally:
            os.close(fd)
    return False


def drop_unused(cache_dir: Path) -> tuple[int, int]:
    """Deletes the entries that no process uses now. Returns (how many, bytes)."""
    _sweep(cache_dir / _FOLDER)
    freed = [size for each in _entries(cache_dir) if (size := _drop(each.directory)) is not None]
    return len(freed), sum(freed)


def shrink(cache_dir: Path, max_bytes: int) -> tuple[int, int]:
    """Deletes entries that no process uses now, those least recently used first, until all of them together have at
    most `max_bytes`; 0 for no limit. Returns (how many, bytes)."""
    if max_bytes <= 0:
        return 0, 0
    _sweep(cache_dir / _FOLDER)
    kept = sorted(_entries(cache_dir), key=lambda each: each.used)
    total = sum(each.size for each in kept)
    count = freed = 0
    for each in kept:
        if total - freed <= max_bytes:
            break
        if (size := _drop(each.directory)) is not None:
            count, freed = count + 1, freed + size
    return count, freed


@dataclass(frozen=True, slots=True)
class _Entry:
    directory: Path
    used: float
    size: int


def _entries(cache_dir: Path) -> Iterator[_Entry]:
    for counts in (cache_dir / _FOLDER).glob(f"[!.]*/{COUNTS}"):
        with contextlib.suppress(FileNotFoundError):  # another process deleted it
            yield _Entry(counts.parent, counts.stat().st_mtime, durable.size(counts.parent))


def _aside(directory: Path) -> str:
    """What the names of directories begin with in which an entry is built."""
    return f".{directory.name[:16]}-"


def _drop(directory: Path) -> int | None:
    """Deletes an entry unless it is used. Returns the bytes of its files, None when it stays or is gone already."""
    with contextlib.suppress(FileNotFoundError), open(directory / COUNTS, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        if os.fstat(file.fileno()).st_nlink == 0:
            return None
        size = durable.size(directory)
        _delete(directory)
        return size
    return None


def _delete(directory: Path) -> None:
    """Renamed first: a reader never meets a directory that is half gone. Raises FileNotFoundError."""
    doomed = directory.rename(directory.with_name(f".doomed-{directory.name[:16]}-{os.getpid()}"))
    shutil.rmtree(doomed, ignore_errors=True)


def _move(aside: Path, directory: Path, is_whole: Callable[[Path], bool]) -> None:
    for _ in range(3):
        try:
            aside.rename(directory)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if is_whole(directory):
            return
        with contextlib.suppress(FileNotFoundError):  # another process moved it away
            _delete(directory)


def _sweep(parent: Path) -> None:
    """Removes what processes that were killed left behind."""
    for left in parent.glob(".*"):
        with contextlib.suppress(FileNotFoundError):
            age = time.time() - left.stat().st_mtime
            if age > _STALE_SECONDS or (age > _UNLOCKED_SECONDS and _is_unlocked(left)):
                shutil.rmtree(left, ignore_errors=True)


def _is_unlocked(directory: Path) -> bool:
    """Whether nobody holds it; no where that cannot be told."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
