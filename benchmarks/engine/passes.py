"""One pass over the rows, as it was measured."""

import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.engine import memory


@dataclass(frozen=True)
class Products:
    """GFLOP of large matrix products a second, and a second of processor time (all threads)."""

    per_second: float
    per_cpu_second: float


@dataclass(frozen=True)
class Pass:
    """seconds and cpu_seconds: from the end of the set-up to the end of the last step, and the processor time of all
    threads in them; other_cores: how many cores were busy with other processes in that time; tokens: real ones,
    padding not counted; scored: those in the loss; loss: the mean of the steps'; dtype: what was computed in.
    peak_resident: the most bytes that the process had resident in that time; loaded_resident: those that it had when it
    had imported everything, and no model; 0 where the system does not tell."""

    seconds: float
    cpu_seconds: float
    other_cores: float
    tokens: int
    scored: int
    steps: int
    loss: float
    dtype: str
    peak_resident: int = 0
    loaded_resident: int = 0

    @property
    def peak_bytes(self) -> int:
        """What the pass took at its most beside what the loaded process had; 0 when it is not known."""
        return self.peak_resident - self.loaded_resident if self.peak_resident and self.loaded_resident else 0

    @property
    def tokens_per_second(self) -> float:
        """Real tokens a second."""
        return self.tokens / self.seconds


class Stopwatch:
    """The clock, this process's processor time and the machine's, between `start` and the last `lap`, and the most
    memory that was resident meanwhile."""

    def __init__(self) -> None:
        self._begin = self._end = (0.0, 0.0, 0.0)
        self._peak = 0

    def start(self) -> None:
        """The set-up is over."""
        memory.forget_peak()
        self._begin = self._end = _now()

    def lap(self) -> None:
        """A step is over."""
        self._end = _now()
        self._peak = memory.peak()

    @property
    def times(self) -> dict[str, Any]:
        """The first three fields of a Pass, and `peak_resident`."""
        seconds, own, busy = (end - begin for begin, end in zip(self._begin, self._end, strict=True))
        return {
            "seconds": seconds,
            "cpu_seconds": own,
            "other_cores": max(busy - own, 0.0) / seconds,
            "peak_resident": self._peak,
        }


def _now() -> tuple[float, float, float]:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter(), usage.ru_utime + usage.ru_stime, _busy_seconds()


def _busy_seconds() -> float:
    """Processor time of all processes of the machine so far, with what its host took away; 0 where it cannot be
    known."""
    try:
        line = Path("/proc/stat").read_text().partition("\n")[0]
    except OSError:
        return 0.0
    user, nice, system, _idle, _waiting, *interrupts_and_stolen = map(int, line.split()[1:9])
    return (user + nice + system + sum(interrupts_and_stolen)) / os.sysconf("SC_CLK_TCK")
