"""The bytes of a dataset's file, unpacked: they can be read from the beginning as often as wanted."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

from luthier_trainer.data.files.compressed import BUFFER, allowance, unpacked_gzip, unpacked_zstd
from luthier_trainer.data.files.detection import Kind, kind_of
from luthier_trainer.data.files.row import Unreadable
from luthier_trainer.data.problem import Problem

_UNPACK = {Kind.GZIP: unpacked_gzip, Kind.ZSTD: unpacked_zstd}


@dataclass(frozen=True)
class Content:
    """Bytes. open: opens them at the beginning; stored: how many were uploaded, compressed or not; is_seekable: whether
    what is opened can be sought in."""

    open: Callable[[], BinaryIO]
    stored: int
    is_seekable: bool

    def head(self, size: int) -> bytes:
        """The first bytes. Raises Unreadable, and OSError."""
        with self.open() as file:
            return file.read(size)

    def kind(self, head: bytes) -> Kind:
        """What begins so. Raises Unreadable for a file that is no dataset."""
        kind = kind_of(head)
        if isinstance(kind, Problem):
            raise Unreadable(kind)
        return kind

    def unpacked(self, kind: Kind) -> "Content":
        """What is compressed in it, or itself where nothing is."""
        if kind not in _UNPACK:
            return self
        unpack, limit = _UNPACK[kind], allowance(self.stored)
        return Content(lambda: unpack(self.open(), limit), self.stored, False)

    @contextmanager
    def sought(self) -> Iterator[BinaryIO]:
        """The bytes as a file that can be sought in: an unnamed one in the temporary directory, where need be.

        Raises Unreadable when that has no room."""
        with self.open() as file:
            if self.is_seekable:
                yield file
                return
            with tempfile.TemporaryFile() as copy:
                try:
                    shutil.copyfileobj(file, copy, BUFFER)
                    copy.seek(0)
                except OSError as error:
                    message = f"The file must be unpacked to be read, and cannot be: {error.strerror}."
                    raise Unreadable(Problem("NO_ROOM", message, "Upload it uncompressed.")) from error
                yield copy
