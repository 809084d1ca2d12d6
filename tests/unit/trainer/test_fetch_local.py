"""Files of the server's own disks, below the folders that the operator allows."""

import os
from pathlib import Path

import pytest

from luthier_trainer.data.fetching import local
from luthier_trainer.data.fetching.output import Output
from luthier_trainer.data.fetching.reports import Reports
from luthier_trainer.data.fetching.request import FetchError, Request


class Fetching:
    """Fetches by file: URLs, with a root."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        self.root.mkdir()
        self.outside = folder / "outside.jsonl"
        self.outside.write_text("secret\n")
        self.path = folder / "fetched"

    def __call__(self, url: str, roots: list[Path] | None = None, max_bytes: int = 1 << 20) -> str:
        names = tuple(str(root) for root in (roots if roots is not None else [self.root]))
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            with Output(self.path, max_bytes) as output:
                return local.fetch(url, Request(url, max_bytes, roots=names), output, Reports(null))
        finally:
            os.close(null)

    def refused(self, url: str, roots: list[Path] | None = None, max_bytes: int = 1 << 20) -> str:
        with pytest.raises(FetchError) as error:
            self(url, roots, max_bytes)
        assert self.path.read_bytes() == b""
        return error.value.reason


@pytest.fixture
def fetching(tmp_path: Path) -> Fetching:
    return Fetching(tmp_path)


def test_a_file_below_a_root_is_copied(fetching: Fetching) -> None:
    file = fetching.root / "a folder" / "träin#1.jsonl"
    file.parent.mkdir()
    file.write_text("{}\n")
    source = fetching(f"file://{fetching.root}/a%20folder/tr%C3%A4in%231.jsonl")
    assert fetching.path.read_text() == "{}\n"
    assert source == f"file://{fetching.root}/a%20folder/tr%C3%A4in%231.jsonl"
    assert fetching.path.stat().st_ino != file.stat().st_ino
    assert fetching.path.stat().st_nlink == 1


def test_a_root_may_itself_be_a_link(fetching: Fetching, tmp_path: Path) -> None:
    (fetching.root / "a.jsonl").write_text("{}\n")
    (tmp_path / "shared").symlink_to(fetching.root)
    fetching(f"file://{tmp_path}/shared/a.jsonl", [tmp_path / "shared"])
    fetching(f"file://{tmp_path}/shared/a.jsonl")
    assert fetching.path.read_text() == "{}\n"


@pytest.mark.parametrize(
    "path",
    ["/../outside.jsonl", "/%2e%2e/outside.jsonl", "/link.jsonl", "/folder/outside.jsonl", "", "/", "/../root2/x"],
)
def test_nothing_outside_of_the_roots_is_read_however_it_is_named(
    fetching: Fetching, tmp_path: Path, path: str
) -> None:
    (fetching.root / "link.jsonl").symlink_to(fetching.outside)
    (fetching.root / "folder").symlink_to(tmp_path)
    (tmp_path / "root2").mkdir()
    (tmp_path / "root2" / "x").write_text("secret\n")
    assert fetching.refused(f"file://{fetching.root}{path}") == "PATH_NOT_ALLOWED"


def test_what_exists_outside_is_not_told(fetching: Fetching, tmp_path: Path) -> None:
    there = fetching.refused(f"file://{fetching.outside}")
    assert there == fetching.refused(f"file://{tmp_path}/nothing.jsonl") == "PATH_NOT_ALLOWED"
    assert fetching.refused("file:///etc/passwd", []) == "PATH_NOT_ALLOWED"


def test_a_link_that_is_swapped_in_after_the_check_is_not_followed(
    fetching: Fetching, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = fetching.root / "folder" / "a.jsonl"
    file.parent.mkdir()
    file.write_text("{}\n")
    elsewhere = fetching.root.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "a.jsonl").write_text("secret\n")
    real = os.path.realpath

    def swapping(path: str) -> str:
        found = real(path)
        if found == str(file):
            file.parent.rename(fetching.root / "moved")
            (fetching.root / "folder").symlink_to(elsewhere)
        return found

    monkeypatch.setattr(os.path, "realpath", swapping)
    assert fetching.refused(f"file://{file}") == "PATH_NOT_ALLOWED"


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_what_is_no_regular_file_is_refused_and_never_waited_for(fetching: Fetching, kind: str) -> None:
    path = fetching.root / "a"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        assert fetching.refused("file:///dev/zero", [Path("/dev")]) == "NOT_A_FILE"
        return
    assert fetching.refused(f"file://{path}") == "NOT_A_FILE"


def test_a_file_over_the_limit_is_refused(fetching: Fetching) -> None:
    (fetching.root / "a").write_bytes(b"x" * 101)
    assert fetching.refused(f"file://{fetching.root}/a", max_bytes=100) == "TOO_LARGE"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("file://host/etc/passwd", "INVALID_URL"), ("file:relative", "INVALID_URL"), ("file:///a?b", "INVALID_URL"),
        ("file:///a%00b", "INVALID_URL"), ("file:", "INVALID_URL"), ("file:////root/x", "PATH_NOT_ALLOWED"),
    ],
)  # fmt: skip
def test_a_url_that_names_no_path_is_refused(fetching: Fetching, url: str, reason: str) -> None:
    assert fetching.refused(url) == reason


def test_a_file_that_is_not_there_is_not_found(fetching: Fetching) -> None:
    assert fetching.refused(f"file://{fetching.root}/nothing.jsonl") == "NOT_FOUND"
