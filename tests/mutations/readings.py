"""Readings that do not fit: formats that the file has not, columns that are not there."""

from collections.abc import Sequence
from random import Random
from typing import Any

from mutations.bases import pick
from mutations.mutant import File

from luthier.v1.dataset_pb2 import DatasetFormat, DatasetReading, FileFormat


def formats(random: Random) -> File:
    """A file that is said to be another one."""
    name, content = pick(random)
    reading = DatasetReading()
    if random.random() < 0.7:
        reading.file_format = _any(random, FileFormat.values())
    if random.random() < 0.7:
        reading.format = _any(random, DatasetFormat.values())
    return File(name, content, reading)


def columns(random: Random) -> File:
    """Columns that are mapped to what is not there, to each other, to names of any kind."""
    name, content = pick(random)
    mapped = {random.choice(_FIELDS): random.choice(_COLUMNS) for _ in range(random.choice((1, 2, 5, 40)))}
    reading = DatasetReading(columns=mapped)
    if random.random() < 0.4:
        reading.format = random.choice(DatasetFormat.values())
    return File(name, content, reading)


_FIELDS = (
    *("messages", "prompt", "completion", "text", "chosen", "rejected", "label", "images", "tools", "system", "weight"),
    *("question", "", "x" * 64, "x" * 65, "\0", "__class__", "a.b", "prompt ", "Prompt", *map(str, range(40))),
)
_COLUMNS = (
    "messages",
    "question",
    "answer",
    "prompt",
    "text",
    "completion",
    "",
    "nowhere",
    "c" * 256,
    "c" * 257,
    "\0",
    "é",
    "0",
)


def _any(random: Random, known: Sequence[int]) -> Any:
    return random.choice([*known, *known, 99, -1])
