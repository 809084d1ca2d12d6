"""Files are hashed once while they stay as they are, and none outside of its folder is given out."""

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from luthier.v1.model_pb2 import ModelFile
from luthier_server.errors import NotFound
from luthier_server.files import Files, noted


async def test_a_file_is_not_read_again_while_it_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    digest = hashlib.file_digest

    def counted(file: Any, name: str) -> Any:
        read.append(file.name)
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    files = Files()
    path = tmp_path / "folder" / "model.bin"
    path.parent.mkdir()
    path.write_bytes(b"first")
    found = await files.below(tmp_path)
    assert [(each.name, each.size_bytes) for each in found] == [("folder/model.bin", 5)]
    assert found[0].sha256 == hashlib.sha256(b"first").hexdigest()
    assert await files.below(tmp_path) == found
    assert read == [str(path)]


async def test_a_file_that_was_written_to_and_dated_back_is_hashed_anew(tmp_path: Path) -> None:
    files = Files()
    path = tmp_path / "model.bin"
    path.write_bytes(b"first")
    status = path.stat()
    await files.below(tmp_path)
    path.write_bytes(b"other")
    while path.stat().st_ctime_ns == status.st_ctime_ns:  # the kernel's clock is coarse
        path.chmod(0o600)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    [found] = await files.below(tmp_path)
    assert found.sha256 == hashlib.sha256(b"other").hexdigest()


async def test_a_file_that_was_replaced_is_hashed_anew(tmp_path: Path) -> None:
    files = Files()
    (tmp_path / "model.bin").write_bytes(b"first")
    await files.below(tmp_path)
    (tmp_path / "next").write_bytes(b"other")
    os.replace(tmp_path / "next", tmp_path / "model.bin")
    [found] = await files.below(tmp_path)
    assert found.sha256 == hashlib.sha256(b"other").hexdigest()


@pytest.mark.parametrize("path", ["../other/model.bin", "/etc/passwd", "link/model.bin"])
def test_what_lies_outside_of_an_export_is_no_file_of_it(tmp_path: Path, path: str) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "export" / "link").symlink_to(tmp_path / "other")
    with pytest.raises(NotFound):
        noted(tmp_path / "export", [ModelFile(path=path)])
    [sound] = noted(tmp_path / "export", [ModelFile(path="weights/model.bin", size_bytes=3, sha256="00")])
    assert (sound.path, sound.size_bytes) == ((tmp_path / "export" / "weights" / "model.bin").resolve(), 3)


async def test_a_list_of_files_is_never_short_because_the_model_was_deleted_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    for name in ("a", "b"):
        (directory / name).write_bytes(b"content")
    digest = hashlib.file_digest

    def meanwhile(file: Any, name: str) -> Any:
        directory.rename(tmp_path / ".gone-model")
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", meanwhile)
    with pytest.raises(NotFound, match="deleted meanwhile"):
        await Files().below(directory)
