"""Folders with images become one zip: the same one each time, and nothing from outside."""

import hashlib
import os
import zipfile
from pathlib import Path

import pytest
from unit.client.fake_server import FakeServer

from luthier_client import Client
from luthier_client.folder import packed_folder, packed_with_images
from luthier_client.upload import open_upload


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    (root / "images" / "deep").mkdir(parents=True)
    (root / "rows.jsonl").write_text('{"messages": []}\n')
    (root / "images" / "b.jpg").write_bytes(b"b" * 1000)
    (root / "images" / "deep" / "a.PNG").write_bytes(b"a" * 10)
    return root


def members(path: Path) -> dict[str, bytes]:
    with packed_folder(path) as file, zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_a_folder_becomes_its_rows_and_images_sorted_and_stored(folder: Path) -> None:
    assert list(members(folder)) == ["images/b.jpg", "images/deep/a.PNG", "rows.jsonl"]
    with packed_folder(folder) as file, zipfile.ZipFile(file) as archive:
        assert {each.compress_type for each in archive.infolist()} == {zipfile.ZIP_STORED}


def test_the_same_content_has_the_same_hash_whenever_and_wherever_it_is_packed(folder: Path, tmp_path: Path) -> None:
    first = open_upload(folder)
    for path in folder.rglob("*"):
        os.utime(path, (1e9, 1e9))
        path.chmod(0o700)
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    second = open_upload(moved)
    first.close()
    second.close()
    assert (first.name, second.name) == ("photos", "elsewhere")
    assert first.sha256 == second.sha256


def test_nothing_hidden_foreign_or_outside_gets_into_the_zip(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "c.png").write_bytes(b"secret")
    (folder / "out.png").symlink_to(secret)
    (folder / "others").symlink_to(tmp_path / "others")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "in.png").symlink_to(folder / "images" / "b.jpg")
    (folder / ".env").write_text("TOKEN=1")
    (folder / ".git").mkdir()
    (folder / ".git" / "x.png").write_bytes(b"x")
    (folder / "README.md").write_text("read me")
    (folder / "dataset_info.json").write_text("{}")
    os.mkfifo(folder / "pipe.png")
    found = members(folder)
    assert set(found) == {"images/b.jpg", "images/deep/a.PNG", "in.png", "rows.jsonl"}
    assert b"secret" not in found.values()


def test_a_folder_has_exactly_one_file_of_rows(folder: Path, tmp_path: Path) -> None:
    (folder / "more.csv.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"there are 2: more.csv.gz, rows.jsonl; leave one"):
        packed_folder(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="there is none"):
        packed_folder(tmp_path / "empty")


def test_images_are_named_as_the_rows_see_them(folder: Path, tmp_path: Path) -> None:
    with packed_with_images(folder / "rows.jsonl", folder / "images") as file, zipfile.ZipFile(file) as archive:
        assert archive.namelist() == ["images/b.jpg", "images/deep/a.PNG", "rows.jsonl"]
    rows = tmp_path / "apart" / "train.json"
    rows.parent.mkdir()
    rows.write_text("[]")
    with packed_with_images(rows, folder / "images") as file, zipfile.ZipFile(file) as archive:
        assert archive.namelist() == ["b.jpg", "deep/a.PNG", "train.json"]
    with pytest.raises(ValueError, match="no images"):
        packed_with_images(rows, rows.parent)
    with pytest.raises(NotADirectoryError):
        packed_with_images(rows, rows)


def test_a_folder_is_uploaded_as_what_it_was_packed_to(own_server: FakeServer, folder: Path) -> None:
    with packed_folder(folder) as file:
        file.seek(0)
        sha256 = hashlib.sha256(file.read()).hexdigest()
    with Client(own_server.endpoint) as client:
        assert client.upload_dataset(folder).sha256 == sha256
        assert client.upload_dataset(folder / "rows.jsonl", images=folder / "images").sha256 == sha256
        with pytest.raises(ValueError, match="images go with"):
            client.upload_dataset(folder, images=folder)
