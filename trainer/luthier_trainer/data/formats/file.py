"""The records of a file, in the memory of one row."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from luthier_trainer.data.files.rows import RowFile, open_rows
from luthier_trainer.data.formats.convert import convert
from luthier_trainer.data.formats.detect import detect
from luthier_trainer.data.formats.images import missing
from luthier_trainer.data.formats.unknown import fix, unknown
from luthier_trainer.data.problem import Problem
from luthier_trainer.data.reading import Format, Reading
from luthier_trainer.data.records import Record, Text

# Looking for near names takes longer than reading a row.
_GUESSES = 1000


class Records:
    """The records of an open file.

    reading: how the file is read; its file_format is decided, its format once a row has told it (and stays None when
    none did).
    """

    def __init__(self, file: RowFile, reading: Reading) -> None:
        self.reading = dataclasses.replace(reading, file_format=file.file_format)
        self._named = reading.format
        self._file = file
        self._guesses = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, trace)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __iter__(self) -> Iterator[tuple[int, Record | Problem, dict[str, object] | None]]:
        """Yields (line, record or what is wrong, the row or None when it cannot be read), in the file's order.

        The first row whose format is known decides for the file, unless the reading names one. A file without rows
        yields one Problem, EMPTY_FILE, at line 0.
        """
        empty = True
        for row in self._file:
            empty = False
            value = row.value
            if isinstance(value, Problem):
                yield row.line, value, None
            else:
                yield row.line, self.record(value), value
        if empty:
            yield 0, Problem("EMPTY_FILE", "The file has no rows."), None

    def record(self, row: dict[str, object]) -> Record | Problem:
        """The record of a row of the file, or what is wrong with it. Unless the reading names a format, it depends on
        the rows before."""
        row_format = self._named or detect(row)
        decided = self.reading.format
        if decided is None:
            if row_format is None:
                return unknown(row, guess=self._may_guess())
            decided = row_format
            self.reading = dataclasses.replace(self.reading, format=decided)
        elif row_format is not decided and row_format is not None and not _is_badly_labelled(row, decided):
            return _mixed(row_format, decided)
        record = convert(row, decided)
        if isinstance(record, Problem):
            if record.code != "MISSING_FIELD":
                return record
            return self._explained(record, row) if row_format else unknown(row, guess=self._may_guess())
        if not isinstance(record, Text) and (problem := missing(record, self._file.has_image)) is not None:
            return problem
        return record

    def _explained(self, problem: Problem, row: dict[str, object]) -> Problem:
        """The problem of a field that the format needs, with the column that may hold it."""
        if not self._may_guess():
            return problem
        return dataclasses.replace(problem, fix=fix(row, problem.fix))

    def _may_guess(self) -> bool:
        self._guesses += 1
        return self._guesses <= _GUESSES


def records(path: Path, reading: Reading | None = None) -> Records:
    """Opens the records of a file, to be used in `with`. Raises OSError when the file cannot be read."""
    reading = reading or Reading()
    return Records(open_rows(path, reading), reading)


def _is_badly_labelled(row: dict[str, object], decided: Format) -> bool:
    """Whether the row only looks like another format because its label says neither true nor false."""
    return decided is Format.UNPAIRED_PREFERENCE and ("label" in row or "kto_tag" in row)


def _mixed(found: Format, decided: Format) -> Problem:
    return Problem(
        "MIXED_FORMATS",
        f"The row is in the format {found}, the rows before it in {decided}. A file has one format.",
        "Put the rows of each format into a file of their own, or say which one all rows have with --format.",
    )
