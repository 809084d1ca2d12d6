"""How much memory there is."""

import contextlib
from pathlib import Path

import torch

from luthier.trainer.v1.task_pb2 import TrainerTask

_HOST_SHARE, _DEVICE_SHARE = 0.92, 0.94
"""What training may plan with of what is free: the rest is for the page cache and other processes, on CUDA for what its
allocator cannot use."""

_CGROUP = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60


def limit(device: torch.device, task: TrainerTask) -> int:
    """Bytes that training may take on the device over what the process has now: the task's own limit if it has one,
    else what is free less a margin. 0 when nothing is known."""
    if task.memory_limit_bytes > 0:
        return int(task.memory_limit_bytes)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        ours = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int((free + ours) * _DEVICE_SHARE)
    return int(free_of_host() * _HOST_SHARE)


def ceiling(device: torch.device, task: TrainerTask) -> int:
    """What `limit` would be if nobody else used the device: what does not fit below may fit later. 0 when unknown."""
    if task.memory_limit_bytes > 0:
        return int(task.memory_limit_bytes)
    return int(total_memory(device)[0] * _HOST_SHARE)


def total_memory(device: torch.device) -> tuple[int, int]:
    """(bytes that the device has, of those free now); of a CPU the host's, and no more than its container's. 0 when
    unknown."""
    if device.type == "cuda":
        try:
            free, total = torch.cuda.mem_get_info(device)
        except RuntimeError:  # jobs leave no room to ask it
            return 0, 0
        return total, free
    total = free = 0
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == "MemTotal":
            total = int(value.split()[0]) * 1024
        elif name == "MemAvailable":
            free = int(value.split()[0]) * 1024
    try:
        most = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return total, free
    return min(total, most), max(0, min(free, most - used))


def free_of_host() -> int:
    """Bytes that this process can still take: what the system has available, and its control groups leave it. 0 when
    nothing is known."""
    found = [each for each in (_available(), _left_of_cgroups()) if each is not None]
    return min(found) if found else 0


def _available() -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _left_of_cgroups() -> int | None:
    """The least that any memory group of this process has left, the second version's or the first's; groups above limit
    too. Files in the page cache count as free: they go when room is needed."""
    left: list[int] = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0" and not controllers:
                left += _left(_CGROUP, path, "memory.max", "memory.current")
            elif "memory" in controllers.split(","):
                left += _left(_CGROUP / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes")
    return min(left) if left else None


def _left(root: Path, path: str, most: str, used: str) -> list[int]:
    """Of the group and of those above it; in a container the group's own path may not be there, its root is."""
    found = []
    parts = [each for each in path.split("/") if each]
    for count in range(len(parts), -1, -1):
        folder = root.joinpath(*parts[:count])
        with contextlib.suppress(OSError, ValueError):
            bound = int((folder / most).read_text())
            if bound < _UNLIMITED:
                found.append(max(bound - int((folder / used).read_text()) + _cached(folder), 0))
    return found


def _cached(folder: Path) -> int:
    """Bytes of files in the page cache that a group could give back."""
    with contextlib.suppress(OSError, ValueError):
        numbers = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int(numbers.get("total_inactive_file", numbers.get("inactive_file", "0")))
    return 0
