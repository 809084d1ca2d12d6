"""Several files of rows as one, their rows as they were written."""

import codecs
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import orjson

from luthier_trainer.data.fetching.output import Sink
from luthier_trainer.data.fetching.request import FetchError, shown_size

MAX_ARRAY_BYTES = 512 << 20

_CHUNK = 1 << 20
_COMPRESSIONS = ((b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"BZh", "bz2"))
_XZ = b"\xfd7zXZ\x00"


class Joint:
    """Files of JSON Lines, or of one JSON array, or of CSV, one after the other in a sink: a row a line, unpacked. CSV
    files must have one header, which is kept once."""

    def __init__(self, sink: Sink, has_header: bool = False) -> None:
        self._sink = sink
        self._has_header = has_header
        self._header = b""

    def append(self, path: Path, name: str) -> None:
        """Appends a file. name: for messages. Raises FetchError when it cannot be read."""
        try:
            with _opened(path, name) as file:
                self._append(file, name)
        except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
            raise FetchError("UNREADABLE", f"{name} cannot be read ({type(error).__name__}).") from error

    def _append(self, file: IO[bytes], name: str) -> None:
        chunk = file.read(_CHUNK).removeprefix(codecs.BOM_UTF8)
        if self._has_header:
            chunk = self._after_the_header(chunk, name)
        elif _is_array(chunk):
            for row in _elements(chunk, file, name):
                self._sink.write(row + b"\n")
            return
        last = b"\n"
        while chunk:
            self._sink.write(chunk)
            last = chunk[-1:]
            chunk = file.read(_CHUNK)
        if last != b"\n":
            self._sink.write(b"\n")

    def _after_the_header(self, chunk: bytes, name: str) -> bytes:
        """The first chunk of a file, without the header that is there already."""
        line, _, rest = chunk.partition(b"\n")
        header = line.rstrip(b"\r")
        if not self._header and header.count(b'"') % 2 == 0:
            self._header = header
            return chunk
        if header != self._header:
            message = f"The header of {name} is not that of the files before it."
            raise FetchError("NOT_SUPPORTED", message, "Import its files one by one, by URL.")
        return rest


def _opened(path: Path, name: str) -> IO[bytes]:
    with open(path, "rb") as file:
        head = file.read(8)
    if head.startswith(_XZ):
        return lzma.open(path, "rb")
    if head.startswith(b"PK\x03\x04"):
        message = f"{name} is a zip archive, one of several files; only one archive can be imported."
        raise FetchError("NOT_SUPPORTED", message, "Import the archive by its https URL.")
    for magic, compression in _COMPRESSIONS:
        if head.startswith(magic):
            import pyarrow as pa

            stream: IO[bytes] = pa.input_stream(str(path), compression=compression)
            return stream
    return open(path, "rb")


def _is_array(head: bytes) -> bool:
    """Whether a file is one array: it starts with one that does not end on its first line."""
    text = head.lstrip()
    if not text.startswith(b"["):
        return False
    line, newline, rest = text.partition(b"\n")
    return not (newline and line.rstrip().endswith(b"]") and rest.lstrip()[:1] not in (b"", b"]", b","))


def _elements(first: bytes, file: IO[bytes], name: str) -> Iterator[bytes]:
    data = bytearray(first)
    while chunk := file.read(_CHUNK * 16):
        data += chunk
        if len(data) > MAX_ARRAY_BYTES:
            message = f"{name} is one JSON array of more than {shown_size(MAX_ARRAY_BYTES)}."
            raise FetchError("NOT_SUPPORTED", message, "Write its rows as JSONL, one object a line.")
    rows = orjson.loads(data)
    data.clear()
    yield from map(orjson.dumps, rows)
