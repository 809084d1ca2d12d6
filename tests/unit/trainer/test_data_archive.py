"""A zip with rows and images: only what lies in it is read, and nothing is ever written."""

import gzip
import io
import json
import os
import stat
import struct
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from luthier_trainer.data.files import archive, compressed
from luthier_trainer.data.files.rows import Row, open_rows
from luthier_trainer.data.problem import Problem
from luthier_trainer.data.reading import FileFormat, Reading

GOOD = b'{"prompt": "a", "completion": "b"}\n'
PNG = b"\x89PNG\r\n\x1a\n"
Members = dict[str, bytes]


def packed(members: Members, compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", compression) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return sink.getvalue()


def with_member(name: str, content: bytes = b"", mode: int = 0, **fields: Any) -> bytes:
    """An archive of rows and a member that is not as it should be."""
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as file:
        file.writestr("rows.jsonl", GOOD)
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        for field, value in fields.items():
            setattr(info, field, value)
        file.writestr(info, content)
    return sink.getvalue()


def path_of(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "blob"
    path.write_bytes(content)
    return path


def read(tmp_path: Path, content: bytes, **reading: Any) -> list[Row]:
    with open_rows(path_of(tmp_path, content), Reading(**reading)) as file:
        assert file.file_format is FileFormat.ZIP
        return list(file)


def problems(found: list[Row]) -> list[tuple[int, str]]:
    return [(row.line, row.value.code) for row in found if isinstance(row.value, Problem)]


def table() -> bytes:
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.table({"prompt": ["a"], "completion": ["b"]}), sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", GOOD),
        ("data/train.json", b"[" + GOOD + b"]"),
        ("a/b/c.CSV", b"prompt,completion\na,b\n"),
        ("rows.jsonl.gz", gzip.compress(GOOD, mtime=0)),
        ("rows.parquet", table()),
        ("rows.parquet.gz", gzip.compress(table(), mtime=0)),
        ("without an ending", GOOD),
    ],
)
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_any_file_of_rows_is_read_from_an_archive(tmp_path: Path, name: str, content: bytes, compression: int) -> None:
    beside = {
        "README.md": b"# hi",
        "__MACOSX/._rows.jsonl": b"x",
        ".hidden.jsonl": GOOD,
        "img/1.png": PNG,
        "dataset_info.json": b"{}",
    }
    found = read(tmp_path, packed({name: content, **beside}, compression))
    assert [row.value for row in found] == [{"prompt": "a", "completion": "b"}]


def test_images_are_found_from_the_folder_of_the_rows_and_from_the_root(tmp_path: Path) -> None:
    images = {"set/img/1.png": b"one", "img/2.png": b"two", "img/1.png": b"other", "e\u0301.png": b"e"}
    members = {"set/rows.jsonl": GOOD, **images}
    with open_rows(path_of(tmp_path, packed(members))) as file:
        for name in ("img/1.png", "./img/1.png", "img//1.png", "img\\1.png", "img/../img/1.png"):
            assert file.has_image(name)
            assert file.image(name) == b"one"
        assert file.image("img/2.png") == file.image("../img/2.png") == b"two"
        assert file.image("\u00e9.png") == b"e"
        for name in ("", "3.png", "/img/2.png", "C:\\img\\2.png", "../../img/2.png", "img/1.png\0", "img", "x" * 9999):
            assert not file.has_image(name)
            with pytest.raises(KeyError):
                file.image(name)


def test_the_sample_with_images_works_as_an_archive(tmp_path: Path) -> None:
    samples = Path("/work/shared/data")
    if not (samples / "mllm_demo.json").exists():
        pytest.skip("no samples here")
    members = {f"mllm_demo_data/{n}.jpg": (samples / f"mllm_demo_data/{n}.jpg").read_bytes() for n in (1, 2, 3)}
    members["mllm_demo.json"] = (samples / "mllm_demo.json").read_bytes()
    with open_rows(path_of(tmp_path, packed(members))) as file:
        names = [name for row in file if isinstance(row.value, dict) for name in row.value["images"]]  # type: ignore[attr-defined]
        assert len(names) >= 6
        assert all(file.image(name).startswith(b"\xff\xd8") for name in names)


