"""What a download refuses and where it goes on, without a server."""

import hashlib
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import pytest

from luthier.v1.model_pb2 import ModelFile
from luthier.v1.models_pb2 import DownloadManifest, DownloadModelRequest, DownloadModelResponse, FileChunk
from luthier_client.directory import Directory
from luthier_client.download import Download, StartOver
from luthier_client.errors import DownloadDamaged
from luthier_client.manifest import MARKER, from_json
from luthier_client.tarball import TarFile, header


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
    with Download(Directory(tmp_path / "target")) as download, pytest.raises(DownloadDamaged) as caught:
        download.accept(manifest(path))
    assert caught.value.reason == "UNSAFE_PATH"
    assert list(tmp_path.iterdir()) == []


def test_two_names_for_one_file_are_refused_also_where_case_does_not_count(tmp_path: Path) -> None:
    with Download(Directory(tmp_path / "target")) as download, pytest.raises(DownloadDamaged, match="twice"):
        download.accept(manifest("a/File", "A/file"))


@pytest.mark.parametrize("paths", [("a", "a/b"), ("A/b/c", "a")])
def test_a_file_below_another_file_is_refused(tmp_path: Path, paths: tuple[str, str]) -> None:
    with Download(Directory(tmp_path / "target")) as download, pytest.raises(DownloadDamaged, match="in its way"):
        download.accept(manifest(*paths))


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
    with pytest.raises(DownloadDamaged) as caught, Download(Directory(tmp_path / "target")) as download:
        for response in responses:
            download.accept(response)
        download.finish()
    assert caught.value.reason == reason
    assert list(tmp_path.iterdir()) == []


def test_a_directory_of_somebody_else_is_never_removed(tmp_path: Path) -> None:
    (tmp_path / "target.partial").mkdir()
    (tmp_path / "target.partial" / "thesis.tex").touch()
    with pytest.raises(FileExistsError), Download(Directory(tmp_path / "target")):
        pass
    assert (tmp_path / "target.partial" / "thesis.tex").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(FileExistsError):
        Directory(tmp_path / "full")


