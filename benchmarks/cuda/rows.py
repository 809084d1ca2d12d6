"""The rows of a cell, and the tokenizer that makes every word one token."""

import random
from pathlib import Path

from benchmarks.cuda.cells import Cell
from benchmarks.engine import workload
from benchmarks.engine.workload import Chat

_SHARE_OF_MEDIAN = 6
"""The median chat has the limit's sixth, as in the work for CPUs."""


def rows(cell: Cell, steps: int, vocabulary: int) -> list[Chat]:
    """Chats for so many optimizer steps; a function of the seed."""
    draw = random.Random(workload.SEED)
    count = cell.rows_per_step * steps
    if cell.kind == "full":
        lengths = [cell.length] * count
    else:
        lengths = [workload.log_normal(draw, cell.length // _SHARE_OF_MEDIAN, cell.length) for _ in range(count)]
    return [workload.chat(draw, length, vocabulary) for length in lengths]


def write(path: Path, chats: list[Chat], *, ordered: bool) -> None:
    """JSONL; from the longest to the shortest if `ordered`, as peers get them that group by length."""
    workload.write_rows(path, sorted(chats, key=lambda each: -each.tokens) if ordered else chats)
