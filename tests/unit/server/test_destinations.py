"""What the server says of destinations before a job exists."""

from pathlib import Path

import pytest

from luthier.v1.export_task_pb2 import ExportDestination
from luthier_server.destinations import check, credentials
from luthier_server.errors import NotFound
from luthier_server.secrets import Secrets

ROOTS = (Path("/exports"), Path("/srv/models"))


def fields(uri: str, secret: str = "", public: bool = False, roots: tuple[Path, ...] = ROOTS) -> list[str]:
    """The last parts of the fields that are wrong."""
    destination = ExportDestination(uri=uri, credentials_secret=secret, public=public)
    return [each.field.removeprefix("export.destination.") for each in check(destination, roots)]


@pytest.mark.parametrize(
    "uri",
    [
        "s3://models/support-bot/3", "s3://models/a b/é/", "gs://models/x", "az://container/x", "hf://someone/support-bot",
        "hf://a/b.c_d-e",
    ],
)  # fmt: skip
def test_a_place_with_a_name_of_its_own_and_credentials_is_taken(uri: str) -> None:
    assert fields(uri, "store") == []
    assert fields(uri) == ["credentials_secret"], "nobody writes with whatever the server happens to be allowed"


@pytest.mark.parametrize("uri", ["file:///exports/bot", "file:///srv/models/a/b/", "file://localhost/exports/100%25"])
def test_a_folder_below_a_root_is_taken_without_credentials(uri: str) -> None:
    assert fields(uri) == []
    assert fields(uri, "store") == ["credentials_secret"]
    assert fields(uri, roots=()) == ["uri"]


@pytest.mark.parametrize(
    "uri",
    [
        "file:///exports", "file:///exports/", "file:///exports/../etc/x", "file:///exports/%2e%2e/x", "file:///etc/x",
        "file:///exportsx/a", "file://host/exports/a", "file:exports/a", "file://exports/a", "file:///exports//a",
        "file:///exports/a?b", "file:///exports/a#b", "file:///exports/a%00b", "file:///exports/a%0ab", "file:///exports/%ff",
        "file:///exports/.a", "file:///exports/./a", f"file:///exports/{'a' * 201}", "file:///", "file://", "file://[/a",
    ],
)  # fmt: skip
def test_a_folder_that_could_lie_elsewhere_is_refused(uri: str) -> None:
    assert fields(uri) == ["uri"]


@pytest.mark.parametrize(
    "uri",
    [
        "s3://models", "s3://models/", "s3:///x", "s3://", "s3://models//x", "s3://models/a/../b", "s3://models/./b",
        "s3://models/a//", "s3://models/a?versionId=1", "s3://models/a#b", "s3://models/a\nb", "s3://models/a\\b",
        "s3://models:9000/a", "s3://mod%65ls/a", f"s3://models/{'a' * 701}", "S3://models/a", "s3:models/a",
        "models/a", "https://models/a",
        "hf://support-bot", "hf://someone/bot/extra", "hf://someone/bot.git", "hf://someone/../x", "hf://some--one/x",
        "hf://someone/-x", "hf://someone/bot?x", "hf://datasets/someone/x", "hf://someone/bot@main", "ftp://models/a",
    ],
)  # fmt: skip
def test_an_address_that_could_mean_another_place_is_refused(uri: str) -> None:
    assert fields(uri, "store") == ["uri"]


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIA:hunter2@models/a", "s3://models/a?X-Amz-Signature=hunter2", "hf://hf_hunter2@someone/bot",
        "https://someone:hunter2@host/x", "az://c/x?sig=hunter2", "file://user:hunter2@host/exports/a",
    ],
)  # fmt: skip
def test_credentials_that_came_in_the_address_are_refused_and_not_repeated(uri: str) -> None:
    found = check(ExportDestination(uri=uri, credentials_secret="store"), ROOTS)
    assert found
    assert "hunter2" not in str(found)


def test_only_a_repository_of_the_hub_can_be_public() -> None:
    assert fields("hf://someone/bot", "hub", public=True) == []
    assert fields("s3://models/a", "store", public=True) == ["public"]
    assert fields("file:///exports/a", public=True) == ["public"]


def test_no_destination_is_none_and_half_a_destination_is_wrong() -> None:
    assert fields("") == []
    assert fields("", "store") == ["uri"]


def test_the_trainer_gets_the_secret_that_is_named_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_SECRET_STORE", "hunter2")
    named = ExportDestination(uri="s3://models/a", credentials_secret="store")
    assert credentials(named, Secrets(None)) == {"LUTHIER_EXPORT_CREDENTIALS": "hunter2"}
    assert credentials(ExportDestination(uri="file:///exports/a"), Secrets(None)) == {}
    with pytest.raises(NotFound) as error:
        credentials(ExportDestination(uri="s3://models/a", credentials_secret="other"), Secrets(None))
    assert error.value.reason == "SECRET_NOT_FOUND"
