"""Files that are compressed with gzip or zstd, read as a stream.

What comes out is limited, so that no small file fills a disk or keeps a reader busy for hours: MAX_UNPACKED_BYTES in
all, and RATIO times what is stored once more than RATIO_FROM came out.
"""

import io
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, BinaryIO

from luthier_trainer.data.files.row import Unreadable, mebibytes
from luthier_trainer.data.problem import Problem

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

MAX_UNPACKED_BYTES = 64 * 1024**3
RATIO = 50
RATIO_FROM = 64 * 1024**2
ROW_BYTES = 256
ROW_RATIO = 100
"""Each row costs its time, however short it is: those of a compressed file count ROW_BYTES, of which there may be
ROW_RATIO times what is stored, once more than RATIO_FROM came out."""

BUFFER = 1024 * 1024

# Small: what follows the end of a member is copied, so empty members by the million would take quadratic time.
_GZIP_INPUT = 16 * 1024
_GZIP = 16 + zlib.MAX_WBITS


def allowance(stored: int) -> int:
    """How many bytes may come out of that many stored ones."""
    return min(MAX_UNPACKED_BYTES, max(RATIO_FROM, RATIO * stored))


def most_rows(stored: int) -> int:
    """How many rows may come out of that many stored bytes."""
    return max(RATIO_FROM, ROW_RATIO * stored) // ROW_BYTES


def too_large(limit: int) -> Problem:
    """What is wrong with a file of which more comes out than the limit."""
    return Problem(
        "FILE_TOO_LARGE",
        f"The file unpacks to more than {mebibytes(limit)}: {MAX_UNPACKED_BYTES // 1024**3} GiB at most, and above "
        f"{mebibytes(RATIO_FROM)} at most {RATIO} times the compressed size.",
        "Upload the file uncompressed, or in parts.",
    )


def unpacked_gzip(file: BinaryIO, limit: int) -> BinaryIO:
    """What is in a gzip file, of any number of members. Reading raises Unreadable when it is broken, cut off, or more
    comes out than the limit. Closing it closes the file."""
    return io.BufferedReader(_Unpacked(_Gunzip(file).read, limit, file), BUFFER)


def unpacked_zstd(file: BinaryIO, limit: int) -> BinaryIO:
    """The same of a zstd file, of any number of frames."""
    import pyarrow as pa

    stream = pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")

    def read(size: int) -> bytes:
        try:
            data: bytes = stream.read(size)
        except OSError as error:
            if error.errno is not None:
                raise
            raise Unreadable(_broken("zstd", str(error))) from error
        return data

    return io.BufferedReader(_Unpacked(read, limit, file), BUFFER)


def limited(file: BinaryIO, limit: int) -> BinaryIO:
    """A stream that another library unpacks, held to the limit."""
    return io.BufferedReader(_Unpacked(file.read, limit, file), BUFFER)


class _Unpacked(io.RawIOBase):
    """What a function reads, as a file of at most `limit` bytes."""

    def __init__(self, read: Callable[[int], bytes], limit: int, source: BinaryIO) -> None:
        self._read = read
        self._limit = limit
        self._source = source
        self._count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        view = memoryview(buffer).cast("B")
        data = self._read(len(view))
        self._count += len(data)
        if self._count > self._limit:
            raise Unreadable(too_large(self._limit))
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._source.close()
        super().close()


class _Gunzip:
    """Unpacks gzip, member after member; zeros after the last one are padding."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._member = zlib.decompressobj(_GZIP)
        self._input = b""

    def read(self, size: int) -> bytes:
        """Some bytes, at most size; none at the end of the file."""
        while True:
            if self._member.eof:
                self._input = self._member.unused_data.lstrip(b"\0")
                if not self._input and not self._fill(padding=True):
                    return b""
                self._member = zlib.decompressobj(_GZIP)
            elif not self._input and not self._fill():
                raise Unreadable(_broken("gzip", "the file ends in the middle"))
            try:
                data = self._member.decompress(self._input, size)
            except zlib.error as error:
                raise Unreadable(_broken("gzip", str(error))) from error
            self._input = self._member.unconsumed_tail
            if data:
                return data

    def _fill(self, padding: bool = False) -> bool:
        """Reads on; says whether there was more. padding: zeros are none."""
        while data := self._file.read(_GZIP_INPUT):
            self._input = data.lstrip(b"\0") if padding else data
            if self._input:
                return True
        return False


def _broken(compression: str, what: str) -> Problem:
    message = f"The file is compressed with {compression}, and broken or cut off: {what}."
    return Problem("BROKEN_FILE", message, "Compress it anew, and upload it again.")
