"""How much memory a job took, measured."""

import contextlib
import ctypes
import resource
import sys
from pathlib import Path

import torch

_M_MMAP_THRESHOLD = -3


class Gauge:
    """The most that a device's memory held over what it held when the gauge was made: on CUDA of the allocator's
    tensors, on a CPU of what the process has resident.

    On Linux the system's own mark of the most is set back at the start, so that what came before does not count.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._noted = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            give_back()
            self._before = _resident()
            with contextlib.suppress(OSError):  # not on every system: then the process's whole life counts
                Path("/proc/self/clear_refs").write_text("5")

    def note(self) -> None:
        """Keeps the peak so far, because another gauge is about to be made: the system has one mark for all."""
        self._noted = self.peak()

    def now(self) -> int:
        """Bytes that are held now, over what was held when the gauge was made."""
        if self._device.type == "cuda":
            return int(torch.cuda.memory_allocated(self._device)) - self._before
        return _resident() - self._before

    def peak(self) -> int:
        """Bytes."""
        if self._device.type == "cuda":
            return max(int(torch.cuda.max_memory_allocated(self._device)) - self._before, self._noted)
        return max(_most_resident() - self._before, self._noted)


_FOLLOWING = 1 << 18


def follow_allocations() -> None:
    """From now on what is resident follows what is allocated: the C library gives every tensor of 256 KiB or more
    back to the system when it is freed.

    Left to itself it keeps them, which saves zeroed pages, and splits them, which takes up to 1.3 times the memory. A
    micro-batch of a Llama of 3 layers and 3,800 tokens took 3.2 s of a core in its own way, and 3.7 s with tensors from
    1 MiB on given back: only worth it where memory is scarce.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, _FOLLOWING)
        library.malloc_trim(0)


def give_back() -> None:
    """Returns to the system what the C library holds free."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _status(name: str) -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    return None


def _resident() -> int:
    return _status("VmRSS:") or 0


def _most_resident() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM:") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
