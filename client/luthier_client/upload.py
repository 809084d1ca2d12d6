"""What an upload sends: the metadata first, then the bytes in chunks."""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from luthier.v1.datasets_pb2 import DatasetMetadata, UploadDatasetRequest

CHUNK = 256 * 1024
_IN_MEMORY = 16 * 1024 * 1024
_NAME_LIMIT = 63

Rows = Iterable[Mapping[str, Any]]
Source = str | os.PathLike[str] | bytes | Rows
Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


@dataclass(frozen=True)
class Upload:
    """Bytes that can be sent more than once, and what they are."""

    name: str
    file: IO[bytes]
    size_bytes: int
    sha256: str

    def requests(self, on_progress: Progress | None = None) -> Iterator[UploadDatasetRequest]:
        """The messages of one try, from the first byte."""
        metadata = DatasetMetadata(name=self.name, sha256=self.sha256, size_bytes=self.size_bytes)
        yield UploadDatasetRequest(metadata=metadata)
        self.file.seek(0)
        sent = 0
        while chunk := self.file.read(CHUNK):
            yield UploadDatasetRequest(chunk=chunk)
            sent += len(chunk)
            if on_progress is not None:
                on_progress(sent, self.size_bytes)

    async def requests_async(self, on_progress: Progress | None = None) -> AsyncIterator[UploadDatasetRequest]:
        """The same for an event loop. Reading 256 KiB of a local file costs less than a hop to a thread."""
        for request in self.requests(on_progress):
            yield request

    def close(self) -> None:
        """Closes the file; a temporary one is gone with it."""
        self.file.close()


def open_upload(source: Source, name: str | None = None) -> Upload:
    """Prepares a file (by its path), bytes, or rows for sending.

    Rows are written as JSON lines, to memory or a temporary file. Without a name a file gives its own (`Train 1.jsonl`
    becomes `train-1`); bytes and rows need one. Raises OSError, and ValueError for a missing name or
    a row that is no JSON.
    """
    file: IO[bytes]
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        file = open(path, "rb")  # noqa: SIM115 - the Upload closes it
        name = name or name_of(path)
    elif isinstance(source, bytes):
        file = BytesIO(source)
    else:
        file = _written(source)
    if not name:
        file.close()
        raise ValueError("bytes and rows need a name: upload_dataset(..., name='my-data')")
    file.seek(0)
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    return Upload(name=name, file=file, size_bytes=file.tell(), sha256=digest.hexdigest())


def name_of(path: Path) -> str:
    """A dataset name made of a file's: lower case, without suffixes, other characters as `-`."""
    stem = path.name.split(".")[0] or path.name
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
