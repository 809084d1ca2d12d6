"""Rows of Parquet and Arrow files, a few at a time; `arrow_values` says what becomes of their values.

A column of conversations that is a struct of lists becomes a list of dicts where its lists are equally long. Columns of
types that JSON has nothing for are left out, with a warning at line 0. What the values take is limited like what a
compressed file unpacks to.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

from luthier_trainer.data.files.columns import missing
from luthier_trainer.data.files.compressed import allowance, too_large
from luthier_trainer.data.files.row import Row, Unreadable, shown
from luthier_trainer.data.problem import Level, Problem

if TYPE_CHECKING:
    import pyarrow as pa

MAX_COLUMNS = 4096

_BATCH_BYTES = 8 * 1024**2
_BATCH_ROWS = 1024
_BUFFER = 1024**2
# So many rows become Python values at once, and fewer where those are large.
_CHUNK_ROWS = 256
_CHUNK_BYTES = 1024**2
# What a row counts for, beside its values, towards the limit of what comes out: rows of nothing are not free.
_ROW_BYTES = 256
_CONVERSATIONS = ("messages", "conversations", "conversation", "prompt", "completion", "chosen", "rejected")


def parquet_rows(file: BinaryIO, stored: int, columns: Mapping[str, str]) -> Iterator[Row]:
    """The rows of a Parquet file that can be sought in. stored: how many bytes were uploaded; columns: as in `Reading`,
    to know those of conversations, and those that are missing.

    Raises Unreadable when it is broken.
    """
    with _reading("Parquet"):
        from pyarrow import PythonFile, parquet

        # With a buffer and without pre_buffer there is a page of each column in memory, and not a row group.
        table = parquet.ParquetFile(PythonFile(file, mode="r"), buffer_size=_BUFFER, pre_buffer=False)
        metadata = table.metadata
        size = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
        rows = _BATCH_BYTES * max(1, metadata.num_rows) // max(1, size)
        batches = table.iter_batches(max(1, min(_BATCH_ROWS, rows)), use_threads=False)
        schema = table.schema_arrow
    yield from _rows("Parquet", schema, batches, allowance(stored), columns)


def arrow_rows(file: BinaryIO, stored: int, columns: Mapping[str, str], is_stream: bool) -> Iterator[Row]:
    """The rows of an Arrow file that can be sought in, or of an Arrow stream. Otherwise like `parquet_rows`."""
    with _reading("Arrow"):
        from pyarrow import PythonFile, ipc

        source = PythonFile(file, mode="r")
        options = ipc.IpcReadOptions(use_threads=False)
        table = ipc.open_stream(source, options=options) if is_stream else ipc.open_file(source, options=options)
        batches = iter(table) if is_stream else (table.get_batch(n) for n in range(table.num_record_batches))
        schema = table.schema
    yield from _rows("Arrow", schema, batches, allowance(stored), columns)


def _rows(
    kind: str, schema: "pa.Schema", batches: Iterator["pa.RecordBatch"], limit: int, mapping: Mapping[str, str]
) -> Iterator[Row]:
    from luthier_trainer.data.files.arrow_values import checked, column_of

    conversations = {*_CONVERSATIONS, *(mapping[name] for name in _CONVERSATIONS if name in mapping)}
    with _reading(kind):
        problem = _problem_of_columns(schema.names) or missing(mapping, schema.names)
        columns = [column_of(field, field.name in conversations) for field in schema]
        left_out = [field for field, column in zip(schema, columns, strict=True) if column is None]
    if problem:
        yield Row(0, problem)
        return
    for field in left_out:
        message = f"The column {shown(field.name)} is left out: its type {shown(str(field.type))} is not read."
        yield Row(0, Problem("COLUMN_NOT_READ", message, "Write it as text or numbers.", Level.WARNING))
    number = 0
    left = limit
    size = 1
    while True:
        with _reading(kind):
            batch = next(batches, None)
            if batch is None:
                return
            read = [checked(batch.column(i), column) for i, column in enumerate(columns) if column is not None]
        start = 0
        while start < batch.num_rows:
            count = min(size, batch.num_rows - start)
            with _reading(kind):
                cells = [(column.name, *column.values(array.slice(start, count))) for array, column in read]
            taken = sum(bytes_taken for _, _, bytes_taken in cells) + _ROW_BYTES * count
            left -= taken
            if left < 0:
                raise Unreadable(too_large(limit))
            names = [name for name, _, _ in cells]
            for values in zip(*(values for _, values, _ in cells), strict=True) if cells else [()] * count:
                number += 1
                problems = [value for value in values if isinstance(value, Problem)]
                yield Row(number, problems[0] if problems else dict(zip(names, values, strict=True)))
            start += count
            size = max(1, size // 2) if taken > _CHUNK_BYTES else min(_CHUNK_ROWS, size * 2)


def _problem_of_columns(names: list[str]) -> Problem | None:
    if not names:
        return Problem("BAD_HEADER", "The file has no columns.")
    if len(names) > MAX_COLUMNS:
        return Problem("BAD_HEADER", f"The file has {len(names):,} columns; {MAX_COLUMNS:,} are the most.")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        return Problem("BAD_HEADER", f"The file has the column {shown(twice)} twice.", "Rename one of them.")
    return None


@contextmanager
def _reading(kind: str) -> Iterator[None]:
    """Turns what pyarrow raises for a broken file into Unreadable. MemoryError and an OSError of the disk go on."""
    try:
        yield
    except (MemoryError, Unreadable):
        raise
    except OSError as error:
        if error.errno is not None:
            raise
        raise Unreadable(_broken(kind, error)) from error
    except (ValueError, LookupError, TypeError, ArithmeticError, RuntimeError) as error:
        raise Unreadable(_broken(kind, error)) from error


def _broken(kind: str, error: Exception) -> Problem:
    what = shown(" ".join(str(error).split()), 160)
    message = f"The {kind} file is broken, cut off, or of a kind that is not read: {what}."
    return Problem("BROKEN_FILE", message, "Write it anew with pyarrow or datasets, or as JSONL, and upload it again.")