FILES = {"deep/a": b"data" * 40, "empty": b"", "b.bin": bytes(range(256)) * 3, "c": b"last"}
WHOLE = DownloadModelResponse(
    manifest=DownloadManifest(
        files=[
            ModelFile(path=path, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
            for path, data in FILES.items()
        ]
    )
)


def stream(request: DownloadModelRequest, size: int = 50) -> Iterator[DownloadModelResponse]:
    """What a server sends for a request, in small chunks."""
    yield WHOLE
    begun = not request.from_path
    for path, data in FILES.items():
        offset = 0
        if path == request.from_path:
            begun, offset = True, request.from_offset
        for start in range(offset, len(data) if begun else 0, size):
            yield chunk(path, data[start : start + size], start)


def target(kind: str, folder: Path) -> Directory | TarFile:
    return Directory(folder / "target") if kind == "directory" else TarFile(folder / "target")


def broken(kind: str, folder: Path, messages: int) -> None:
    """A download that is given up after so many messages."""
    with suppress(ConnectionError), Download(target(kind, folder)) as download:
        download.take_up()
        for number, response in enumerate(stream(download.request("m"))):
            if number == messages:
                raise ConnectionError
            download.accept(response)


def complete(kind: str, folder: Path) -> DownloadModelRequest:
    """A download to the end; returns what it asked for."""
    with Download(target(kind, folder)) as download:
        download.take_up()
        request = download.request("m")
        for response in stream(request):
            download.accept(response)
        download.finish()
    return request


def content(kind: str, folder: Path) -> dict[str, bytes]:
    root = folder / "target"
    if kind == "directory":
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    with tarfile.open(root, "r:") as tar:
        names = tar.getnames()
        assert names[0] == "manifest.json" and names[1:] == list(FILES)
        assert from_json(tar.extractfile("manifest.json").read()) == tuple(WHOLE.manifest.files)  # type: ignore[union-attr]
        return {name: tar.extractfile(name).read() for name in FILES}  # type: ignore[union-attr]


MESSAGES = len(list(stream(DownloadModelRequest())))


@pytest.mark.parametrize("kind", ["directory", "tar"])
def test_a_download_that_breaks_anywhere_goes_on_there_and_ends_byte_equal(tmp_path: Path, kind: str) -> None:
    asked = set()
    for messages in range(MESSAGES + 1):
        folder = tmp_path / str(messages)
        broken(kind, folder, messages)
        assert not (folder / "target").exists()
        request = complete(kind, folder)
        asked.add((request.from_path, request.from_offset))
        assert content(kind, folder) == FILES
        assert [each.name for each in folder.iterdir()] == ["target"]
    assert len(asked) > MESSAGES // 2  # nearly every break is gone on from at its own byte
    tars = (
        {(tmp_path / str(messages) / "target").read_bytes() for messages in range(MESSAGES)} if kind == "tar" else {b""}
    )
    assert len(tars) == 1


@pytest.mark.parametrize("kind", ["directory", "tar"])
def test_bytes_that_rotted_on_disk_are_fetched_again(tmp_path: Path, kind: str) -> None:
    broken(kind, tmp_path, MESSAGES - 9)
    partial = tmp_path / "target.partial"
    held = partial / "b.bin" if kind == "directory" else partial
    data = bytearray(held.read_bytes())
    data[-3] ^= 1
    held.write_bytes(data)
    with Download(target(kind, tmp_path)) as download:
        download.take_up()
        with pytest.raises(StartOver):
            for response in stream(download.request("m")):
                download.accept(response)
        request = download.request("m")
        assert not request.from_path
        for response in stream(request):
            download.accept(response)
        download.finish()
    assert content(kind, tmp_path) == FILES


@pytest.mark.parametrize("kind", ["directory", "tar"])
def test_another_manifest_than_the_one_on_disk_starts_over(tmp_path: Path, kind: str) -> None:
    broken(kind, tmp_path, MESSAGES - 9)
    with Download(target(kind, tmp_path)) as download:
        download.take_up()
        assert download.request("m").from_path == "b.bin"
        with pytest.raises(StartOver):
            download.accept(manifest("other"))
        assert not download.request("m").from_path
        download.accept(manifest("other"))
        download.accept(chunk("other", b"data"))
        download.finish()
    if kind == "directory":
        assert {each.name for each in (tmp_path / "target").iterdir()} == {"other"}
    else:
        with tarfile.open(tmp_path / "target", "r:") as tar:
            assert tar.getnames() == ["manifest.json", "other"]


@pytest.mark.parametrize("kind", ["directory", "tar"])
@pytest.mark.parametrize(
    ("responses", "reason"),
    [
        ([manifest("../up")], "UNSAFE_PATH"),
        ([WHOLE, WHOLE], "OUT_OF_ORDER"),
        ([chunk("c", b"last")], "OUT_OF_ORDER"),
        ([WHOLE, chunk("b.bin", b"x", offset=760)], "OUT_OF_ORDER"),
        ([WHOLE, chunk("../up", b"x")], "SIZE_MISMATCH"),
        ([WHOLE, chunk("c", b"last")], "SIZE_MISMATCH"),
        ([WHOLE], "SIZE_MISMATCH"),
        ([], "INCOMPLETE"),
    ],
)
def test_a_download_that_is_gone_on_from_is_trusted_no_more_than_a_new_one(
    tmp_path: Path, kind: str, responses: list[DownloadModelResponse], reason: str
) -> None:
    broken(kind, tmp_path, MESSAGES - 9)
    with pytest.raises(DownloadDamaged) as caught, Download(target(kind, tmp_path)) as download:
        download.take_up()
        assert download.request("m").from_offset > 0
        for response in responses:
            download.accept(response)
        download.finish()
    assert caught.value.reason == reason
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_changes_its_files_all_the_time_is_given_up(tmp_path: Path) -> None:
    with pytest.raises(DownloadDamaged) as caught, Download(Directory(tmp_path / "target")) as download:
        for number in range(10):
            download.request("m")
            with suppress(StartOver):
                download.accept(manifest(f"file-{number}"))
    assert caught.value.reason == "MANIFEST_CHANGED"
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_cannot_go_on_sends_all_again_and_what_is_there_is_skipped(tmp_path: Path) -> None:
    broken("directory", tmp_path, MESSAGES - 9)
    with Download(Directory(tmp_path / "target")) as download:
        download.take_up()
        assert download.request("m").from_offset > 0
        for response in stream(DownloadModelRequest(), size=1000):
            download.accept(response)
        download.finish()
    assert content("directory", tmp_path) == FILES


@pytest.mark.parametrize("place", ["b.bin", "deep", MARKER])
def test_nothing_is_written_through_a_link_that_was_put_into_a_broken_download(tmp_path: Path, place: str) -> None:
    broken("directory", tmp_path, MESSAGES - 9)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "b.bin").write_bytes(FILES["b.bin"][:7])
    (outside / "a").write_bytes(FILES["deep/a"][:7])
    before = {each.name: each.read_bytes() for each in outside.iterdir()}
    planted = tmp_path / "target.partial" / place
    if planted.is_dir():
        shutil.rmtree(planted)
    else:
        planted.unlink()
    planted.symlink_to(outside if place == "deep" else outside / "b.bin")
    if place == MARKER:
        with pytest.raises(FileExistsError):
            complete("directory", tmp_path)
    else:
        assert not complete("directory", tmp_path).from_path
        assert content("directory", tmp_path) == FILES
    assert {each.name: each.read_bytes() for each in outside.iterdir()} == before


