"""What is in the columns of Parquet and Arrow files, as values that JSON has.

Times, dates, durations and decimals become text. Bytes become text where they are UTF-8, and
`{"bytes": BASE64, "path": None}` otherwise; a struct of `bytes` and `path`, as image columns have, becomes
`{"bytes": BASE64 or None, "path": text or None}`. Null fields of a struct are left out, since Arrow cannot tell them
from absent ones; a null cell stays as None. NaN becomes None.
"""

import base64
import itertools
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from luthier_trainer.data.files.row import shown
from luthier_trainer.data.problem import Problem

_IMAGE = {"bytes", "path"}
_TURNS = ({"role", "content"}, {"from", "value"})


class _NotText(Exception):
    """Raised for a string that is not UTF-8."""


@dataclass(frozen=True, slots=True)
class Column:
    """How the cells of a column become values. type: what they are cast to first; has_turns: a struct of lists is a
    list of structs; is_raw: text was cast to bytes, since some of it is none."""

    name: str
    type: pa.DataType
    has_turns: bool = False
    is_raw: bool = False

    def values(self, cells: pa.Array) -> tuple[list[Any], int]:
        """The values of checked cells, and how many bytes they took; a Problem in place of one that is not text."""
        plain = cells if cells.type.equals(self.type) else cells.cast(self.type)
        if self.is_raw:
            values = [self._text_values(plain.slice(index, 1)) for index in range(len(plain))]
        else:
            values = _values(plain, False)
        if self.has_turns:
            values = [_turns(value) if isinstance(value, dict) else value for value in values]
        return values, plain.nbytes

    def _text_values(self, cell: pa.Array) -> object:
        try:
            return _values(cell, True)[0]
        except _NotText:
            message = f"The column {shown(self.name)} has text that is not UTF-8."
            return Problem("NOT_UTF8", message, "Write the file with text in UTF-8.")


def column_of(field: pa.Field, may_hold_turns: bool) -> Column | None:
    """How a column is read; None for a type that JSON has nothing for. may_hold_turns: a struct of equally long lists,
    such as `role` and `content`, becomes a list of dicts."""
    plain = _plain(field.type)
    if plain is None:
        return None
    return Column(field.name, plain, may_hold_turns and _is_struct_of_lists(plain))


def checked(cells: pa.Array, column: Column) -> tuple[pa.Array, Column]:
    """The cells and how they are read, once it is certain that they can be: offsets within bounds, text that is UTF-8.
    Where some text is not, it is read as bytes. Raises ArrowException for a broken file."""
    if isinstance(cells, pa.ExtensionArray):
        cells = cells.storage
    try:
        cells.validate(full=True)
    except pa.ArrowInvalid:
        raw = _plain(column.type, raw=True)
        cells.validate()
        cells = cells.cast(raw)
        cells.validate(full=True)
        return cells, replace(column, type=raw, is_raw=True)
    return cells, column


def _plain(kind: pa.DataType, raw: bool = False) -> pa.DataType | None:
    """The type that cells are cast to; None for one that cannot be read. raw: text as bytes."""
    if isinstance(kind, pa.BaseExtensionType):
        return _plain(kind.storage_type, raw)
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return pa.large_binary() if raw else kind
    if types.is_float16(kind):
        return pa.float32()
    if (types.is_temporal(kind) and not types.is_interval(kind)) or types.is_decimal(kind):
        return pa.string()
    if types.is_dictionary(kind):
        return _plain(kind.value_type, raw)
    if types.is_map(kind):
        return _of_map(_plain(kind.key_type, raw), _plain(kind.item_type, raw))
    if types.is_struct(kind):
        fields = [(field.name, _plain(field.type, raw)) for field in kind.fields]
        if any(inner is None for _, inner in fields) or len({name for name, _ in fields}) < len(fields):
            return None
        return pa.struct(fields)
    if types.is_nested(kind):
        return _of_list(kind, raw)
    is_known = types.is_null(kind) or types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind)
    return kind if is_known or _is_bytes(kind) else None


