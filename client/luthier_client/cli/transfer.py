"""A bar for what takes longer than two seconds, on stderr."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from luthier.v1.datasets_pb2 import TransferProgress

_PATIENCE = 2.0

Report = Callable[[int, int], None]
"""Takes (done, in all); in all is 0 when nobody knows."""


class Phases:
    """One bar after the other, each for something else that is counted."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._started = time.monotonic()
        self._shown: tuple[str, str] | None = None
        self._update: Report = lambda done, total: None

    def phase(self, verb: str, unit: str = "bytes") -> Report:
        """A function that tells how far it is; a terminal shows a bar once all has taken a while."""
        return lambda done, total: self._report(verb, unit, done, total)

    def transfer(self, verb: str) -> "Callable[[TransferProgress], None]":
        """The same for what the server tells about itself."""
        return lambda told: self._report(verb, told.unit, told.completed, told.total)

    def _report(self, verb: str, unit: str, done: int, total: int) -> None:
        if self._shown != (verb, unit):
            if time.monotonic() - self._started < _PATIENCE or not sys.stderr.isatty():
                return
            self._stack.close()
            self._update = self._stack.enter_context(_bar(verb, unit, done))
            self._shown = verb, unit
        self._update(done, total)


@contextlib.contextmanager
def phases() -> Iterator[Phases]:
    """The bars of one command."""
    with contextlib.ExitStack() as stack:
        yield Phases(stack)


@contextlib.contextmanager
def progress(verb: str) -> Iterator[Report]:
    """Yields a function that takes (bytes done, bytes in all)."""
    with phases() as bars:
        yield bars.phase(verb)


@contextlib.contextmanager
def _bar(verb: str, unit: str, done: int) -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from luthier_client.cli import output

    counts: list[ProgressColumn] = (
        [DownloadColumn(), TransferSpeedColumn()]
        if unit == "bytes"
        else [MofNCompleteColumn(), TextColumn(output.one_line(unit, 20), markup=False)]
    )
    columns: list[Any] = [TextColumn(verb), BarColumn(), *counts, TimeRemainingColumn()]
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        # What was there before is no speed of this transfer.
        task = bar.add_task(verb, total=None, completed=done)
        yield lambda done, total: bar.update(task, completed=done, total=total or None)
