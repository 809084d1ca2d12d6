"""What the device can do, and how full and busy it is."""

import contextlib
import os
import time
from pathlib import Path

import torch

_CPU_SIZE, _CUDA_SIZE = 640, 8192
_SECONDS = 0.05


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large product in the computing dtype, the best of those that fit into 0.05 s, and at
    least two; 0 when the device has no room for one."""
    size = _CUDA_SIZE if device.type == "cuda" else _CPU_SIZE
    try:
        left, right, out = (torch.zeros(size, size, dtype=dtype, device=device) for _ in range(3))
    except torch.OutOfMemoryError:
        return 0.0
    best, begin, runs = float("inf"), time.perf_counter(), 0
    while runs < 2 or time.perf_counter() - begin < _SECONDS:
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best, runs = min(best, time.perf_counter() - start), runs + 1
    if device.type == "cuda":
        del left, right, out
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)  # the product's own memory is not the job's
    return 2.0 * size**3 / best


def readings(device: torch.device) -> dict[str, float]:
    """Numbers by name: on CUDA `gpu_memory_bytes`, the most that tensors took so far, and `gpu_utilization`, from 0 to
    1 over the driver's last sample, where it tells; else `memory_bytes`, what the process has resident."""
    found: dict[str, float] = {}
    if device.type != "cuda":
        with contextlib.suppress(OSError):  # not on every system
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            found["memory_bytes"] = float(pages * os.sysconf("SC_PAGE_SIZE"))
        return found
    found["gpu_memory_bytes"] = float(torch.cuda.max_memory_allocated(device))
    with contextlib.suppress(
        Exception
    ):  # no pynvml, no driver, not on this device: pynvml's errors share no other base
        found["gpu_utilization"] = torch.cuda.utilization(device) / 100
    return found
