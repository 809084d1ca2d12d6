"""A bar for transfers that take longer than two seconds, on stderr."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

_PATIENCE = 2.0


@contextlib.contextmanager
def progress(verb: str) -> Iterator[Callable[[int, int], None]]:
    """Yields a function that takes (bytes done, bytes in all); a terminal shows a bar once it has taken a while."""
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        update: Callable[[int, int], None] | None = None

        def report(done: int, total: int) -> None:
            nonlocal update
            if update is None:
                if time.monotonic() - started < _PATIENCE or not sys.stderr.isatty():
                    return
                update = stack.enter_context(_bar(verb))
            update(done, total)

        yield report


@contextlib.contextmanager
def _bar(verb: str) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(verb), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(verb, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