def _of_map(key: pa.DataType | None, item: pa.DataType | None) -> pa.DataType | None:
    return None if key is None or item is None else pa.map_(key, item)


def _of_list(kind: pa.DataType, raw: bool) -> pa.DataType | None:
    if not _is_list(kind):
        return None  # a union, or runs of equal values
    inner = _plain(kind.value_type, raw)
    if inner is None or inner.equals(kind.value_type):
        return None if inner is None else kind
    return pa.large_list(inner) if types.is_large_list(kind) else pa.list_(inner)


def _is_list(kind: pa.DataType) -> bool:
    return bool(
        types.is_list(kind)
        or types.is_large_list(kind)
        or types.is_fixed_size_list(kind)
        or types.is_list_view(kind)
        or types.is_large_list_view(kind)
    )


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_binary_view(kind)
        or types.is_fixed_size_binary(kind)
    )


def _is_struct_of_lists(kind: pa.DataType) -> bool:
    if not types.is_struct(kind):
        return False
    names = {field.name for field in kind.fields}
    return any(turn <= names for turn in _TURNS) and all(_is_list(field.type) for field in kind.fields)


def _values(cells: pa.Array, is_text: bool) -> list[Any]:
    """The values of cells of a plain type, a column at a time: pyarrow's own way, a cell at a time, takes three times
    as long. is_text: bytes must be text, but those of images."""
    kind = cells.type
    if types.is_struct(kind):
        return _structs(cells, is_text)
    if _is_list(kind):
        items = _values(cells.flatten(), is_text)
        lengths = pc.list_value_length(cells).to_pylist()
        ends = itertools.accumulate(length or 0 for length in lengths)
        return [
            None if length is None else items[end - length : end] for length, end in zip(lengths, ends, strict=True)
        ]
    if types.is_map(kind):
        entry = pa.struct([("key", kind.key_type), ("value", kind.item_type)])
        return [
            None if entries is None else {str(item["key"]): item.get("value") for item in entries}
            for entries in _values(cells.cast(pa.list_(entry)), is_text)
        ]
    if types.is_floating(kind) or _is_bytes(kind):
        return [_plain_value(value, is_text) for value in cells.to_pylist()]
    values: list[Any] = cells.to_pylist()
    return values


def _structs(cells: pa.Array, is_text: bool) -> list[Any]:
    names = [field.name for field in cells.type.fields]
    columns = cells.flatten()
    if set(names) == _IMAGE:
        lists = [
            [_base64(value) for value in column.to_pylist()]
            if _is_bytes(column.type) and name == "bytes"
            else _values(column, is_text)
            for name, column in zip(names, columns, strict=True)
        ]
        values = [dict(zip(names, items, strict=True)) for items in zip(*lists, strict=True)]
    elif names:
        lists = [_values(column, is_text) for column in columns]
        values = [
            {name: item for name, item in zip(names, items, strict=True) if item is not None}
            for items in zip(*lists, strict=True)
        ]
    else:
        values = [{} for _ in range(len(cells))]
    if not cells.null_count:
        return values
    is_valid = cells.is_valid().to_pylist()
    return [value if valid else None for value, valid in zip(values, is_valid, strict=True)]


def _plain_value(value: Any, is_text: bool) -> Any:
    if isinstance(value, float):
        return value if value == value else None
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            if is_text:
                raise _NotText from None
            return {"bytes": _base64(value), "path": None}
    return value


def _base64(value: bytes | None) -> str | None:
    return None if value is None else base64.b64encode(value).decode()


def _turns(lists: dict[str, list[Any]]) -> object:
    """Of a struct of lists a list of dicts, where the lists are equally long."""
    if len({len(items) for items in lists.values()}) != 1:
        return lists
    turns = [dict(zip(lists, items, strict=True)) for items in zip(*lists.values(), strict=True)]
    return [{name: item for name, item in turn.items() if item is not None} for turn in turns]
