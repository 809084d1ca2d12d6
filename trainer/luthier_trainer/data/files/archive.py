"""A zip archive with one file of rows, and images that the rows name by their path.

Nothing is written to the disk, and no name of the archive ever becomes a path: members are read as streams, and images
are found by their normalised name, as seen from the folder of the rows, or else from the archive's root.
"""

import errno
import posixpath
import re
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO, cast

from luthier_trainer.data.files.compressed import allowance, limited
from luthier_trainer.data.files.row import Unreadable, shown
from luthier_trainer.data.problem import Problem

MAX_IMAGE_BYTES = 64 * 1024**2
MAX_MEMBERS = 1_000_000

_MAX_PROBLEMS = 20
_ROWS = re.compile(r"\.(jsonl|ndjson|json|csv|tsv|parquet|arrow)(\.(gz|gzip|zst|zstd))?$", re.IGNORECASE)
_IMAGES = re.compile(r"\.(png|jpe?g|webp|gif|bmp|tiff?)$", re.IGNORECASE)
_NO_ROWS = re.compile(
    r"(^|/)(dataset_infos?|state|dataset_dict)\.json$|\.(md|txt|rst|pdf|html?)$|(^|/)(LICEN[CS]E|README)$",
    re.IGNORECASE,
)
_IGNORED = re.compile(r"(^|/)(__MACOSX/|\.|Thumbs\.db$|desktop\.ini$)")
_OUTSIDE = re.compile(r"^[/\\]|^[A-Za-z]:|(^|[/\\])\.\.([/\\]|$)")
_ENCRYPTED = 0x1
_READABLE = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# What zipfile raises for a broken archive, beside an OSError for an offset that is none.
_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    ArithmeticError,
)


class Archive:
    """An open zip archive. problems: what is wrong with its members; rows: the name of the file of rows, None when
    there is not exactly one. Not to be used by two processes at once."""

    def __init__(self, path: Path) -> None:
        """Raises Unreadable when it is none, or has too many members."""
        self._stored = path.stat().st_size
        with _reading():
            self._zip = zipfile.ZipFile(path)
        try:
            self._members, self.problems = _members(self._zip.infolist())
        except Unreadable:
            self._zip.close()
            raise
        found = _rows_of(self._members)
        self.rows = found if isinstance(found, str) else None
        if isinstance(found, Problem):
            self.problems.append(found)
        self._folder = posixpath.dirname(self.rows or "")

    def open_rows(self) -> BinaryIO:
        """The file of rows, as a stream that cannot be sought in. Reading raises Unreadable when it is broken, or more
        comes out than may."""
        member = self._members[self.rows or ""]
        with _reading():
            stream = self._zip.open(member)
        stored = min(member.compress_size, self._stored)
        return limited(cast(BinaryIO, _Whole(stream)), allowance(stored))

    @property
    def stored(self) -> int:
        """How many bytes of the archive the file of rows takes."""
        return min(self._members[self.rows or ""].compress_size, self._stored)

    def has_image(self, name: str) -> bool:
        """Whether there is a file of that name, as seen from the folder of the rows or from the root."""
        return self._image(name) is not None

    def image(self, name: str) -> bytes:
        """Its bytes. Raises KeyError when there is none, or it is broken or larger than MAX_IMAGE_BYTES."""
        member = self._image(name)
        if member is None:
            raise KeyError(name)
        try:
            with _reading(), self._zip.open(member) as file:
                data = file.read(MAX_IMAGE_BYTES + 1)
        except Unreadable as error:
            raise KeyError(name) from error
        if len(data) > MAX_IMAGE_BYTES:
            raise KeyError(name)
        return data

    def close(self) -> None:
        """Closes it."""
        self._zip.close()

    def _image(self, name: str) -> zipfile.ZipInfo | None:
        if "\0" in name or len(name) > 4096 or re.match(r"[/\\]|[A-Za-z]:", name):
            return None
        name = name.replace("\\", "/")
        for path in (posixpath.join(self._folder, name), name):
            member = self._members.get(_normalised(path))
            if member is not None and member.file_size <= MAX_IMAGE_BYTES:
                return member
        return None


