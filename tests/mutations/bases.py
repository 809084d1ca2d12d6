"""What is mutated: the samples of every format, as files of every kind."""

import gzip
import io
import json
import zipfile
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

_SAMPLES = Path(__file__).parents[1] / "samples" / "datasets"
_DATE = (2026, 1, 1, 0, 0, 0)
_IN_TABLES = ("messages.jsonl", "sharegpt.json", "text.jsonl", "instruction.json")

Row = dict[str, Any]


@lru_cache(maxsize=1)
def bases() -> dict[str, bytes]:
    """Every base by its name; the ending says what kind of file it is."""
    found = {path.name: path.read_bytes() for path in sorted(_SAMPLES.iterdir()) if path.suffix in _ENDINGS}
    for name in list(found):
        if name.endswith(".jsonl"):
            found[f"{name[:-1]}-array.json"] = json.dumps(rows(name, found[name]), indent=1).encode()
    found["prompt.csv"] = b'prompt;completion\r\n"one; two";three\r\n"with ""quotes""";"a\nline"\r\n'
    for name in _IN_TABLES:
        table = pa.Table.from_pylist(rows(name, found[name]) * 20)
        stem = name.partition(".")[0]
        found[f"{stem}.parquet"] = parquet(table)
        found[f"{stem}.arrow"] = arrow(table)
        found[f"{stem}.arrows"] = arrow(table, stream=True)
    found["images.zip"] = zipped(
        {
            path.relative_to(_SAMPLES / "images").as_posix(): path.read_bytes()
            for path in sorted((_SAMPLES / "images").rglob("*"))
            if path.is_file()
        }
    )
    for name in ("messages.jsonl", "sharegpt.json", "question-answer.csv", "messages.parquet"):
        found[f"{name}.gz"] = gzip.compress(found[name], mtime=0)
        found[f"{name}.zst"] = zstandard.compress(found[name])
    return found


_ENDINGS = (".jsonl", ".json", ".csv")


def names(*endings: str) -> list[str]:
    """The bases with one of these endings; all without any."""
    return [name for name in bases() if name.endswith(endings or ("",))]


def pick(random: Random, *endings: str) -> tuple[str, bytes]:
    """A base with one of these endings."""
    name = random.choice(names(*endings))
    return name, bases()[name]


def rows(name: str, content: bytes) -> list[Row]:
    """The rows of a JSON or JSONL base."""
    found = json.loads(content) if name.endswith(".json") else [json.loads(line) for line in content.splitlines()]
    return list(found)


def lines(many: list[Row]) -> bytes:
    """Rows as JSONL."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in many)


def parquet(table: pa.Table, **options: Any) -> bytes:
    """A table as Parquet."""
    file = io.BytesIO()
    pq.write_table(table, file, **options)
    return file.getvalue()


def arrow(table: pa.Table, *, stream: bool = False) -> bytes:
    """A table as an Arrow file, or as a stream."""
    file = io.BytesIO()
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(file, table.schema) as writer:
        writer.write_table(table)
    return file.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    """A sound archive."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name, _DATE), content)
    return file.getvalue()
