"""What is told on stderr of anything that takes longer than two seconds: a bar where something is counted, else the
time that has passed. Drawn by a clock, so that a silent server is seen as well; nothing where stderr is no terminal.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.progress import Progress

    from luthier.v1.datasets_pb2 import TransferProgress

_PATIENCE = 2.0
RESUMED = "interrupted: give the command again, and the upload goes on where it was"

Report = Callable[[int, int], None]
"""Takes (done, in all); in all is 0 when nobody knows."""


class Phases:
    """One line after the other on a terminal, from two seconds after the first. Any thread may report."""

    def __init__(self, waiting: str) -> None:
        self._lock = threading.Lock()
        self._closed = False
        self._bar: Progress | None = None
        # What goes on and what is counted of it; no unit means that nothing is.
        self._verb, self._unit = waiting, ""
        self._done = self._total = self._first = 0
        self._since = time.monotonic()
        self._clock = threading.Timer(_PATIENCE, self._show)
        self._clock.daemon = True
        if sys.stderr.isatty():
            self._clock.start()

    def phase(self, verb: str, unit: str = "bytes", *, then: str = "waiting for the server") -> Report:
        """A function that tells how far it is; once all is done, `then` goes on."""
        return lambda done, total: self._report(verb, unit, done, total, then)

    def transfer(self, verb: str, *, then: str = "waiting for the server") -> "Callable[[TransferProgress], None]":
        """The same for what the server tells about itself."""
        return lambda told: self._report(verb, told.unit or "bytes", told.completed, told.total, then)

    def close(self) -> None:
        """Takes away what is shown."""
        self._clock.cancel()
        with self._lock:
            self._closed = True
            self._hide()

    def _report(self, verb: str, unit: str, done: int, total: int, then: str) -> None:
        if total and done >= total:
            verb, unit = then, ""
        with self._lock:
            if (verb, unit) == (self._verb, self._unit):
                self._done, self._total = done, total
                if self._bar is not None and unit:
                    self._bar.update(self._bar.task_ids[0], completed=done, total=total or None)
                return
            self._verb, self._unit, self._since = verb, unit, time.monotonic()
            self._done, self._total, self._first = done, total, done
            if self._bar is not None:
                self._hide()
                self._draw()

    def _show(self) -> None:
        with self._lock:
            if not self._closed:
                self._draw()

    def _hide(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _draw(self) -> None:
        self._bar = _bar(self._verb, self._unit)
        # What was there before is no speed of this transfer.
        task = self._bar.add_task(self._verb, total=None, completed=self._first)
        self._bar.tasks[0].start_time = self._since
        if self._unit:
            self._bar.update(task, completed=self._done, total=self._total or None)
        self._bar.start()


@contextlib.contextmanager
def phases(waiting: str = "waiting for the server", *, interrupted: str = "interrupted") -> Iterator[Phases]:
    """What one command tells: `waiting` goes on until something is reported; `interrupted` is said after Ctrl-C."""
    told = Phases(waiting)
    try:
        yield told
    except KeyboardInterrupt:
        told.close()
        click.echo(interrupted, err=True)
        raise
    finally:
        told.close()


@contextlib.contextmanager
def progress(verb: str) -> Iterator[Report]:
    """Yields a function that takes (bytes done, bytes in all)."""
    with phases() as bars:
        yield bars.phase(verb)


def _bar(verb: str, unit: str) -> "Progress":
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from luthier_client.cli import output

    name = TextColumn(verb, markup=False)
    columns: list[ProgressColumn]
    if not unit:
        columns = [SpinnerColumn("line"), name, TimeElapsedColumn()]
    elif unit == "bytes":
        columns = [name, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()]
    else:
        counted = TextColumn(output.one_line(unit, 20), markup=False)
        columns = [name, BarColumn(), MofNCompleteColumn(), counted, TimeRemainingColumn()]
    given: list[Any] = list(columns)
    return Progress(*given, console=Console(stderr=True), transient=True, get_time=time.monotonic)
