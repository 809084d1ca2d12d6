"""Lanes: what a job takes up while it runs, and how many of a kind run at once."""

from collections.abc import Mapping
from enum import StrEnum

from luthier.v1.job_pb2 import JobSpec


class Lane(StrEnum):
    """Jobs of one lane wait for each other; those of another run beside them."""

    DEVICE = "device"
    CPU = "cpu"


_LANE_OF_TASK: Mapping[str, Lane] = {"fine_tune": Lane.DEVICE, "export": Lane.CPU}


def lane_of(spec: JobSpec) -> Lane:
    """The lane that a job of this spec runs in."""
    return _LANE_OF_TASK[spec.WhichOneof("task") or "fine_tune"]


class Slots:
    """The slots of a lane, numbered from 0. Each holds one attempt."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._free = list(range(count))

    @property
    def are_free(self) -> bool:
        """Whether there is one to take."""
        return bool(self._free)

    def take(self) -> int:
        """The lowest free slot, from now on held."""
        return self._free.pop(0)

    def hold(self, slot: int) -> None:
        """Marks a slot as held by an attempt that an earlier server began, which may have had more slots."""
        if slot in self._free:
            self._free.remove(slot)

    def give_back(self, slot: int) -> None:
        """Frees a slot, if it is one of this server's."""
        if slot < self._count and slot not in self._free:
            self._free.append(slot)
            self._free.sort()
