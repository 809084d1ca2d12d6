"""The most memory that processes take for themselves while something runs, in MB, shared pages not counted."""

import threading
from types import TracebackType
from typing import Self

from benchmarks.daemon import memory_mib

_EVERY = 0.05


class Peak:
    """Looks at processes all the time, for a `with` block. most: by the name of each, in MB (10^6 bytes)."""

    def __init__(self, **pids: int) -> None:
        self.most = dict.fromkeys(pids, 0.0)
        self.first = {name: _own_mb(pid) for name, pid in pids.items()}
        self._pids = pids
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(_EVERY):
            for name, pid in self._pids.items():
                self.most[name] = max(self.most[name], _own_mb(pid))


def _own_mb(pid: int) -> float:
    """0 for a process that is gone."""
    try:
        return memory_mib(pid)["uss"] * 1.048576
    except (OSError, KeyError, ValueError):
        return 0.0