class _Whole:
    """A member's stream whose errors say that the archive is broken."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def read(self, size: int) -> bytes:
        with _reading():
            return self._stream.read(size)

    def close(self) -> None:
        self._stream.close()


def _members(infos: list[zipfile.ZipInfo]) -> tuple[dict[str, zipfile.ZipInfo], list[Problem]]:
    """The files that can be read, by their normalised names, and what is wrong with others."""
    if len(infos) > MAX_MEMBERS:
        message = f"The archive has {len(infos):,} members; {MAX_MEMBERS:,} are the most."
        raise Unreadable(Problem("FILE_TOO_LARGE", message))
    if any(info.filename == "[Content_Types].xml" for info in infos[:100]):
        message = "The file is an Office document (Excel, Word), not a dataset."
        raise Unreadable(Problem("UNKNOWN_FILE_FORMAT", message, "Export the sheet as CSV (UTF-8)."))
    members: dict[str, zipfile.ZipInfo] = {}
    problems: list[Problem] = []
    more = 0
    for info in infos:
        found = _problem_of(info)
        name = _normalised(info.filename.replace("\\", "/"))
        if found is None and not info.is_dir() and not _IGNORED.search(name):
            found = _problem_of_data(info)
            if found is None and name in members:
                message = f"The archive has {shown(info.filename)} twice."
                found = Problem("DUPLICATE_MEMBER", message, "Pack it anew, each file once.")
            if found is None:
                members[name] = info
        if found is not None:
            if len(problems) < _MAX_PROBLEMS:
                problems.append(found)
            else:
                more += 1
    if more:
        problems.append(Problem("UNSAFE_MEMBER", f"The archive has {more:,} more members that are not read."))
    return members, problems


def _problem_of(info: zipfile.ZipInfo) -> Problem | None:
    """What is wrong with a member's name or kind."""
    if _OUTSIDE.search(info.filename) or not info.filename:
        message = f"The archive has a member with a name that leads out of it: {shown(info.filename)}."
        return Problem("UNSAFE_MEMBER", message, "Pack the files anew, under relative names without '..'.")
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        what = "a symbolic link" if kind == stat.S_IFLNK else "neither a file nor a folder"
        message = f"The member {shown(info.filename)} of the archive is {what}."
        return Problem("UNSAFE_MEMBER", message, "Pack the files themselves (zip -r follows links).")
    return None


def _problem_of_data(info: zipfile.ZipInfo) -> Problem | None:
    """What is wrong with how a member is stored."""
    if info.flag_bits & _ENCRYPTED:
        message = f"The member {shown(info.filename)} of the archive is encrypted."
        return Problem("ENCRYPTED_MEMBER", message, "Pack it anew without a password.")
    if info.compress_type not in _READABLE:
        message = f"The member {shown(info.filename)} of the archive is compressed with method {info.compress_type}."
        return Problem("UNKNOWN_COMPRESSION", message, "Pack it anew with deflate, which is zip's own.")
    return None


def _rows_of(members: dict[str, zipfile.ZipInfo]) -> str | Problem:
    """The one file of rows: by its ending, or else the only one that is no image and no document."""
    others = [name for name in members if not _IMAGES.search(name) and not _NO_ROWS.search(name)]
    found = [name for name in others if _ROWS.search(name)] or others
    if len(found) == 1:
        return found[0]
    if not found:
        message = "The archive has no file of rows: one of JSONL, JSON, CSV, Parquet or Arrow beside the images."
        return Problem("NO_ROWS_FILE", message, "Add it to the archive, and name the images in it by their paths.")
    names = ", ".join(shown(name) for name in found[:3]) + (", ..." if len(found) > 3 else "")
    message = f"The archive has {len(found):,} files of rows ({names}); it must have one."
    return Problem("SEVERAL_ROWS_FILES", message, "Upload one archive or file a dataset, or concatenate them.")


def _normalised(name: str) -> str:
    """A member's name, as it is looked up. Names that lead out of the archive keep their `..`, and are never found."""
    return unicodedata.normalize("NFC", posixpath.normpath(name))


@contextmanager
def _reading() -> Iterator[None]:
    """Turns what is raised for a broken archive into Unreadable. An OSError of the disk goes on."""
    try:
        yield
    except (*_ERRORS, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        message = f"The zip archive is broken or cut off: {shown(str(error), 120)}."
        raise Unreadable(Problem("BROKEN_FILE", message, "Pack it anew, and upload it again.")) from error
