"""How much memory there is."""

import contextlib
from pathlib import Path

import torch

from luthier.trainer.v1.task_pb2 import TrainerTask

SHARE, _DEVICE_SHARE = 0.92, 0.94
"""What training may plan with of what there is, and on CUDA of what is free now: the rest is for the page cache, other
processes, and for what allocators cannot use."""

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
    return int(free_of_host() * SHARE)


def ceiling(device: torch.device, task: TrainerTask) -> int:
    """What `limit` would be if nobody else used the device: what does not fit below may fit later. 0 when unknown."""
    if task.memory_limit_bytes > 0:
        return int(task.memory_limit_bytes)
    return int(total_memory(device)[0] * SHARE)


def total_memory(device: torch.device) -> tuple[int, int]:
    """(bytes that the device has, of those free now); of a CPU the host's, and no more than its control groups allow. 0
    when unknown."""
    if device.type == "cuda":
        try:
            free, total = torch.cuda.mem_get_info(device)
        except RuntimeError:  # jobs leave no room to ask it
            return 0, 0
        return total, free
    bounds = [bound for bound, _ in _control_groups()]
    return min([*bounds, *_meminfo("MemTotal")], default=0), free_of_host()


def free_of_host() -> int:
    """Bytes that this process can still take: what the system has available, and its control groups leave it. 0 when
    nothing is known."""
    left = [each for _, each in _control_groups()]
    return min([*left, *_meminfo("MemAvailable")], default=0)


def _meminfo(name: str) -> list[int]:
    """The amount of that name in bytes, or none."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return [int(line.split()[1]) * 1024]
    return []


def _control_groups() -> list[tuple[int, int]]:
    """(the most, what is left of it) of each memory group of this process that has a limit, the second version's or the
    first's; groups above limit too. Files in the page cache count as left: they go when room is needed."""
    found: list[tuple[int, int]] = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0" and not controllers:
                found += _limited(_CGROUP, path, "memory.max", "memory.current")
            elif "memory" in controllers.split(","):
                found += _limited(_CGROUP / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes")
    return found


def _limited(root: Path, path: str, most: str, used: str) -> list[tuple[int, int]]:
    """Of the group and of those above it; in a container the group's own path may not be there, its root is."""
    found = []
    parts = [each for each in path.split("/") if each]
    for count in range(len(parts), -1, -1):
        folder = root.joinpath(*parts[:count])
        with contextlib.suppress(OSError, ValueError):
            bound = int((folder / most).read_text())
            if bound < _UNLIMITED:
                left = bound - int((folder / used).read_text()) + _cached(folder)
                found.append((bound, max(left, 0)))
    return found


def _cached(folder: Path) -> int:
    """Bytes of files in the page cache that a group could give back."""
    with contextlib.suppress(OSError, ValueError):
        numbers = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int(numbers.get("total_inactive_file", numbers.get("inactive_file", "0")))
    return 0
