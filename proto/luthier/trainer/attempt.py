"""The files of an attempt: what a trainer and the server share on disk.

An attempt is one trainer's life. Its directory `jobs/ID/attempt-N/` holds

    task.binpb    TrainerTask, written by the server before the trainer starts
    lock          held (flock) by the trainer as long as it lives
    spool         every TrainerReport, framed, append-only: the truth between trainer and server
    trainer.log   what the trainer's process printed
    control       TrainerControl, replaced atomically by the server
    exit          TrainerExit, written by the host when the process ended
    answer        DataAnswer, what work on datasets gave; written whole before the last report

A frame is the payload's length (u32, little endian), its CRC-32 (u32, little endian), then the payload. A frame that is
short or has a wrong CRC is *not yet written* while the lock is held, and the end of the spool after.
"""

import fcntl
import hashlib
import os
import struct
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

TASK = "task.binpb"
LOCK = "lock"
SPOOL = "spool"
LOG = "trainer.log"
CONTROL = "control"
EXIT = "exit"
ANSWER = "answer"

EXIT_NO_SPACE = 74
"""Exit code of a trainer whose last report did not fit on the disk."""

MAX_PAYLOAD = 16 * 1024 * 1024
_HEADER = struct.Struct("<II")
_SUN_PATH = 100


def frame(payload: bytes) -> bytes:
    """The payload as it stands in a spool. Raises ValueError when it is longer than MAX_PAYLOAD."""
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"a report has {len(payload)} bytes, more than {MAX_PAYLOAD}")
    return _HEADER.pack(len(payload), zlib.crc32(payload)) + payload


def frames(data: bytes) -> Iterator[tuple[bytes, int]]:
    """Yields (payload, offset after it) of each whole frame from the start of `data`; stops at the first broken one."""
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, crc = _HEADER.unpack_from(data, offset)
        end = offset + _HEADER.size + length
        if length > MAX_PAYLOAD or end > len(data):
            return
        payload = data[offset + _HEADER.size : end]
        if zlib.crc32(payload) != crc:
            return
        yield payload, end
        offset = end


def try_lock(attempt_dir: Path) -> int | None:
    """Takes the attempt's lock without waiting: a descriptor that holds it until closed, or None when it is held."""
    fd = os.open(attempt_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def replace_file(path: Path, content: bytes) -> None:
    """Writes a small file so that a reader sees the old content or the new one, durably."""
    aside = path.with_name(path.name + ".new")
    with open(aside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def socket_path(data_dir: Path, name: str) -> Path:
    """Where a UNIX socket of this data directory lies: in it, or in the temporary folder when its path would be too
    long for a socket's address (108 bytes on Linux)."""
    path = data_dir.resolve() / f"{name}.sock"
    if len(os.fsencode(path)) <= _SUN_PATH:
        return path
    key = hashlib.sha256(os.fsencode(data_dir.resolve())).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"luthier-{os.getuid()}-{key}-{name}.sock"
