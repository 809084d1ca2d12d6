"""What an upload sends: the metadata first, then the bytes from where the server has them in chunks."""

import asyncio
import contextlib
import hashlib
import json
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from luthier.v1.dataset_pb2 import DatasetReading
from luthier.v1.datasets_pb2 import DatasetMetadata, UploadDatasetRequest
from luthier_client import errors
from luthier_client.folder import packed_folder, packed_with_images

CHUNK = 256 * 1024
_BLOCK = 1024 * 1024
_IN_MEMORY = 16 * 1024 * 1024
_NAME_LIMIT = 63

Rows = Iterable[Mapping[str, Any]]
Source = str | os.PathLike[str] | bytes | Rows
Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


class Upload:
    """Bytes that can be sent more than once, from any offset, and what they are."""

    def __init__(
        self, file: IO[bytes], name: str, reading: DatasetReading | None = None, *, validate_only: bool = False
    ) -> None:
        self.name = name
        self.size_bytes = 0
        self.sha256 = ""
        self._file = file
        self._reading = reading
        self._validate_only = validate_only
        self._lock = threading.Lock()

    def hash(self, on_hashing: Progress | None = None) -> None:
        """Reads the bytes once for their size and SHA-256. Raises OSError."""
        self.size_bytes = self._file.seek(0, os.SEEK_END)
        self._file.seek(0)
        digest, done = hashlib.sha256(), 0
        buffer = bytearray(_BLOCK)
        view = memoryview(buffer)
        reader: Any = self._file
        while count := reader.readinto(view):
            digest.update(view[:count])
            done += count
            if on_hashing is not None:
                on_hashing(done, self.size_bytes)
        self.size_bytes, self.sha256 = done, digest.hexdigest()

    def requests(self, offset: int = 0, on_progress: Progress | None = None) -> Iterator[UploadDatasetRequest]:
        """The messages of one try, from that byte on."""
        metadata = DatasetMetadata(
            name=self.name,
            sha256=self.sha256,
            size_bytes=self.size_bytes,
            reading=self._reading,
            offset=offset,
            validate_only=self._validate_only,
        )
        yield UploadDatasetRequest(metadata=metadata)
        if on_progress is not None:
            on_progress(offset, self.size_bytes)
        while chunk := self._read(offset):
            yield UploadDatasetRequest(chunk=chunk)
            offset += len(chunk)
            if on_progress is not None:
                on_progress(offset, self.size_bytes)

    def close(self) -> None:
        """Closes the file; a temporary one is gone with it."""
        with self._lock:
            self._file.close()

    def _read(self, offset: int) -> bytes:
        # The thread of a call that broke may still be in here when the next call begins, or when all is over.
        with self._lock:
            if self._file.closed:
                return b""
            self._file.seek(offset)
            return self._file.read(CHUNK)


def in_this_loop(on_progress: Progress | None) -> Progress | None:
    """The same for another thread: it is called in the event loop that runs here."""
    if on_progress is None:
        return None
    loop = asyncio.get_running_loop()

    def tell(done: int, total: int) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is gone: nobody is there to be told
            loop.call_soon_threadsafe(on_progress, done, total)

    return tell


def broke_off(error: errors.LuthierError) -> bool:
    """Whether an upload that ended with this may go on."""
    return isinstance(error, errors.Unavailable) or error.reason == "UPLOAD_OFFSET"


def open_upload(
    source: Source,
    name: str | None = None,
    *,
    reading: DatasetReading | None = None,
    images: str | os.PathLike[str] | None = None,
    validate_only: bool = False,
    on_hashing: Progress | None = None,
) -> Upload:
    """Prepares a file or a folder (by its path), bytes, or rows for sending.

    A folder, or a file with `images`, becomes a zip in a temporary file. Rows are written as JSON lines, to memory or a
    temporary file. Without a name a file gives its own (`Train 1.jsonl` becomes `train-1`); bytes and rows need one,
    unless they are only validated. Raises OSError, and ValueError for a missing name, a row that is no JSON, and
    a folder that is no dataset.
    """
    path = Path(source) if isinstance(source, str | os.PathLike) else None
    name = name or (name_of(path) if path is not None else "validated" if validate_only else "")
    if not name:
        raise ValueError("bytes and rows need a name: upload_dataset(..., name='my-data')")
    if images is not None and (path is None or path.is_dir()):
        raise ValueError("images go with a file of rows, named by its path")
    file: IO[bytes]
    if path is not None and images is not None:
        file = packed_with_images(path, Path(images))
    elif path is not None:
        file = packed_folder(path) if path.is_dir() else open(path, "rb", buffering=0)  # noqa: SIM115
    else:
        file = BytesIO(source) if isinstance(source, bytes) else _written(source)  # type: ignore[arg-type]
    upload = Upload(file, name, reading, validate_only=validate_only)
    try:
        upload.hash(on_hashing)
    except BaseException:
        upload.close()
        raise
    return upload


def name_of(path: Path) -> str:
    """A dataset name made of a file's: lower case, without suffixes, other characters as `-`."""
    file = path.name or path.resolve().name
    stem = file.split(".")[0] or file
    name = re.sub(r"[^a-z0-9_-]+", "-", stem.lower()).strip("-_")
    return name[:_NAME_LIMIT] or "dataset"


def _written(rows: Rows) -> IO[bytes]:
    file = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115 - the Upload closes it
    try:
        for number, row in enumerate(rows, 1):
            if not isinstance(row, Mapping):
                raise ValueError(f"row {number} is a {type(row).__name__}, not a mapping")
            try:
                line = json.dumps(dict(row), ensure_ascii=False, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise ValueError(f"row {number} is no JSON: {error}") from error
            file.write(line.encode() + b"\n")
    except BaseException:
        file.close()
        raise
    return file
