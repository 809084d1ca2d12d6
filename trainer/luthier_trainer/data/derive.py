"""Datasets made of others: `python -m luthier_trainer.data.derive REQUEST_FILE OUTPUT_DIR`.

REQUEST_FILE is JSON:

    {"operation": "split", "sources": [SOURCE], "validation": 0.1, "seed": 1}
    {"operation": "sample", "sources": [SOURCE], "rows": 1000, "seed": 1}
    {"operation": "concatenate", "sources": [SOURCE, SOURCE, ...]}

with SOURCE = {"path": ..., "reading": a luthier.v1.DatasetReading as JSON}. Files named `0` and `1` appear in
OUTPUT_DIR (of a split the training rows first), and a serialized `luthier.trainer.v1.DeriveReport` on standard output.
Where it names a problem, what is in OUTPUT_DIR is not complete.

A file is JSONL: the rows under the names that columns are mapped to, in the order of the sources; with images a zip
archive of `rows.jsonl` and the images. Equal requests give equal bytes.

Split: a row's place is a hash of the seed and of what the row says. Rows that say the same (as the check for duplicates
understands it) are on one side, whatever else differs; the validation side gets those with the smallest hashes, the
fraction of all rows, rounded, at least one. It has another number only where groups of equal rows do not add up to
that. So rows that are added at the end move few others. Sample: the same with the line in the hash, and exactly as many
rows as asked for.
"""

import hashlib
import json
import os
import posixpath
import sys
import tempfile
import unicodedata
from array import array
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import orjson
from google.protobuf import json_format

from luthier.trainer.v1 import data_pb2
from luthier.v1 import dataset_pb2
from luthier_trainer.data.check import OutOfTime, check, limit_resources
from luthier_trainer.data.doctor.duplicates import content, digests
from luthier_trainer.data.doctor.texts import conversations
from luthier_trainer.data.files.rows import RowFile, open_rows
from luthier_trainer.data.formats import records
from luthier_trainer.data.problem import Problem
from luthier_trainer.data.reading import FileFormat, Format, Reading
from luthier_trainer.data.records import Record, images
from luthier_trainer.data.selection import smallest, smallest_groups

ROWS_NAME = "rows.jsonl"
# Where the rows lie, for each step that the name of an image leads up from them.
_FOLDER = "rows"
_MOST_STEPS = 16
_CHUNK = 1024 * 1024
_TIME = (1980, 1, 1, 0, 0, 0)


class Refused(Exception):
    """What was asked for cannot be made of these sources. The text says why, in a sentence."""


@dataclass(frozen=True, slots=True)
class Source:
    """A dataset's file."""

    path: Path
    reading: Reading


@dataclass(frozen=True, slots=True)
class Item:
    """A row of a source: its number among the sources, its record, and what its file says."""

    source: int
    line: int
    record: Record
    value: dict[str, object]

    @property
    def digest(self) -> bytes:
        """Equal for rows that say the same."""
        return digests(*content(self.record))[1]


def split(source: Source, validation: float, seed: int, output: Path) -> list["Output"]:
    """Writes the training and the validation rows. Raises Refused when there are not enough different rows."""
    if not 0 < validation < 1:
        raise Refused("The validation part must be more than 0 and less than 1 of the rows, such as 0.1.")
    keys = array("Q", (_key(seed, item.digest) for item in _items([source])))
    if len(keys) < 2:
        raise Refused("The dataset has one row; a split needs two.")
    count = min(max(int(validation * len(keys) + 0.5), 1), len(keys) - 1)
    is_validation = smallest_groups(keys, count)
    if is_validation is None:
        raise Refused("All rows of the dataset are equal: one part of a split would repeat the other.")
    del keys
    with Output(output / "0", [source]) as training, Output(output / "1", [source]) as held_out:
        for item in _items([source]):
            (held_out if is_validation(_key(seed, item.digest)) else training).add(item)
        training.finish()
        held_out.finish()
    return [training, held_out]


def sample(source: Source, rows: int, seed: int, output: Path) -> list["Output"]:
    """Writes exactly that many rows. Raises Refused when there are fewer."""
    if rows < 1:
        raise Refused("A sample has one row at least.")
    keys = array("Q", (_key(seed, item.digest, item.line) for item in _items([source])))
    if rows > len(keys):
        raise Refused(f"The dataset has {len(keys):,} rows, which is less than the {rows:,} to sample.")
    take = smallest(keys, rows)
    del keys
    return [_written(output / "0", [source], lambda item: take(_key(seed, item.digest, item.line)))]


