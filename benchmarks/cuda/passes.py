"""One pass on a device, as it was measured."""

import time
from dataclasses import dataclass

import torch

from benchmarks.engine import memory


@dataclass(frozen=True)
class Outcome:
    """tokens, scored: real ones in `seconds`, set-up not counted; peak_bytes: the most that tensors took (on CUDA, by
    its allocator, weights included) or that the process had resident."""

    setting: str
    seconds: float
    tokens: int
    scored: int
    steps: int
    loss: float
    peak_bytes: int


class DeviceWatch:
    """A clock that waits for the device, and the most memory taken meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begin = self._end = 0.0
        self.peak_bytes = 0

    def start(self) -> None:
        """The set-up is over."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            memory.forget_peak()
        self._begin = self._end = time.perf_counter()

    def lap(self) -> None:
        """A step is over."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self.peak_bytes = torch.cuda.max_memory_allocated(self._device)
        else:
            self.peak_bytes = memory.peak()
        self._end = time.perf_counter()

    @property
    def seconds(self) -> float:
        """From the start to the last lap."""
        return self._end - self._begin


def products(device: torch.device, seconds: float = 1.0) -> float:
    """Operations a second of a large product in bfloat16 on the device: the best within `seconds`."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)
    best, end, runs = float("inf"), time.perf_counter() + seconds, 0
    while runs < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best, runs = min(best, time.perf_counter() - start), runs + 1
    return 2.0 * size**3 / best
