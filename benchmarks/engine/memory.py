"""Resident memory of this process, from /proc."""

import contextlib
import ctypes
import gc
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_PEAK = "5"
"""What makes the kernel forget the most that was resident so far (proc(5), clear_refs)."""


def resident() -> int:
    """Bytes that are resident now; 0 where that cannot be known."""
    return _field("VmRSS")


def peak() -> int:
    """The most bytes that were resident since `forget_peak`; 0 where that cannot be known."""
    return _field("VmHWM")


def forget_peak() -> None:
    """From now on `peak` counts anew. Does nothing where the kernel has no such switch: then it is the process's."""
    with contextlib.suppress(OSError):
        _CLEAR.write_text(_PEAK)


def settle() -> None:
    """Gives back what is free: garbage, and what the C library's allocator keeps."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _field(name: str) -> int:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)