def concatenate(sources: Sequence[Source], output: Path) -> list["Output"]:
    """Writes the rows of all sources, one source after the other. Raises Refused when their formats differ."""
    return [_written(output / "0", sources, lambda _: True)]


class Output:
    """A file that is being made, at `path`. `reading` is how it is to be read once it is finished."""

    def __init__(self, path: Path, sources: Sequence[Source]) -> None:
        self.path = path
        self.reading = Reading(FileFormat.JSONL)
        self._sources = sources
        self._stack = ExitStack()
        self._open: dict[int, RowFile] = {}
        # By the normalised name, as several spellings may mean one image: a spelling for each source that has it.
        self._images: dict[str, dict[int, str]] = {}

    def __enter__(self) -> Self:
        self._file = self._stack.enter_context(open(self.path, "xb", buffering=_CHUNK))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def add(self, item: Item) -> None:
        """Appends a row. Raises Refused when an image that it names is missing, or is another one than one of that name
        from an earlier source."""
        for _, conversation in conversations(item.record):
            for name in images(conversation):
                if not name.startswith("data:"):
                    self._refer(name, item)
        self._file.write(_line(item.value))

    def finish(self) -> None:
        """Completes the file and puts it on the disk."""
        if self._images:
            self._archive()
        self._file.flush()
        os.fsync(self._file.fileno())

    def _refer(self, name: str, item: Item) -> None:
        known = self._images.setdefault(_normalised(name), {})
        if item.source in known:
            return
        if not self._rows(item.source).has_image(name):
            raise Refused(f"The image {json.dumps(name)} of line {item.line} is not in the dataset.")
        if known and self._image(known) != self._rows(item.source).image(name):
            raise Refused(f"Two of the datasets have different images named {json.dumps(name)}. Rename one of them.")
        known[item.source] = name

    def _image(self, spellings: Mapping[int, str]) -> bytes:
        source = min(spellings)
        return self._rows(source).image(spellings[source])

    def _rows(self, source: int) -> RowFile:
        if source not in self._open:
            one = self._sources[source]
            self._open[source] = self._stack.enter_context(open_rows(one.path, one.reading))
        return self._open[source]

    def _archive(self) -> None:
        """Puts the rows into an archive with the images; nothing in it depends on when or where it was made."""
        folder, members = self._members()
        self._file.close()
        plain = self.path.with_name(f"{self.path.name}.rows")
        self.path.rename(plain)
        self._file = self._stack.enter_context(open(self.path, "xb"))  # noqa: SIM115
        with ZipFile(self._file, "w", ZIP_STORED) as archive:
            with (
                archive.open(ZipInfo(posixpath.join(folder, ROWS_NAME), _TIME), "w", force_zip64=True) as member,
                open(plain, "rb") as rows,
            ):
                while chunk := rows.read(_CHUNK):
                    member.write(chunk)
            for name, spellings in sorted(members.items()):
                archive.writestr(ZipInfo(name, _TIME), self._image(spellings))
        plain.unlink()
        self.reading = Reading(FileFormat.ZIP)

    def _members(self) -> tuple[str, dict[str, Mapping[int, str]]]:
        """The folder of the rows, and each image by its name in the archive. Rows stay as they are, so names that lead
        up from them need a folder that they can lead out of. Raises Refused for names that cannot stay."""
        steps = max(_steps_up(name) for name in self._images)
        if steps > _MOST_STEPS:
            raise Refused(f"An image's name leads up more than {_MOST_STEPS} folders. Write a shorter one.")
        folder = "/".join([_FOLDER] * steps)
        members: dict[str, Mapping[int, str]] = {}
        for name, spellings in self._images.items():
            member = posixpath.normpath(posixpath.join(folder, name))
            if member == posixpath.join(folder, ROWS_NAME):
                raise Refused(f"An image of the dataset is named {ROWS_NAME}, as the file of rows would be. Rename it.")
            if member[1:2] == ":":
                raise Refused(f"The image {json.dumps(name)} has the name of a drive. Rename its folder.")
            if member in members and self._image(members[member]) != self._image(spellings):
                raise Refused(f"Two images would both be named {json.dumps(member)}. Rename one of them.")
            members[member] = spellings
        return folder, members


