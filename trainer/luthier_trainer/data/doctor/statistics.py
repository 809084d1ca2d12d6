"""What the rows of a dataset are made of, counted as they pass."""

from collections import Counter

from luthier.v1 import dataset_report_pb2
from luthier_trainer.data.doctor.texts import conversations, serialized
from luthier_trainer.data.problem import Level, Problem
from luthier_trainer.data.records import Conversation, ImagePart, Record, Text, TextPart

_SMALLEST = 4
"""The first bucket is of rows up to 2**_SMALLEST characters."""
_FAR = 4
"""A row is very long when it is over 2**_FAR times as long as the median row,"""
_LONG = 13
"""and over 2**_LONG characters."""


class Statistics:
    """Counts rows, turns and characters. A row's length is all its text, tool calls as JSON."""

    def __init__(self) -> None:
        self._rows = 0
        self._roles: dict[str, list[int]] = {}  # turns and characters
        self._images = 0
        self._rows_with_tools = 0
        self._lengths: Counter[int] = Counter()  # by the exponent of the bucket
        self._longest = 0, 0  # characters, and the line

    def add(self, line: int, record: Record) -> None:
        """Counts one row."""
        length = 0
        if isinstance(record, Text):
            length = len(record.text)
            self._tally("text")[1] += length
        else:
            self._rows_with_tools += bool(record.tools)
            for _, conversation in conversations(record):
                length += self._conversation(conversation)
        self._rows += 1
        self._lengths[max((length - 1).bit_length(), _SMALLEST) if length else _SMALLEST] += 1
        if length > self._longest[0]:
            self._longest = length, line

    def _conversation(self, conversation: Conversation) -> int:
        length = 0
        for turn in conversation:
            content = turn["content"]
            size = len(content) if isinstance(content, str) else self._parts(content)
            if "tool_calls" in turn:
                size += len(serialized(turn["tool_calls"]))
            tally = self._tally(turn["role"])
            tally[0] += 1
            tally[1] += size
            length += size
        return length

    def _parts(self, parts: list[TextPart | ImagePart]) -> int:
        size = 0
        for part in parts:
            if part["type"] == "text":
                size += len(part["text"])  # type: ignore[typeddict-item]
            else:
                self._images += 1
        return size

    def _tally(self, role: str) -> list[int]:
        tally = self._roles.get(role)
        if tally is None:
            tally = self._roles[role] = [0, 0]
        return tally

    def outliers(self) -> tuple[int, Problem] | None:
        """The longest row's line and what is to be said about the very long ones, if there are any."""
        median, below = 0, 0
        for median in sorted(self._lengths):
            below += self._lengths[median]
            if 2 * below >= self._rows:
                break
        limit = max(median + _FAR, _LONG)
        count = sum(rows for exponent, rows in self._lengths.items() if exponent > limit)
        if not count:
            return None
        length, line = self._longest
        others = f" {count} rows are that long." if count > 1 else ""
        message = (
            f"The row has {length:,} characters, more than {2 ** (limit - median)} times as many as half of the rows "
            f"have.{others}"
        )
        fix = "See whether it is one row: a long row costs memory, and is cut where a job's max_length ends."
        return line, Problem("LONG_ROW", message, fix, Level.NOTE)

    def report(self) -> dataset_report_pb2.DatasetStatistics:
        """The numbers so far; no bucket between the first and the last is left out."""
        exponents = range(min(self._lengths), max(self._lengths) + 1) if self._lengths else ()
        return dataset_report_pb2.DatasetStatistics(
            rows=self._rows,
            turns={role: turns for role, (turns, _) in self._roles.items() if turns},
            characters={role: characters for role, (_, characters) in self._roles.items()},
            images=self._images,
            rows_with_tools=self._rows_with_tools,
            lengths=[
                dataset_report_pb2.LengthBucket(up_to=2**exponent, rows=self._lengths[exponent])
                for exponent in exponents
            ],
        )
