"""Files of every kind, with bytes changed, cut and repeated: each is read to an end, to rows or findings."""

import contextlib
import gzip
import io
import json
import random
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from luthier_trainer.data.files.rows import open_rows
from luthier_trainer.data.problem import Problem
from luthier_trainer.data.reading import FileFormat, Reading

ROUNDS = 40
MAX_ROWS = 100_000
SECONDS = 10.0

ROWS = [
    {
        "messages": [{"role": "user", "content": f"é {n}" * 3}, {"role": "assistant", "content": 'say "hi",\n' * n}],
        "score": n / 7,
        "tags": ["a", None] * (n % 3),
        "image": {"bytes": None, "path": f"{n}.png"},
    }
    for n in range(12)
]
PAIRS = [{"prompt": f'a "{n}",\nb', "completion": "x" * n} for n in range(12)]


def jsonl() -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


def array() -> bytes:
    return json.dumps(ROWS, indent=1, ensure_ascii=False).encode()


def table(**options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(ROWS), sink, row_group_size=5, **options)
    return bytes(sink.getvalue().to_pybytes())


def arrow(new: Callable[..., Any], compression: str | None = None) -> bytes:
    rows = pa.Table.from_pylist(ROWS)
    rows = rows.append_column("kind", pa.array([str(n % 3) for n in range(12)]).dictionary_encode())
    rows = rows.append_column("map", pa.array([[("k", n)] for n in range(12)], pa.map_(pa.string(), pa.int64())))
    sink = pa.BufferOutputStream()
    with new(sink, rows.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(rows, 5)
    return bytes(sink.getvalue().to_pybytes())


def csv() -> bytes:
    lines = ["prompt;completion"] + ['"' + p["prompt"].replace('"', '""') + '";' + p["completion"] for p in PAIRS]
    return "\r\n".join(lines).encode()


def archive() -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("set/rows.jsonl", jsonl())
        file.writestr("set/1.png", b"\x89PNG" * 10)
        file.writestr("2.png", b"\x89PNG")
    return sink.getvalue()


SAMPLES: dict[str, Callable[[], bytes]] = {
    "jsonl": jsonl,
    "json": array,
    "csv": csv,
    "parquet": table,
    "parquet plain": lambda: table(compression="none", use_dictionary=False),
    "parquet zstd v2": lambda: table(compression="zstd", data_page_version="2.0"),
    "arrow stream": lambda: arrow(pa.ipc.new_stream),
    "arrow file": lambda: arrow(pa.ipc.new_file),
    "arrow zstd": lambda: arrow(pa.ipc.new_stream, "zstd"),
    "arrow lz4": lambda: arrow(pa.ipc.new_file, "lz4"),
    "gzip": lambda: gzip.compress(jsonl(), mtime=0),
    "zstd": lambda: bytes(pa.compress(jsonl(), "zstd", asbytes=True)),
    "parquet gzip": lambda: gzip.compress(table(), mtime=0),
    "zip": archive,
}


def mutated(content: bytes, chance: random.Random) -> bytes:
    """The content with one to five changes."""
    data = bytearray(content)
    for _ in range(chance.randint(1, 5)):
        place = chance.randrange(len(data) + 1)
        size = min(chance.choice((1, 2, 4, 8, 64, 1000)), len(data) - place)
        match chance.randrange(8):
            case 0:
                del data[place:]
            case 1:
                data[place : place + size] = chance.randbytes(size)
            case 2:
                data[place : place + size] = bytes([chance.choice((0, 0xFF, 0x7F, 0x80))]) * size
            case 3:
                data[place:place] = chance.randbytes(size)
            case 4:
                del data[place : place + size]
            case 5:
                data[place:place] = data[place : place + size] * chance.randint(1, 50)
            case 6 if place < len(data):
                data[place] ^= 1 << chance.randrange(8)
            case _:
                data[place:place] = chance.choice((b"[" * 3000, b'{"a":' * 3000, b"\\ud800", b"1e999", b'"', b"\0" * 9))
    return bytes(data)


def read_to_its_end(path: Path, reading: Reading) -> None:
    start = time.monotonic()
    count = 0
    with open_rows(path, reading) as file:
        for row in file:
            count += 1
            assert count <= MAX_ROWS
            assert row.line >= 0
            if isinstance(row.value, Problem):
                assert row.value.message.isprintable() and len(row.value.message) < 1000
                assert row.value.fix.isprintable() and len(row.value.fix) < 1000
            else:
                json.dumps(row.value).encode()
        for name in ("1.png", "2.png"):
            if file.has_image(name):
                with contextlib.suppress(KeyError):
                    file.image(name)
    assert time.monotonic() - start < SECONDS


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_that_is_whole_is_read_without_a_problem(tmp_path: Path, name: str) -> None:
    path = tmp_path / "blob"
    path.write_bytes(SAMPLES[name]())
    with open_rows(path) as file:
        assert sum(isinstance(row.value, dict) for row in file) == 12
        assert not any(isinstance(row.value, Problem) for row in file)


@pytest.mark.parametrize("name", SAMPLES)
def test_no_mutation_of_a_file_makes_a_reader_fail_or_go_on_without_end(tmp_path: Path, name: str) -> None:
    chance = random.Random(name)
    content = SAMPLES[name]()
    path = tmp_path / "blob"
    for _ in range(ROUNDS):
        path.write_bytes(mutated(content, chance))
        read_to_its_end(path, Reading())


@pytest.mark.parametrize("file_format", FileFormat)
def test_no_bytes_read_as_a_format_that_they_are_not_make_a_reader_fail(
    tmp_path: Path, file_format: FileFormat
) -> None:
    chance = random.Random(file_format)
    path = tmp_path / "blob"
    for content in (b"", b"\0", chance.randbytes(5000), *(make() for make in SAMPLES.values())):
        path.write_bytes(content)
        read_to_its_end(path, Reading(file_format, columns={"prompt": "question"}))