@pytest.mark.parametrize(
    "marker", [b"", b"{", b"[]", b'{"files": [{"path": "../up", "size_bytes": 1, "sha256": "00"}]}', b"[" * 100_000]
)
def test_a_marker_that_is_no_manifest_is_not_gone_on_from(tmp_path: Path, marker: bytes) -> None:
    broken("directory", tmp_path, MESSAGES - 9)
    (tmp_path / "target.partial" / MARKER).write_bytes(marker)
    assert not complete("directory", tmp_path).from_path
    assert content("directory", tmp_path) == FILES


def test_two_downloads_into_one_place_do_not_mix(tmp_path: Path) -> None:
    for kind in ("directory", "tar"):
        with Download(target(kind, tmp_path)), pytest.raises(FileExistsError, match="goes on"):
            complete(kind, tmp_path)


def test_a_file_of_somebody_else_is_no_beginning_of_a_tar(tmp_path: Path) -> None:
    (tmp_path / "target.partial").write_bytes(b"\x89PNG" * 1000)
    with pytest.raises(FileExistsError, match="not a broken download"):
        complete("tar", tmp_path)
    assert (tmp_path / "target.partial").read_bytes() == b"\x89PNG" * 1000


def test_a_tar_holds_long_names_large_sizes_and_nothing_of_the_machine() -> None:
    long = "/".join(["part" * 20] * 4)
    for path, size in ((long, 3), ("ä.bin", 1), ("model.gguf", 9 * 2**30)):
        with tarfile.open(fileobj=BytesIO(header(path, size)), mode="r|", ignore_zeros=True) as tar:
            member = tar.next()
        assert member is not None and (member.name, member.size) == (path, size)
        assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")


def test_a_model_with_a_manifest_of_its_own_keeps_it(tmp_path: Path) -> None:
    with Download(TarFile(tmp_path / "target")) as download:
        download.request("m")
        download.accept(manifest("manifest.json"))
        download.accept(chunk("manifest.json", b"data"))
        download.finish()
    with tarfile.open(tmp_path / "target", "r:") as tar:
        assert tar.getnames() == ["luthier-manifest.json", "manifest.json"]
