"""The rows of a dataset's file, whatever it is: JSONL, JSON, CSV, Parquet or Arrow, plain or compressed with gzip or
zstd, or one of these in a zip archive with images.

The bytes tell which of them it is. Rows are read one at a time. What cannot be read is a row with a problem: no file
makes a reader raise, hang, write outside of the temporary directory, or take memory without bound.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from luthier_trainer.data.files.archive import Archive
from luthier_trainer.data.files.columns import renamed
from luthier_trainer.data.files.compressed import BUFFER, ROW_BYTES, most_rows, too_large
from luthier_trainer.data.files.content import Content
from luthier_trainer.data.files.csv_rows import csv_rows
from luthier_trainer.data.files.detection import Kind, text_format
from luthier_trainer.data.files.json_rows import json_elements, json_lines
from luthier_trainer.data.files.row import Row, Unreadable, shown
from luthier_trainer.data.files.tables import arrow_rows, parquet_rows
from luthier_trainer.data.problem import Problem
from luthier_trainer.data.reading import FileFormat, Reading

__all__ = [
    "MAX_ARRAY_BYTES",
    "MAX_LINE_BYTES",
    "MAX_PROBLEMS",
    "Problem",
    "Row",
    "RowFile",
    "open_rows",
    "shown",
]

MAX_LINE_BYTES = 16 * 1024 * 1024
MAX_ARRAY_BYTES = 64 * 1024 * 1024 * 1024
MAX_PROBLEMS = 100_000

_CHUNK = 1024 * 1024
_FORMATS = {
    Kind.PARQUET: FileFormat.PARQUET,
    Kind.ARROW_FILE: FileFormat.ARROW,
    Kind.ARROW_STREAM: FileFormat.ARROW,
}
_TEXT = (FileFormat.JSONL, FileFormat.JSON, FileFormat.CSV)
_NAMES = {
    FileFormat.JSONL: "JSONL",
    FileFormat.JSON: "JSON",
    FileFormat.CSV: "CSV",
    FileFormat.PARQUET: "Parquet",
    FileFormat.ARROW: "Arrow",
    FileFormat.ZIP: "a zip archive",
}

_Read = Callable[[], Iterator[Row]]


class RowFile:
    """A file that rows can be read from, again and again; each time the file is opened anew. A context manager.

    file_format: how it is written (of an archive ZIP); where that cannot be told, what the reading names, or JSONL.
    """

    def __init__(self, path: Path, reading: Reading) -> None:
        """Raises OSError when the file cannot be read."""
        self._path = path
        self._columns = reading.columns
        self._archive: Archive | None = None
        self._problems: list[Problem] = []
        self._read: _Read | None = None
        self._most_rows: int | None = None
        self.file_format = reading.file_format or FileFormat.JSONL
        try:
            self.file_format, self._read = self._opened(reading)
        except Unreadable as error:
            self._problems.append(error.problem)
        except MemoryError:
            self._problems.append(_out_of_memory())

    def __enter__(self) -> "RowFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the archive, if it is one."""
        if self._archive is not None:
            self._archive.close()

    def __iter__(self) -> Iterator[Row]:
        """Every row in order, its columns renamed as the reading says. Raises OSError when the file cannot be read."""
        for problem in self._problems:
            yield Row(0, problem)
        if self._read is None:
            return
        found = self._read()
        wrong = 0
        try:
            for count, row in enumerate(renamed(found, self._columns) if self._columns else found):
                if count == self._most_rows:
                    raise Unreadable(too_large(count * ROW_BYTES))
                yield row
                if isinstance(row.value, Problem):
                    wrong += 1
                    if wrong == MAX_PROBLEMS:
                        message = f"{wrong:,} rows cannot be read. The rest of the file is not looked at."
                        raise Unreadable(Problem("TOO_MANY_PROBLEMS", message))
        except Unreadable as error:
            yield Row(0, error.problem)
        except MemoryError:
            yield Row(0, _out_of_memory())

    def has_image(self, name: str) -> bool:
        """Whether the file is an archive with an image of that name."""
        return self._archive is not None and self._archive.has_image(name)

    def image(self, name: str) -> bytes:
        """The bytes of an image. Raises KeyError when there is none, or it is broken or too large."""
        if self._archive is None:
            raise KeyError(name)
        return self._archive.image(name)

    def _opened(self, reading: Reading) -> tuple[FileFormat, _Read | None]:
        stored = self._path.stat().st_size
        content = Content(self._open, stored, is_seekable=True)
        kind = content.kind(content.head(_CHUNK))
        if kind is not Kind.ZIP:
            if kind in (Kind.GZIP, Kind.ZSTD):
                self._most_rows = most_rows(stored)
            return _reader(content, reading)
        if reading.file_format not in (None, FileFormat.ZIP):
            raise Unreadable(_mismatch(FileFormat.ZIP, reading.file_format))
        self.file_format = FileFormat.ZIP
        self._archive = Archive(self._path)
        self._problems += self._archive.problems
        if self._archive.rows is None:
            return FileFormat.ZIP, None
        self._most_rows = most_rows(self._archive.stored)
        content = Content(self._archive.open_rows, self._archive.stored, is_seekable=False)
        return FileFormat.ZIP, _reader(content, Reading(columns=reading.columns))[1]

    def _open(self) -> BinaryIO:
        return open(self._path, "rb", buffering=BUFFER)