def _normalised(name: str) -> str:
    """The same for all names of one image, as the reader of archives understands them."""
    return unicodedata.normalize("NFC", posixpath.normpath(name.replace("\\", "/")))


def _steps_up(name: str) -> int:
    return name.split("/").count("..")


def _written(path: Path, sources: Sequence[Source], take: Callable[[Item], bool]) -> Output:
    with Output(path, sources) as output:
        for item in _items(sources):
            if take(item):
                output.add(item)
        output.finish()
    return output


def _items(sources: Sequence[Source]) -> Iterator[Item]:
    """The rows of the sources. Raises Refused when a row has an error, or a source another format than the first."""
    first: Format | None = None
    for number, source in enumerate(sources):
        with records(source.path, source.reading) as rows:
            for line, record, value in rows:
                if isinstance(record, Problem) or value is None:
                    what = record.message if isinstance(record, Problem) else "It cannot be read."
                    raise Refused(f"Line {line} of a dataset has an error: {what}")
                found = rows.reading.format
                first = first or found
                if found is not first:
                    raise Refused(
                        f"The datasets have different formats ({first} and {found}). Bring them into one format first."
                    )
                yield Item(number, line, record, value)


def _key(seed: int, digest: bytes, line: int | None = None) -> int:
    text = b"%d %b" % (seed, digest) if line is None else b"%d %b %d" % (seed, digest, line)
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def _line(value: dict[str, object]) -> bytes:
    try:
        return orjson.dumps(value, _plain, orjson.OPT_APPEND_NEWLINE)
    except TypeError:  # more than 254 levels
        return json.dumps(value, default=_plain, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _plain(value: object) -> str:
    """What only tables hold, as text."""
    return b64encode(value).decode() if isinstance(value, bytes) else str(value)


def derive(request: Mapping[str, Any], output: Path) -> data_pb2.DeriveReport:
    """Makes and checks what a request asks for; a report with a problem and no file when that cannot be.

    Raises KeyError, TypeError or ValueError for a request of another form, and OSError.
    """
    sources = [
        Source(
            Path(one["path"]), Reading.from_proto(json_format.ParseDict(one["reading"], dataset_pb2.DatasetReading()))
        )
        for one in request["sources"]
    ]
    try:
        match request["operation"]:
            case "split":
                outputs = split(sources[0], float(request["validation"]), int(request["seed"]), output)
            case "sample":
                outputs = sample(sources[0], int(request["rows"]), int(request["seed"]), output)
            case "concatenate":
                outputs = concatenate(sources, output)
            case operation:
                raise ValueError(f"there is no operation {operation!r}")
        formats = _format(sources[0])
        return data_pb2.DeriveReport(files=[_checked(each, formats) for each in outputs])
    except Refused as refused:
        return data_pb2.DeriveReport(problem=str(refused))
    except MemoryError:
        return data_pb2.DeriveReport(
            problem="The datasets do not fit in memory. Write them as JSONL, one object a line."
        )
    except OutOfTime:
        return data_pb2.DeriveReport(problem="The datasets are too large: it took too long and was stopped.")


def _format(source: Source) -> Format | None:
    with records(source.path, source.reading) as rows:
        next(iter(rows))
        return rows.reading.format


def _checked(output: Output, record_format: Format | None) -> data_pb2.DerivedFile:
    reading = Reading(output.reading.file_format, record_format)
    with tempfile.TemporaryDirectory(prefix="check-", dir=output.path.parent) as scratch:
        report = check(output.path, reading, Path(scratch))
    with open(output.path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    size = output.path.stat().st_size
    return data_pb2.DerivedFile(path=str(output.path), sha256=sha256, size_bytes=size, report=report)


def main(arguments: list[str]) -> int:
    """The command; returns its exit code: 2, and a line on standard error, when the request cannot be understood or a
    file cannot be read or written."""
    if len(arguments) != 2:
        sys.stderr.write("usage: python -m luthier_trainer.data.derive REQUEST_FILE OUTPUT_DIR\n")
        return 2
    limit_resources()
    try:
        report = derive(json.loads(Path(arguments[0]).read_bytes()), Path(arguments[1]))
    except OSError as error:
        sys.stderr.write(f"cannot read or write a file: {error.strerror}\n")
        return 2
    except (KeyError, TypeError, ValueError, json_format.ParseError) as error:
        sys.stderr.write(f"cannot understand the request: {error!r}\n")
        return 2
    sys.stdout.buffer.write(report.SerializeToString())
    sys.stdout.buffer.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