@pytest.mark.parametrize(
    ("member", "code"),
    [
        ({"name": "/etc/passwd"}, "UNSAFE_MEMBER"),
        ({"name": "../up.png"}, "UNSAFE_MEMBER"),
        ({"name": "a/../../up.png"}, "UNSAFE_MEMBER"),
        ({"name": "a\\..\\..\\up.png"}, "UNSAFE_MEMBER"),
        ({"name": "C:\\up.png"}, "UNSAFE_MEMBER"),
        ({"name": "link.png", "content": b"/etc/passwd", "mode": stat.S_IFLNK | 0o777}, "UNSAFE_MEMBER"),
        ({"name": ".hidden/link", "content": b"/etc", "mode": stat.S_IFLNK | 0o777}, "UNSAFE_MEMBER"),
        ({"name": "pipe.png", "mode": stat.S_IFIFO | 0o644}, "UNSAFE_MEMBER"),
        ({"name": "x.png", "compress_type": zipfile.ZIP_BZIP2}, "UNKNOWN_COMPRESSION"),
        ({"name": "x.png", "compress_type": zipfile.ZIP_LZMA}, "UNKNOWN_COMPRESSION"),
        ({"name": "./rows.jsonl"}, "DUPLICATE_MEMBER"),
    ],
)
def test_a_member_that_is_not_to_be_trusted_is_said_and_never_read(
    tmp_path: Path, member: dict[str, Any], code: str
) -> None:
    path = path_of(tmp_path, with_member(**member))
    with open_rows(path) as file:
        found = list(file)
        assert problems(found) == [(0, code)]
        assert found[-1].value == {"prompt": "a", "completion": "b"}
        assert member["name"] == "./rows.jsonl" or not file.has_image(member["name"])
    assert os.listdir(tmp_path) == ["blob"]


def test_an_encrypted_member_is_said(tmp_path: Path) -> None:
    content = bytearray(with_member("x.png", PNG))
    place = content.rindex(b"PK\x01\x02")
    content[place + 8] |= 1
    assert problems(read(tmp_path, bytes(content))) == [(0, "ENCRYPTED_MEMBER")]


def test_members_by_the_thousand_that_are_wrong_are_a_few_findings(tmp_path: Path) -> None:
    members = {"rows.jsonl": GOOD} | {f"../{n}.png": PNG for n in range(3000)}
    found = read(tmp_path, packed(members))
    assert len(found) < 30
    assert "2,980 more" in str(found[-2].value)


@pytest.mark.parametrize(
    ("members", "code"),
    [
        ({}, "NO_ROWS_FILE"),
        ({"1.png": PNG, "LICENSE": b"x"}, "NO_ROWS_FILE"),
        ({"train.jsonl": GOOD, "test.jsonl": GOOD}, "SEVERAL_ROWS_FILES"),
        ({"[Content_Types].xml": b"<xml/>", "xl/workbook.xml": b""}, "UNKNOWN_FILE_FORMAT"),
        ({"rows.jsonl": packed({"rows.jsonl": GOOD})}, "UNKNOWN_FILE_FORMAT"),
        ({"rows.jsonl": b"%PDF-1.3"}, "UNKNOWN_FILE_FORMAT"),
    ],
)
def test_an_archive_without_exactly_one_file_of_rows_is_refused(tmp_path: Path, members: Members, code: str) -> None:
    assert problems(read(tmp_path, packed(members))) == [(0, code)]


def test_bombs_end_at_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed, "RATIO_FROM", 1024**2)
    for name, content in (
        ("rows.jsonl", b"\n" * 4_000_000),
        ("rows.jsonl.gz", gzip.compress(b"\n" * 4_000_000, mtime=0)),
        ("rows.parquet", b"PAR1" + b"\0" * 4_000_000),
    ):
        assert problems(read(tmp_path, packed({name: content}))) == [(0, "FILE_TOO_LARGE")]
    monkeypatch.setattr(archive, "MAX_IMAGE_BYTES", 1000)
    with open_rows(path_of(tmp_path, packed({"rows.jsonl": GOOD, "1.png": b"\0" * 1001}))) as file:
        assert not file.has_image("1.png")


def test_an_image_that_lies_about_its_size_is_no_image(tmp_path: Path) -> None:
    content = bytearray(packed({"rows.jsonl": GOOD, "1.png": b"\0" * 100_000}))
    for magic, offset in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):
        place = content.rindex(magic)
        struct.pack_into("<I", content, place + offset, 10)
    with open_rows(path_of(tmp_path, bytes(content))) as file, pytest.raises(KeyError):
        file.image("1.png")


def test_a_broken_archive_is_said_after_the_rows_before_it(tmp_path: Path) -> None:
    lines = b"".join(json.dumps({"text": os.urandom(50).hex()}).encode() + b"\n" for _ in range(30_000))
    content = bytearray(packed({"rows.jsonl": lines}))
    assert problems(read(tmp_path, bytes(content[: len(content) // 2]))) == [(0, "BROKEN_FILE")]
    content[len(content) // 2] ^= 0xFF
    found = read(tmp_path, bytes(content))
    assert found[-1].line == 0
    assert problems(found)[-1] == (0, "BROKEN_FILE")
    assert len(found) > 1000
