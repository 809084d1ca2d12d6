"""What an executor does: start trainers and send them signals. It knows directories of attempts, not jobs."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol


class ExecutorError(Exception):
    """A trainer could not be started."""


class Executor(Protocol):
    """Starts trainers. What a trainer does then stands in its spool."""

    async def prepare(self) -> None:
        """Makes ready to start trainers quickly; returns without waiting for it."""

    async def start(self, attempt_dir: Path, secrets: Mapping[str, str]) -> None:
        """Starts a trainer on an attempt that is written. Raises ExecutorError."""

    async def signal(self, attempt_dir: Path, number: int) -> bool:
        """Sends a signal to a trainer's process group; False when there is none here."""

    async def alive(self) -> Collection[str]:
        """Directories of the attempts whose trainers live here."""

    async def close(self) -> None:
        """Lets go of everything that this executor started and that no trainer needs."""
