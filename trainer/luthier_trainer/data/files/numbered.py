"""The rows of a dataset's file by their number, so that any of them can be read first.

The lines of plain JSONL are found by one scan of the file, and a row is read where it lies. Of any other file the rows
are copied once to an unnamed temporary file: a table, an array or an archive has no place to go to for a single row,
and reading all rows takes a small part of the time that tokenising them does.
"""

import codecs
import contextlib
import pickle
import tempfile
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, Protocol

from luthier_trainer.data.files.columns import renamed
from luthier_trainer.data.files.detection import Kind, kind_of
from luthier_trainer.data.files.json_rows import json_object
from luthier_trainer.data.files.row import Row
from luthier_trainer.data.files.rows import MAX_LINE_BYTES, open_rows
from luthier_trainer.data.problem import Level, Problem
from luthier_trainer.data.reading import FileFormat, Reading
from luthier_trainer.stop import Check, never

MAX_COPIED_BYTES = 1 << 30
_HEAD = 1024 * 1024


class NumberedRows(Protocol):
    """Rows in the order of their file, from 0."""

    def __len__(self) -> int: ...

    def row(self, number: int) -> Row:
        """The row as `RowFile` yields it. Raises IndexError; OSError when the file cannot be read."""
        ...

    def close(self) -> None:
        """Closes the file."""
        ...


def numbered_rows(path: Path, reading: Reading, check: Check = never) -> NumberedRows | None:
    """The rows of a file; None for one that is in error as a whole, or whose copy would take more than
    MAX_COPIED_BYTES, or more room than there is. `check` is called for each row and ends the work with what it raises.

    Raises OSError when the file cannot be read."""
    if reading.file_format is FileFormat.JSONL:
        with open(path, "rb") as file:
            plain = kind_of(file.read(_HEAD)) is Kind.TEXT
        if plain:
            return _lines(path, reading.columns, check)
    return _copied(path, reading, check)


class _Lines:
    """The lines of a JSONL file that are not blank, by where they begin."""

    def __init__(self, file: BinaryIO, starts: "array[int]", lines: "array[int]", columns: Mapping[str, str]) -> None:
        self._file = file
        self._starts = starts
        self._lines = lines
        self._columns = columns

    def __len__(self) -> int:
        return len(self._starts)

    def row(self, number: int) -> Row:
        line = self._lines[number]
        self._file.seek(self._starts[number])
        text = self._file.readline(MAX_LINE_BYTES + 1)
        row = Row(line, json_object(text.removeprefix(codecs.BOM_UTF8) if line == 1 else text))
        return next(renamed([row], self._columns)) if self._columns else row

    def close(self) -> None:
        self._file.close()


def _lines(path: Path, columns: Mapping[str, str], check: Check) -> _Lines | None:
    """As `json_lines` counts them."""
    starts, lines = array("q"), array("q")
    file = open(path, "rb")  # noqa: SIM115 - the rows close it
    position = number = 0
    while text := file.readline(MAX_LINE_BYTES + 1):
        check()
        number += 1
        content = text.removeprefix(codecs.BOM_UTF8) if number == 1 else text
        if len(text) > MAX_LINE_BYTES:
            file.close()
            return None
        if content and not content.isspace():
            starts.append(position)
            lines.append(number)
        position += len(text)
    return _Lines(file, starts, lines, columns)


class _Copied:
    """Rows that were copied, by where each begins in the copy; `starts` has the end too."""

    def __init__(self, file: BinaryIO, starts: "array[int]") -> None:
        self._file = file
        self._starts = starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    def row(self, number: int) -> Row:
        if not 0 <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        self._file.seek(self._starts[number])
        row: Row = pickle.loads(self._file.read(self._starts[number + 1] - self._starts[number]))  # our own
        return row

    def close(self) -> None:
        self._file.close()


def _copied(path: Path, reading: Reading, check: Check) -> _Copied | None:
    with contextlib.ExitStack() as stack:
        copy: BinaryIO = stack.enter_context(tempfile.TemporaryFile())
        starts = array("q", [0])
        size = 0
        with open_rows(path, reading) as rows:
            for row in rows:
                check()
                if isinstance(row.value, Problem) and not row.line:
                    if row.value.level is Level.ERROR:
                        return None
                    continue  # said of the whole file, and no row
                data = pickle.dumps(row, pickle.HIGHEST_PROTOCOL)
                size += len(data)
                if size > MAX_COPIED_BYTES or not _written(copy, data):
                    return None
                starts.append(size)
        if not _written(copy, b""):
            return None
        stack.pop_all()
    return _Copied(copy, starts)


def _written(copy: BinaryIO, data: bytes) -> bool:
    """Whether there was room. No data: for everything that was written."""
    try:
        copy.write(data)
        if not data:
            copy.flush()
    except OSError:
        return False
    return True