def open_rows(path: Path, reading: Reading | None = None) -> RowFile:
    """Opens a dataset's file, which is read as the reading says, and otherwise as detected.

    Raises OSError when it cannot be read.
    """
    return RowFile(path, reading or Reading())


def _reader(content: Content, reading: Reading) -> tuple[FileFormat, _Read]:
    """How a file is written that is no archive, and what reads it. Raises Unreadable for one that is no dataset."""
    head = content.head(_CHUNK)
    unpacked = content.unpacked(content.kind(head))
    if unpacked is not content:
        content, head = unpacked, unpacked.head(_CHUNK)
    kind = content.kind(head)
    if kind is Kind.TEXT:
        file_format = reading.file_format if reading.file_format in _TEXT else text_format(head, reading.columns)
    else:
        file_format = _FORMATS.get(kind) or _packed_twice()
    if isinstance(file_format, Problem):
        raise Unreadable(file_format)
    if reading.file_format not in (None, file_format):
        raise Unreadable(_mismatch(file_format, reading.file_format))

    def read() -> Iterator[Row]:
        with content.sought() if kind in (Kind.PARQUET, Kind.ARROW_FILE) else content.open() as file:
            match file_format:
                case FileFormat.JSONL:
                    yield from json_lines(file, head, MAX_LINE_BYTES)
                case FileFormat.JSON:
                    yield from json_elements(file, MAX_LINE_BYTES, MAX_ARRAY_BYTES)
                case FileFormat.CSV:
                    yield from csv_rows(file, head, MAX_LINE_BYTES, reading.columns)
                case FileFormat.PARQUET:
                    yield from parquet_rows(file, content.stored, reading.columns)
                case FileFormat.ARROW:
                    yield from arrow_rows(file, content.stored, reading.columns, kind is Kind.ARROW_STREAM)

    return file_format, read


def _packed_twice() -> Problem:
    message = "The file is compressed or packed twice."
    return Problem("UNKNOWN_FILE_FORMAT", message, "Unpack it once, and upload what comes out.")


def _mismatch(found: FileFormat, named: FileFormat | None) -> Problem:
    message = f"The file is {_NAMES[found]}, and is said to be {_NAMES[named or found]}."
    return Problem("FILE_FORMAT_MISMATCH", message, "Leave the file format out: it is detected.")


def _out_of_memory() -> Problem:
    return Problem("FILE_TOO_LARGE", "The file does not fit in memory. Write it as JSONL, one object a line.")
