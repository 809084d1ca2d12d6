"""What a download refuses, without a server: every path and every order that must not be written."""

import hashlib
from pathlib import Path

import pytest

from luthier.v1.model_pb2 import ModelFile
from luthier.v1.models_pb2 import DownloadManifest, DownloadModelResponse, FileChunk
from luthier_client.download import Download
from luthier_client.errors import DownloadDamaged


def manifest(*paths: str, data: bytes = b"data") -> DownloadModelResponse:
    digest = hashlib.sha256(data).hexdigest()
    files = [ModelFile(path=path, size_bytes=len(data), sha256=digest) for path in paths]
    return DownloadModelResponse(manifest=DownloadManifest(files=files))


def chunk(path: str, data: bytes, offset: int = 0) -> DownloadModelResponse:
    return DownloadModelResponse(chunk=FileChunk(path=path, offset=offset, data=data))


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../up", "a/../../up", "", "a//b", "./a", "a/", "C:/x", "C:x", "a\\..\\b", "nul\x00", "a\nb",
     ".luthier-download", "d/.luthier-download"],
)  # fmt: skip
def test_a_path_that_leaves_the_directory_or_is_no_plain_name_is_refused(tmp_path: Path, path: str) -> None:
    with Download(tmp_path / "target") as download, pytest.raises(DownloadDamaged) as caught:
        download.accept(manifest(path))
    assert caught.value.reason == "UNSAFE_PATH"
    assert list(tmp_path.iterdir()) == []


def test_two_names_for_one_file_are_refused_also_where_case_does_not_count(tmp_path: Path) -> None:
    with Download(tmp_path / "target") as download, pytest.raises(DownloadDamaged, match="twice"):
        download.accept(manifest("a/File", "A/file"))


def test_a_file_below_another_file_is_refused(tmp_path: Path) -> None:
    with Download(tmp_path / "target") as download:
        download.accept(manifest("a", "a/b"))
        download.accept(chunk("a", b"data"))
        with pytest.raises(DownloadDamaged):
            download.accept(chunk("a/b", b"data"))


@pytest.mark.parametrize(
    ("responses", "reason"),
    [
        ([chunk("a", b"data")], "OUT_OF_ORDER"),
        ([manifest("a"), manifest("a")], "OUT_OF_ORDER"),
        ([manifest("a", "b"), chunk("a", b"da"), chunk("b", b"data")], "SIZE_MISMATCH"),
        ([manifest("a"), chunk("a", b"data", offset=1)], "OUT_OF_ORDER"),
        ([manifest("a"), chunk("a", b"data!")], "SIZE_MISMATCH"),
        ([manifest("a"), chunk("x", b"data")], "SIZE_MISMATCH"),
        ([manifest("a", "b"), chunk("a", b"dato"), chunk("b", b"data")], "SHA256_MISMATCH"),
        ([manifest("a", "b"), chunk("a", b"data")], "SIZE_MISMATCH"),
        ([], "INCOMPLETE"),
    ],
)
def test_bytes_that_are_not_the_manifest_are_refused(
    tmp_path: Path, responses: list[DownloadModelResponse], reason: str
) -> None:
    with pytest.raises(DownloadDamaged) as caught, Download(tmp_path / "target") as download:
        for response in responses:
            download.accept(response)
        download.finish()
    assert caught.value.reason == reason
    assert list(tmp_path.iterdir()) == []


def test_a_directory_of_somebody_else_is_never_removed(tmp_path: Path) -> None:
    (tmp_path / "target.partial").mkdir()
    (tmp_path / "target.partial" / "thesis.tex").touch()
    with pytest.raises(FileExistsError), Download(tmp_path / "target"):
        pass
    assert (tmp_path / "target.partial" / "thesis.tex").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(FileExistsError):
        Download(tmp_path / "full")


def test_the_rest_of_a_killed_download_is_cleared_away(tmp_path: Path) -> None:
    broken = Download(tmp_path / "target").__enter__()
    broken.accept(manifest("deep/a"))
    broken.accept(chunk("deep/a", b"da"))
    with Download(tmp_path / "target") as download:
        download.accept(manifest("deep/a"))
        download.accept(chunk("deep/a", b"da"))
        download.accept(chunk("deep/a", b"ta", offset=2))
        assert download.finish() == tmp_path / "target"
    broken.__exit__()
    assert [str(each.relative_to(tmp_path)) for each in tmp_path.rglob("*")] == [
        "target",
        "target/deep",
        "target/deep/a",
    ]
