"""What a file is, told from the bytes that it begins with; its name does not matter, datasets are stored under their
hash."""

import codecs
import re
from collections.abc import Mapping
from enum import Enum, auto

import orjson

from luthier_trainer.data.files.csv_rows import delimiter_of, only_column_of
from luthier_trainer.data.files.json_problems import not_utf8
from luthier_trainer.data.files.row import shown
from luthier_trainer.data.problem import Problem
from luthier_trainer.data.reading import FileFormat

ACCEPTED = (
    "Datasets are JSONL, JSON, CSV, Parquet or Arrow, each also compressed with gzip or zstd, or a zip with images."
)

_AS_UTF8 = "Save it as UTF-8 (iconv -f {0} -t UTF-8 FILE > NEW_FILE)."
_AS_CSV = "Export the sheet as CSV (UTF-8)."
_RECOMPRESS = "Unpack it, and compress it with gzip or zstd, or not at all."
_REPACK = "Unpack it, and upload the file of rows, or a zip of it and its images."
_WITH_DATASETS = "Load it in Python, and write it as Parquet or JSONL."
_ONE_COLUMN = {"text", "prompt", "messages", "conversations", "content"}
_LINES = 20


class Kind(Enum):
    """What a file is, as far as its first bytes tell it."""

    TEXT = auto()
    PARQUET = auto()
    ARROW_FILE = auto()
    ARROW_STREAM = auto()
    ZIP = auto()
    GZIP = auto()
    ZSTD = auto()


_KINDS = (
    (re.compile(rb"PAR1"), Kind.PARQUET),
    (re.compile(rb"ARROW1\0\0"), Kind.ARROW_FILE),
    (re.compile(rb"\xff\xff\xff\xff"), Kind.ARROW_STREAM),
    (re.compile(rb"PK(\x03\x04|\x05\x06|\x07\x08)"), Kind.ZIP),
    (re.compile(rb"\x1f\x8b"), Kind.GZIP),
    (re.compile(rb"(\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18)", re.DOTALL), Kind.ZSTD),
)
_UTF_16 = (
    (re.compile(rb"\xff\xfe\0\0|[\t -~]\0\0\0", re.DOTALL), "UTF-32LE"),
    (re.compile(rb"\0\0\xfe\xff|\0\0\0[\t -~]", re.DOTALL), "UTF-32BE"),
    (re.compile(rb"\xff\xfe|[\t\r\n -~]\0[\t\r\n -~]\0", re.DOTALL), "UTF-16LE"),
    (re.compile(rb"\xfe\xff|\0[\t\r\n -~]\0[\t\r\n -~]", re.DOTALL), "UTF-16BE"),
)
_OTHER_FILES = (
    (rb"PARE[^ -~]", "an encrypted Parquet file", "Write it without encryption."),
    (rb"BZh[1-9](1AY&SY|\x17\x72\x45)", "compressed with bzip2", _RECOMPRESS),
    (rb"\xfd7zXZ\0", "compressed with xz", _RECOMPRESS),
    (rb"\x04\x22\x4d\x18", "compressed with lz4", _RECOMPRESS),
    (rb"\xff\x06\0\0sNaPpY", "compressed with Snappy", _RECOMPRESS),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", _REPACK),
    (rb"Rar!\x1a\x07", "a RAR archive", _REPACK),
    (rb".{257}ustar[\0 ]", "a tar archive", _REPACK),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document", _AS_CSV),
    (rb"%PDF", "a PDF", "Extract its text, and write it as JSONL, one object a line."),
    (rb"SQLite format 3\0", "a SQLite database", "Export a query as CSV, or write its rows as JSONL."),
    (rb"FEA1\0", "a Feather file of version 1", "Write it as Feather of version 2, or as Parquet."),
    (rb"ORC[^ -~\s]", "an ORC file", _WITH_DATASETS),
    (rb"Obj\x01", "an Avro file", _WITH_DATASETS),
    (rb"\x89HDF", "an HDF5 file", _WITH_DATASETS),
    (rb"\x93NUMPY", "a NumPy array", _WITH_DATASETS),
    (rb"\x80[\x02-\x05][\x95}\]c]", "a Python pickle", _WITH_DATASETS),
    (rb"GGUF.\0", "a model (GGUF)", "Upload the dataset."),
    (rb".{1,5}\0{3,7}\{\"", "a model (safetensors)", "Upload the dataset."),
    (
        rb"(\x89PNG|\xff\xd8\xff|GIF8|RIFF.{4}WEBP)",
        "an image",
        "Upload a zip with the images and a file of rows that names them.",
    ),
    (rb"\x7fELF", "a program", "Upload the dataset."),
    (
        rb"version https://git-lfs",
        "a pointer of Git LFS, not the file itself",
        "Fetch the file (git lfs pull), and upload that.",
    ),
    (
        rb"(?i)\s*<(!doctype html|html|head|!--)",
        "a web page",
        "Download the file itself: the address may ask for a login.",
    ),
    (rb"\s*<\?xml", "XML", "Write its rows as JSONL, one object a line."),
)
_OTHER_PATTERNS = tuple((re.compile(pattern, re.DOTALL), what, fix) for pattern, what, fix in _OTHER_FILES)


