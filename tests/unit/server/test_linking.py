"""A linked directory is there whole or not at all."""

import os
from pathlib import Path

import pytest

from luthier_server import linking


def folder(path: Path) -> Path:
    path.mkdir()
    for name in ("a", "b"):
        (path / name).write_text(name)
    return path


def test_a_directory_that_a_dying_server_left_half_linked_is_linked_anew(tmp_path: Path) -> None:
    source, target = folder(tmp_path / "checkpoint"), tmp_path / "job" / "source"
    half = tmp_path / "job" / ".new-source"
    half.mkdir(parents=True)
    (half / "foreign").touch()
    linking.link_tree(source, target)
    assert sorted(os.listdir(target)) == ["a", "b"]
    assert os.listdir(target.parent) == ["source"]
    assert (target / "a").samefile(source / "a")


def test_a_directory_whose_files_go_meanwhile_is_not_half_linked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = folder(tmp_path / "checkpoint"), tmp_path / "source"
    link = os.link

    def meanwhile(one: str, other: str) -> None:
        link(one, other)
        for each in source.iterdir():
            each.unlink()

    monkeypatch.setattr(os, "link", meanwhile)
    with pytest.raises(OSError, match="No such file"):
        linking.link_tree(source, target)
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_a_file_system_without_links_is_copied_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(one: str, other: str) -> None:
        raise PermissionError(one)

    monkeypatch.setattr(os, "link", refused)
    linking.link_tree(folder(tmp_path / "checkpoint"), tmp_path / "source")
    assert (tmp_path / "source" / "b").read_text() == "b"
