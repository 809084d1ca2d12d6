"""A row of a dataset's file, as every reader yields it."""

import json
from dataclasses import dataclass

from luthier_trainer.data.problem import Problem


@dataclass(frozen=True, slots=True)
class Row:
    """One row. line: from 1, the line of JSONL and CSV (the first one of a record), the element of an array, the row of
    a table; 0 stands for the whole file."""

    line: int
    value: dict[str, object] | Problem


class Unreadable(Exception):
    """Raised by readers: the file cannot be read from here on, or not at all; the problem says why."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def shown(text: str, limit: int = 40) -> str:
    """A piece of somebody's data for a message: short, on one line, encodable."""
    short = text if len(text) <= limit else text[: limit - 3] + "..."
    return json.dumps(short, ensure_ascii=not short.isprintable())


def mebibytes(size: int) -> str:
    """A size for a message: `16 MiB`."""
    return f"{size / 1024**2:,.0f} MiB" if size < 10 * 1024**3 else f"{size / 1024**3:,.0f} GiB"
