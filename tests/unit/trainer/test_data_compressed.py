"""gzip and zstd: what is in them is read as if it lay there open, and no more of it than may be."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from luthier_trainer.data.files import compressed
from luthier_trainer.data.files.rows import Row, open_rows
from luthier_trainer.data.problem import Problem
from luthier_trainer.data.reading import FileFormat, Reading

GOOD = b'{"prompt": "a", "completion": "b"}\n'


def zstd(content: bytes) -> bytes:
    packed: bytes = pa.compress(content, "zstd", asbytes=True)
    return packed


def skippable(content: bytes) -> bytes:
    return struct.pack("<II", 0x184D2A53, len(content)) + content


def read(tmp_path: Path, content: bytes, **reading: Any) -> tuple[FileFormat, list[Row]]:
    path = tmp_path / "blob"
    path.write_bytes(content)
    with open_rows(path, Reading(**reading)) as file:
        return file.file_format, list(file)


def problems(found: list[Row]) -> list[tuple[int, str]]:
    return [(row.line, row.value.code) for row in found if isinstance(row.value, Problem)]


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
@pytest.mark.parametrize(
    ("content", "file_format"),
    [
        (GOOD * 50_000, FileFormat.JSONL),
        (b"[" + b",".join([GOOD] * 50_000) + b"]", FileFormat.JSON),
        (b"prompt,completion\n" + b"a,b\n" * 50_000, FileFormat.CSV),
    ],
)
def test_text_is_read_through_compression(tmp_path: Path, pack: Any, content: bytes, file_format: FileFormat) -> None:
    found_format, found = read(tmp_path, pack(content))
    assert found_format is file_format
    assert len(found) == 50_000
    assert found[-1].value == {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_tables_are_read_through_compression(tmp_path: Path, pack: Any) -> None:
    table = pa.table({"prompt": ["a", "b"], "completion": ["c", "d"]})
    sink = pa.BufferOutputStream()
    parquet.write_table(table, sink)
    expected = [{"prompt": "a", "completion": "c"}, {"prompt": "b", "completion": "d"}]
    file_format, found = read(tmp_path, pack(sink.getvalue().to_pybytes()))
    assert (file_format, [row.value for row in found]) == (FileFormat.PARQUET, expected)
    for new in (pa.ipc.new_file, pa.ipc.new_stream):
        sink = pa.BufferOutputStream()
        with new(sink, table.schema) as writer:
            writer.write_table(table)
        file_format, found = read(tmp_path, pack(sink.getvalue().to_pybytes()))
        assert (file_format, [row.value for row in found]) == (FileFormat.ARROW, expected)


def test_members_frames_and_padding_are_one_file(tmp_path: Path) -> None:
    half = GOOD[:20]
    members = (
        gzip.compress(GOOD + half, mtime=0) + gzip.compress(b"") * 100 + gzip.compress(GOOD[20:]) + b"\0" * 100_000
    )
    assert len(read(tmp_path, members)[1]) == 2
    assert len(read(tmp_path, members + gzip.compress(GOOD, mtime=0))[1]) == 3
    frames = skippable(b"first") + zstd(GOOD + half) + skippable(b"x") + zstd(b"") + zstd(GOOD[20:])
    assert [row.value for row in read(tmp_path, frames)[1]] == [{"prompt": "a", "completion": "b"}] * 2


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_what_is_cut_off_or_broken_is_said_after_the_rows_before_it(tmp_path: Path, pack: Any) -> None:
    lines = b"".join(b'{"prompt": "%d", "completion": "b"}\n' % (n * 7919 % 100_003) for n in range(50_000))
    packed = pack(lines)
    found = read(tmp_path, packed[: len(packed) * 3 // 4])[1]
    assert problems(found) == [(0, "BROKEN_FILE")]
    assert len(found) > 1000
    if pack is gzip.compress:  # zstd has no checksum unless asked for
        middle = len(packed) // 2
        found = read(tmp_path, packed[:middle] + b"\xa5" * 64 + packed[middle + 64 :])[1]
        assert found[-1].line == 0 and problems(found)[-1] == (0, "BROKEN_FILE")
    assert problems(read(tmp_path, pack(GOOD) + b"junk that is none")[1]) == [(0, "BROKEN_FILE")]


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_a_bomb_ends_where_the_limit_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pack: Any) -> None:
    monkeypatch.setattr(compressed, "RATIO_FROM", 1024**2)
    packed = pack(b"\n" * 4_000_000)
    found = read(tmp_path, packed)[1]
    assert problems(found) == [(0, "FILE_TOO_LARGE")]
    assert len(found) == 1
    monkeypatch.setattr(compressed, "MAX_UNPACKED_BYTES", 1000)
    assert problems(read(tmp_path, pack(GOOD * 100))[1]) == [(0, "FILE_TOO_LARGE")]


def test_a_ratio_that_data_reach_is_no_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed, "RATIO_FROM", 1024)
    lines = b"".join(b'{"prompt": "%d", "completion": "b"}\n' % (n * 7919 % 100_003) for n in range(20_000))
    assert len(read(tmp_path, gzip.compress(lines, mtime=0))[1]) == 20_000


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_what_is_compressed_twice_is_refused(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    content = pack(gzip.compress(GOOD))
    assert problems(read(tmp_path, content)[1]) == [(0, "UNKNOWN_FILE_FORMAT")]


def test_a_window_that_takes_a_gigabyte_is_refused(tmp_path: Path) -> None:
    # A frame of one raw block that asks for a window of 2 GiB.
    frame = b"\x28\xb5\x2f\xfd" + bytes([0, 21 << 3]) + struct.pack("<I", len(GOOD) << 3 | 1)[:3] + GOOD
    assert problems(read(tmp_path, frame)[1]) == [(0, "BROKEN_FILE")]
    frame = b"\x28\xb5\x2f\xfd" + bytes([0, 10 << 3]) + struct.pack("<I", len(GOOD) << 3 | 1)[:3] + GOOD
    assert len(read(tmp_path, frame)[1]) == 1


def test_no_file_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.table({"text": ["a"] * 10}), sink)
    assert len(read(tmp_path, gzip.compress(sink.getvalue().to_pybytes()))[1]) == 10
    assert list(scratch.iterdir()) == []
