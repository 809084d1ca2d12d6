"""What the server and the processes that it starts take of memory for themselves, looked at all the time."""

import re
import threading
from pathlib import Path

_EVERY = 0.08
_OWN = re.compile(rb"^Private_(?:Clean|Dirty): +(\d+) kB", re.MULTILINE)
_FILE = re.compile(rb"([0-9a-f]{64})\.part\0?$")


class Watch:
    """Watches a server and its descendants from a thread of its own. MiB, shared pages not counted."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._checks: dict[str, float] = {}
        self._names: dict[int, str] = {}
        self.most_server_mib = 0.0
        self.most_check_mib = 0.0
        self.most_other_mib = 0.0

    def start(self) -> "Watch":
        """Begins."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """Ends."""
        self._stopped.set()
        self._thread.join()

    def most_of(self, sha256: str) -> float:
        """The most that a check of the upload of that hash took; forgets it."""
        return self._checks.pop(sha256, 0.0)

    def _run(self) -> None:
        while not self._stopped.wait(_EVERY):
            self.most_server_mib = max(self.most_server_mib, own_mib(self._pid))
            below = _children(self._pid)
            alive = {}
            while below:
                pid = below.pop()
                below += _children(pid)
                name = self._names.get(pid) or _checked(pid)
                alive[pid] = name
                taken = own_mib(pid)
                if name:
                    self._checks[name] = max(self._checks.get(name, 0.0), taken)
                    self.most_check_mib = max(self.most_check_mib, taken)
                else:
                    self.most_other_mib = max(self.most_other_mib, taken)
            self._names = alive


def own_mib(pid: int) -> float:
    """Memory that a process shares with nobody, 0 when it is gone."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_bytes()
    except OSError:
        return 0.0
    return sum(map(int, _OWN.findall(text))) / 1024


def _children(pid: int) -> list[int]:
    found: list[int] = []
    try:
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            found += map(int, path.read_text().split())
    except OSError:
        pass  # it is gone, or a thread of it
    return found


def _checked(pid: int) -> str:
    """The hash of the file that a process checks; empty for any other process."""
    try:
        found = _FILE.search(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return ""
    return found[1].decode() if found else ""
