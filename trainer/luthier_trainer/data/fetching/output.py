"""The file that a fetch fills: bounded in size, hashed while it is written, on disk when it is done."""

import errno
import hashlib
import os
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from luthier_trainer.data.fetching.request import FetchError, too_large
from luthier_trainer.durable import is_full


class Sink(Protocol):
    """Takes a file's bytes in order."""

    max_bytes: int

    @property
    def size(self) -> int:
        """Bytes so far."""
        ...

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        """Takes the next bytes."""
        ...

    def restart(self) -> None:
        """Forgets all bytes."""
        ...


class Output:
    """A file, made anew, with the methods that pyarrow asks of one. Raises FetchError TOO_LARGE before it would hold
    more than max_bytes, and STORAGE_FULL when the disk is full."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        self._size = 0
        self._hash = hashlib.sha256()
        self.closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._size

    @property
    def sha256(self) -> str:
        """SHA-256 of the bytes so far, hexadecimal."""
        return self._hash.hexdigest()

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        """Writes all of it; returns its length in bytes."""
        view = memoryview(data).cast("B")
        if self._size + len(view) > self.max_bytes:
            raise too_large(self.max_bytes)
        self._hash.update(view)
        written = 0
        try:
            while written < len(view):
                written += os.write(self._descriptor, view[written:])
        except OSError as error:
            raise _unwritable(error) from error
        self._size += written
        return written

    def restart(self) -> None:
        """Makes the file empty again."""
        os.ftruncate(self._descriptor, 0)
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        self._size = 0
        self._hash = hashlib.sha256()

    def sync(self) -> None:
        """Returns once the bytes are on the disk."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise _unwritable(error) from error

    def tell(self) -> int:
        """Where the next byte goes."""
        return self._size

    def flush(self) -> None:
        """Nothing waits here."""

    def readable(self) -> bool:
        """It is only written."""
        return False

    def writable(self) -> bool:
        """It is only written."""
        return True

    def seekable(self) -> bool:
        """It is written in order."""
        return False

    def close(self) -> None:
        """Closes the file; twice is fine."""
        if not self.closed:
            self.closed = True
            os.close(self._descriptor)


def _unwritable(error: OSError) -> FetchError:
    if is_full(error):
        return FetchError("STORAGE_FULL", "The server's disk is full.", "Make room on the server, and try again.")
    name = errno.errorcode.get(error.errno or 0, "error")
    return FetchError(
        "UNWRITABLE", f"The server cannot write the file ({name}).", "Ask the operator to look at the disk."
    )
