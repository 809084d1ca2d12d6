"""Control: what a running trainer is asked for."""

import signal
import time
from pathlib import Path
from types import FrameType
from typing import Protocol

from luthier.trainer import attempt
from luthier.trainer.v1 import task_pb2
from luthier.trainer.v1.task_pb2 import ControlAction

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Control(Protocol):
    """Read between micro-batches; cheap."""

    def requested(self) -> ControlAction.ValueType:
        """What is wanted now; CONTROL_ACTION_UNSPECIFIED to go on. A pause may become a cancel later."""


class NoControl:
    """For training in the caller's own process: nobody asks for anything."""

    def requested(self) -> ControlAction.ValueType:
        return task_pb2.CONTROL_ACTION_UNSPECIFIED


class FileControl:
    """Reads the attempt's `control` file: at once after SIGTERM or SIGUSR1, else every `interval` seconds at most.

    SIGTERM without a control file is a PREEMPT: somebody wants the process gone and did not say why.
    """

    def __init__(self, attempt_dir: Path, interval: float = 0.5) -> None:
        self._path = attempt_dir / attempt.CONTROL
        self._interval = interval
        self._next_look = 0.0
        self._identity: tuple[int, int] | None = None
        self._action: ControlAction.ValueType = task_pb2.CONTROL_ACTION_UNSPECIFIED
        self._signalled = False
        self._terminated = False

    def install(self) -> None:
        """Takes the signals over, in the main thread, and unblocks them: the host forks trainers with them blocked, so
        that none is lost before this."""
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    def requested(self) -> ControlAction.ValueType:
        now = time.monotonic()
        if self._signalled or now >= self._next_look:
            self._signalled = False  # before the look: a signal during it asks for another one
            self._next_look = now + self._interval
            self._look()
        if self._terminated and self._action == task_pb2.CONTROL_ACTION_UNSPECIFIED:
            return task_pb2.CONTROL_ACTION_PREEMPT
        return self._action

    def _look(self) -> None:
        try:
            status = self._path.stat()
            identity = (status.st_ino, status.st_mtime_ns)
            if identity != self._identity:
                self._action = task_pb2.TrainerControl.FromString(self._path.read_bytes()).action
                self._identity = identity
        except FileNotFoundError:
            return

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            self._terminated = True
        self._signalled = True
