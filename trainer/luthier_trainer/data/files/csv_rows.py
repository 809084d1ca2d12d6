"""Rows of CSV: a header and one row a record, cells separated by comma, semicolon or tab. Every value is text.

Quoting is that of RFC 4180: a cell in double quotes may hold separators, line breaks and quotes written twice.
"""

import codecs
import csv
import io
from collections.abc import Iterator, Mapping
from typing import BinaryIO

from luthier_trainer.data.files.columns import missing
from luthier_trainer.data.files.json_problems import not_utf8
from luthier_trainer.data.files.json_rows import skipped_blank_lines, too_long
from luthier_trainer.data.files.row import Row, Unreadable, mebibytes, shown
from luthier_trainer.data.problem import Problem

MAX_COLUMNS = 4096

_DELIMITERS = ",;\t"
_NAMES = {",": "comma", ";": "semicolon", "\t": "tab"}
_MAX_NAME = 256
_SNIFFED = 20
_CHUNK = 1024 * 1024
_BLANK_LINES = 1000
_QUOTES = "Put a cell that holds a separator, a line break or a quote into double quotes, and write quotes in it twice."


def delimiter_of(head: bytes) -> str | None:
    """What separates the cells of a CSV file that begins so: what gives the first record the most cells, and of equals
    what the next records agree with most. None where the first record has one cell only, cannot be a header, or is not
    like any of the next ones."""
    best = ""
    most = (1, 0)
    for delimiter in _DELIMITERS:
        records = _first_records(head, delimiter)
        if not records or not _may_be_header(records[0]):
            continue
        width = len(records[0])
        found = (width, sum(len(record) == width for record in records))
        if width > 1 and found > most and (found[1] > 1 or len(records) == 1):
            best, most = delimiter, found
    return best or None


def only_column_of(head: bytes) -> str | None:
    """The name of a CSV file's column where it can have one only."""
    records = _first_records(head, ",")
    return records[0][0].strip() if records and len(records[0]) == 1 and _may_be_header(records[0]) else None


def csv_rows(file: BinaryIO, head: bytes, max_record: int, columns: Mapping[str, str]) -> Iterator[Row]:
    """The rows of CSV; blank lines are none. head: what the file begins with; max_record: bytes. Columns without a name
    are left out, and so are empty cells beyond the last one. Yields nothing after a header that does not do."""
    delimiter = delimiter_of(head) or ","
    lines = _Lines(file, max_record)
    # The limit is one for the whole process, and is only ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), max_record))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    names: list[str] | None = None
    while True:
        line = lines.begin_record()
        found: list[str] | Problem
        try:
            found = next(reader)
        except StopIteration:
            return
        except Unreadable as error:
            if not lines.is_alive:
                raise
            found = error.problem
        except csv.Error as error:
            found = _bad_quotes(str(error), lines.at_end)
        if lines.problem is not None:
            found = lines.problem
        if names is None:
            if isinstance(found, list) and not any(cell.strip() for cell in found):
                continue
            header = found if isinstance(found, Problem) else _header(found)
            if isinstance(header, Problem):
                yield Row(line, header)
                return
            names = header
            if problem := missing(columns, names):
                yield Row(0, problem)
                return
        elif isinstance(found, Problem):
            yield Row(line, found)
        elif found:
            yield Row(line, _row(names, found, delimiter))


def _row(names: list[str], cells: list[str], delimiter: str) -> dict[str, object] | Problem:
    if len(cells) < len(names) or any(cells[len(names) :]):
        message = f"The record has {_count(len(cells))}, the header {len(names)} (separator: {_NAMES[delimiter]})."
        return Problem("WRONG_CELL_COUNT", message, _QUOTES)
    return {name: cell for name, cell in zip(names, cells, strict=False) if name}


def _count(cells: int) -> str:
    return "1 cell" if cells == 1 else f"{cells:,} cells"


def _header(cells: list[str]) -> list[str] | Problem:
    names = [cell.strip() for cell in cells]
    while names and not names[-1]:
        names.pop()
    if len(names) > MAX_COLUMNS:
        return Problem("BAD_HEADER", f"The header has {len(names):,} columns; {MAX_COLUMNS:,} are the most.")
    if any(len(name) > _MAX_NAME for name in names):
        message = f"The header has a cell of more than {_MAX_NAME} characters; the first line must name the columns."
        return Problem("BAD_HEADER", message)
    given = [name for name in names if name]
    for name in given:
        if given.count(name) > 1:
            return Problem("BAD_HEADER", f"The header names the column {shown(name)} twice.", "Rename one of them.")
    return names


def _may_be_header(cells: list[str]) -> bool:
    names = [cell.strip() for cell in cells]
    return (
        len(names) <= MAX_COLUMNS
        and any(names)
        and all(
            len(name) <= _MAX_NAME and (name.isprintable() or name.replace("\n", "").isprintable()) for name in names
        )
    )


def _first_records(head: bytes, delimiter: str) -> list[list[str]]:
    """The first records of a head; the last one may be cut off, and is left out when there are others."""
    text = head.removeprefix(codecs.BOM_UTF8).decode(errors="replace").lstrip("\r\n")
    records: list[list[str]] = []
    try:
        for record in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter):
            if record:
                records.append(record)
            if len(records) > _SNIFFED:
                break
    except csv.Error:
        pass
    return records[: max(1, len(records) - 1)]


def _bad_quotes(what: str, at_end: bool) -> Problem:
    if at_end and "end of data" in what:
        return Problem("NOT_CSV", "A quote opens in the record that begins here, and is not closed.", _QUOTES)
    if "new-line character" in what:
        message = "A carriage return stands alone in the record."
        return Problem("NOT_CSV", message, "Save the file with the line ends of Unix or Windows.")
    return Problem("NOT_CSV", f"The record is not CSV: {what}.", _QUOTES)


class _Lines:
    """The lines of a file as text, for one record after the other.

    A record that is too long raises Unreadable, and the next one can be read (is_alive). problem: why the record, which
    was read to its end, is not text.
    """

    def __init__(self, file: BinaryIO, max_record: int) -> None:
        self._file = file
        self._max = max_record
        self._size = 0
        self._number = 0
        self._record = 0
        self._blank = 0
        self._is_blank = False
        self.problem: Problem | None = None
        self.is_alive = True
        self.at_end = False

    def begin_record(self) -> int:
        """Begins a record; returns the number of the line that it begins on."""
        if self._number == self._record + 1 and self._is_blank:
            self._blank += 1
            if self._blank % _BLANK_LINES == 0:
                self._number += skipped_blank_lines(self._file)
        self._record = self._number
        self._size = 0
        self.problem = None
        return self._number + 1

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self.is_alive = False
        line = self._file.readline(self._max + 1)
        self.is_alive = True
        if not line:
            self.at_end = True
            raise StopIteration
        self._number += 1
        if self._number == 1:
            line = line.removeprefix(codecs.BOM_UTF8) or b"\n"
        self._is_blank = line.isspace()
        self._size += len(line)
        if self._size > self._max:
            self._skip_rest(line)
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            if self.problem is None:
                self.problem = not_utf8(f"Line {self._number}", line[error.start])
            return line.decode(errors="replace")

    def _skip_rest(self, line: bytes) -> None:
        if self._size > len(line):
            message = f"The record is longer than {mebibytes(self._max)}: a quote opens in it and is not closed."
            raise Unreadable(Problem("NOT_CSV", message, _QUOTES))
        while line and not line.endswith(b"\n"):
            line = self._file.readline(_CHUNK)
        raise Unreadable(too_long("record", self._max))
