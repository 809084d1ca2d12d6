"""Files are hashed once while they stay as they are, and none outside of its folder is given out."""

import hashlib
import os
from pathlib import Path

import pytest

from luthier.v1.model_pb2 import ModelFile
from luthier_server.errors import NotFound
from luthier_server.files import Files, noted


async def test_a_file_is_not_read_again_while_it_stays_as_it_is(tmp_path: Path) -> None:
    files = Files()
    path = tmp_path / "folder" / "model.bin"
    path.parent.mkdir()
    path.write_bytes(b"first")
    [first] = await files.below(tmp_path)
    assert (first.name, first.size_bytes) == ("folder/model.bin", 5)
    assert first.sha256 == hashlib.sha256(b"first").hexdigest()
    path.chmod(0)
    if not os.access(path, os.R_OK):  # root may read everything
        assert await files.below(tmp_path) == [first]
    path.chmod(0o600)
    status = path.stat()
    with open(path, "r+b") as file:  # unseen, which is why no file of a model is ever written to
        file.write(b"other")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert await files.below(tmp_path) == [first]


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
