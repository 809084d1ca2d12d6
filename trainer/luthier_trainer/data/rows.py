"""The rows of a dataset file: JSONL, or JSON with one array of objects.

The file's first character tells which of the two it is, not its name: datasets are stored under their hash. JSONL is
read a line at a time and takes the memory of one line. An array is read whole, as text; its elements are decoded one by
one.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import orjson

MAX_LINE_BYTES = 16 * 1024 * 1024
MAX_ARRAY_BYTES = 512 * 1024 * 1024

_BOM = b"\xef\xbb\xbf"
_CHUNK = 1024 * 1024
_SPACE = re.compile(r"[ \t\r\n]*")
_OTHER_FILES = (
    (b"\xff\xfe", "UTF-16 text; save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text; save it as UTF-8"),
    (b"\x1f\x8b", "compressed with gzip; unpack it first"),
    (b"PK\x03\x04", "a zip archive; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd; unpack it first"),
    (b"PAR1", "a Parquet file; convert it to JSONL first"),
    (b"ARROW1", "an Arrow file; convert it to JSONL first"),
)


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with a row. code: a stable name; message: a sentence that a person can act on."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Row:
    """One row. line: from 1, the line in JSONL and the element in an array; 0 stands for the whole file."""

    line: int
    value: dict[str, object] | Problem


def rows(path: Path) -> Iterator[Row]:
    """Yields every row of the file in order; blank lines are none. What cannot be read is a row with a Problem.

    Raises OSError when the file cannot be read, and MemoryError when an array does not fit.
    """
    with open(path, "rb") as file:
        head = file.read(_CHUNK)
        for magic, what in _OTHER_FILES:
            if head.startswith(magic):
                yield Row(0, Problem("NOT_UTF8", f"The file is {what}."))
                return
        start = len(_BOM) if head.startswith(_BOM) else 0
        file.seek(start)
        if head[start:].lstrip()[:1] == b"[" and not _has_an_array_a_line(head[start:]):
            yield from _elements(file)
        else:
            yield from _lines(file)


def shown(text: str, limit: int = 40) -> str:
    """A piece of somebody's data for a message: short, on one line, encodable."""
    short = text if len(text) <= limit else text[: limit - 3] + "..."
    return json.dumps(short, ensure_ascii=not short.isprintable())


def _has_an_array_a_line(head: bytes) -> bool:
    """Whether the first line is a whole array and more lines follow: JSONL with the wrong kind of rows."""
    first, _, rest = head.lstrip().partition(b"\n")
    return first.rstrip().endswith(b"]") and rest.lstrip()[:1] not in (b"", b"]", b",") and _parses(first)


def _parses(text: bytes) -> bool:
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return False
    return True


def _lines(file: BinaryIO) -> Iterator[Row]:
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(_CHUNK)
            limit = MAX_LINE_BYTES // (1024 * 1024)
            yield Row(number, Problem("LINE_TOO_LONG", f"The line is longer than {limit} MiB. Split the row."))
        elif not line.isspace():
            yield Row(number, _object(line))


def _object(text: bytes) -> dict[str, object] | Problem:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        return _undecodable(text, error)
    if isinstance(value, dict):
        return value
    kind = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}.get(type(value), "a number")
    return Problem("NOT_AN_OBJECT", f"The row is {kind}; each row must be a JSON object in braces.")


def _undecodable(text: bytes, error: json.JSONDecodeError) -> Problem:
    try:
        text.decode()
    except UnicodeDecodeError as encoding:
        byte = text[encoding.start]
        where = f"byte 0x{byte:02x} at position {encoding.start + 1}"
        return Problem("NOT_UTF8", f"The row is not UTF-8 ({where}). Save the file as UTF-8.")
    if "depth limit" in error.msg or "recursion" in error.msg.lower():
        return Problem("TOO_DEEP", "The row nests objects or arrays more than a thousand levels deep.")
    message = f"The row is not JSON: {error.msg} (column {error.colno})."
    if text.strip() in (b"{", b"[", b"[{"):
        message += " Write each object on one line, or all of them into one array."
    elif text.lstrip().startswith(b"{'"):
        message += " JSON wants double quotes."
    return Problem("NOT_JSON", message)


def _nothing(_: str) -> None:
    """In place of numbers: the first pass only looks for an element's end, and int() of a long one is slow."""


def _elements(file: BinaryIO) -> Iterator[Row]:
    data = file.read(MAX_ARRAY_BYTES + 1)
    if len(data) > MAX_ARRAY_BYTES:
        limit = MAX_ARRAY_BYTES // (1024 * 1024)
        message = f"A JSON array may have {limit} MiB at most. Write the rows as JSONL, one object a line."
        yield Row(0, Problem("FILE_TOO_LARGE", message))
        return
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        message = f"Line {line} is not UTF-8 (byte 0x{data[error.start]:02x}). Save the file as UTF-8."
        yield Row(0, Problem("NOT_UTF8", message))
        return
    del data
    yield from _elements_of(text)


def _elements_of(text: str) -> Iterator[Row]:
    """The elements of an array, decoded one at a time: a file of empty objects would take twenty times its size. Ends
    after the first one whose end cannot be found."""
    scan = json.JSONDecoder(parse_int=_nothing, parse_float=_nothing, parse_constant=_nothing).raw_decode
    position = _after_space(text, text.index("[") + 1)
    number = 0
    if text.startswith("]", position):
        yield from _after_the_array(text, position + 1)
        return
    while True:
        number += 1
        try:
            _, end = scan(text, position)
        except RecursionError:
            yield Row(number, Problem("TOO_DEEP", "The element nests objects or arrays too deep."))
            return
        except json.JSONDecodeError as error:
            yield Row(number, _not_json(text, error.pos, error.msg))
            return
        if end - position > MAX_LINE_BYTES:
            limit = MAX_LINE_BYTES // (1024 * 1024)
            yield Row(number, Problem("LINE_TOO_LONG", f"The element is longer than {limit} MiB. Split the row."))
        else:
            yield Row(number, _object(text[position:end].encode()))
        position = _after_space(text, end)
        if text.startswith("]", position):
            yield from _after_the_array(text, position + 1)
            return
        if not text.startswith(",", position):
            yield Row(number, _not_json(text, position, "expected a comma or the end of the array"))
            return
        position = _after_space(text, position + 1)


def _after_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _after_the_array(text: str, position: int) -> Iterator[Row]:
    if (end := _after_space(text, position)) < len(text):
        yield Row(0, _not_json(text, end, "there is more after the end of the array"))


def _not_json(text: str, position: int, what: str) -> Problem:
    line = text.count("\n", 0, position) + 1
    column = position - text.rfind("\n", 0, position)
    return Problem("NOT_JSON", f"The array is not JSON from here on: {what} (line {line}, column {column}).")