def kind_of(head: bytes) -> Kind | Problem:
    """What a file is that begins so, or what is wrong with that."""
    for pattern, kind in _KINDS:
        if pattern.match(head):
            return kind
    for pattern, what, fix in _OTHER_PATTERNS:
        if pattern.match(head):
            return Problem("UNKNOWN_FILE_FORMAT", f"The file is {what}. {ACCEPTED}", fix)
    for pattern, encoding in _UTF_16:
        if pattern.match(head):
            message = f"The file is {encoding[:6]} text; save it as UTF-8."
            return Problem("NOT_UTF8", message, _AS_UTF8.format(encoding))
    return Kind.TEXT


def text_format(head: bytes, columns: Mapping[str, str]) -> FileFormat | Problem:
    """How a text file is written that begins so, or what is wrong with that. columns: as in `Reading`; a CSV file may
    have one of them alone."""
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if text.startswith(b"["):
        return FileFormat.JSONL if _has_an_array_a_line(text) else FileFormat.JSON
    if not text or text.startswith(b"{"):
        return FileFormat.JSONL
    lines = [line for line in text.splitlines()[: _LINES + 1] if line.strip()][:_LINES]
    if any(_is_json(line, dict) for line in lines):
        return FileFormat.JSONL
    if delimiter_of(head) is not None:
        return _encoding_problem(lines[0]) or FileFormat.CSV
    if (name := only_column_of(head)) is not None and (name.lower() in _ONE_COLUMN or name in columns.values()):
        return FileFormat.CSV
    if _is_json(lines[0], object):
        return FileFormat.JSONL
    return _unknown(lines[0])


def _unknown(line: bytes) -> Problem:
    beginning = line.decode(errors="replace").strip()
    if _encoding_problem(line) or not beginning.replace("\t", "").isprintable():
        return Problem("UNKNOWN_FILE_FORMAT", f"The file is of no kind that is known here. {ACCEPTED}")
    message = f"The file is neither JSON nor CSV with a header; it begins with {shown(beginning)}. {ACCEPTED}"
    fix = 'Write one JSON object a line, plain text as {"text": "..."}; name the file format where it is CSV.'
    return Problem("UNKNOWN_FILE_FORMAT", message, fix)


def _encoding_problem(line: bytes) -> Problem | None:
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return not_utf8("The first line", line[error.start])
    return None


def _has_an_array_a_line(text: bytes) -> bool:
    """Whether the first line is a whole array and more lines follow: JSONL with the wrong kind of rows."""
    first, _, rest = text.partition(b"\n")
    return first.rstrip().endswith(b"]") and rest.lstrip()[:1] not in (b"", b"]", b",") and _is_json(first, list)


def _is_json(text: bytes, kind: type) -> bool:
    if kind is dict and not text.lstrip().startswith(b"{"):
        return False
    try:
        return isinstance(orjson.loads(text), kind)
    except orjson.JSONDecodeError:
        return False
