"""What a person sees while it runs: progress on one line where there is a terminal, tables below each other."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


def say(text: str = "") -> None:
    """A line."""
    print(text, flush=True)


@contextmanager
def step(text: str) -> Iterator[None]:
    """Tells what is being measured, and how long it took."""
    start = time.perf_counter()
    terminal = sys.stdout.isatty()
    print(f"  {text} ...", end="" if terminal else "\n", flush=True)
    try:
        yield
    finally:
        seconds = time.perf_counter() - start
        if terminal:
            print(f"\r  {text}: {seconds:.1f} s\033[K", flush=True)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, ["-" * width for width in widths], *rows):
        first = row[0].ljust(widths[0])
        say("  " + "  ".join([first, *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]))
    say()
