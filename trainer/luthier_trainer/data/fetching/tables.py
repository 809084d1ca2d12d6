"""Rows that come as Arrow tables, written as one file: Parquet, or JSONL where a column holds JSON."""

import decimal
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from luthier_trainer.data.fetching.output import Output
from luthier_trainer.data.fetching.request import FetchError

ROW_GROUP_BYTES = 32 << 20
ROW_GROUP_ROWS = 16_384


def write(tables: Iterable[pa.Table], output: Output, counted: Callable[[int], None]) -> None:
    """Writes all rows, in order, with the columns of the first table; the same rows make the same bytes. counted: told
    how many rows there are so far. Raises FetchError, or ArrowInvalid when a later table does not fit."""
    rows = 0

    def passing() -> Iterator[pa.Table]:
        nonlocal rows
        schema: pa.Schema | None = None
        for table in tables:
            schema = schema or table.schema.remove_metadata()
            yield _cast(table, schema)
            rows += table.num_rows
            counted(rows)

    stream: Iterator[pa.Table] = passing()
    if (first := next(stream, None)) is None:
        return
    stream = itertools.chain([first], stream)
    if any(_has_json(field.type) for field in first.schema):
        _write_jsonl(stream, output)
    else:
        _write_parquet(stream, output)


def _write_jsonl(tables: Iterable[pa.Table], output: Output) -> None:
    for table in tables:
        columns = [(name, _values(table[name])) for name in table.column_names]
        for row in range(table.num_rows):
            output.write(orjson.dumps({name: values[row] for name, values in columns}, default=_plain) + b"\n")


def _values(column: pa.ChunkedArray) -> list[Any]:
    return (
        [_decoded(value, column.type) for value in column.to_pylist()] if _has_json(column.type) else column.to_pylist()
    )


def _decoded(value: Any, kind: pa.DataType) -> Any:
    """A value with its JSON parsed."""
    if value is None:
        return None
    if isinstance(kind, pa.JsonType):
        return orjson.loads(value)
    if pa.types.is_struct(kind):
        return {field.name: _decoded(value[field.name], field.type) for field in kind}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return [_decoded(each, kind.value_type) for each in value]
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, decimal.Decimal):
        return str(value)
    if isinstance(value, bytes):
        message = "The dataset has columns of JSON and of bytes, which no file that Luthier reads can hold together."
        raise FetchError("NOT_SUPPORTED", message, "Import its files by URL.")
    return str(value)


def _has_json(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.JsonType):
        return True
    return any(_has_json(kind.field(index).type) for index in range(kind.num_fields))


def _write_parquet(tables: Iterable[pa.Table], output: Output) -> None:
    writer: pq.ParquetWriter | None = None
    waiting: list[pa.Table] = []

    def flush() -> None:
        if waiting and writer is not None:
            table = pa.concat_tables(waiting)
            waiting.clear()
            writer.write_table(table, row_group_size=max(1, table.num_rows))

    for table in tables:
        if writer is None:
            writer = pq.ParquetWriter(output, table.schema, compression="zstd")
        for piece in _pieces(table):
            waiting.append(piece)
            if sum(t.nbytes for t in waiting) >= ROW_GROUP_BYTES or sum(t.num_rows for t in waiting) >= ROW_GROUP_ROWS:
                flush()
    flush()
    if writer is not None:
        writer.close()


def _pieces(table: pa.Table) -> Iterator[pa.Table]:
    """The table in pieces of a bounded size."""
    share = max(1, -(-table.nbytes // ROW_GROUP_BYTES))
    rows = max(1, min(ROW_GROUP_ROWS, table.num_rows // share))
    for start in range(0, table.num_rows, rows):
        yield table.slice(start, rows)


def _cast(table: pa.Table, schema: pa.Schema) -> pa.Table:
    if late := [name for name in table.column_names if name not in schema.names]:
        message = f"The column {late[0][:80]!r} is in some of the dataset's files, but not in the first one."
        raise FetchError("UNREADABLE", message, "Import its files one by one, by URL.")
    columns = [
        table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(table.num_rows, field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)
