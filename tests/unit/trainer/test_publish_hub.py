"""Copies in repositories of the hub, by its own library, to a stub of its API."""

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_upload_stub import SIGNATURE, Model, UploadHub, upload_hub
from unit.trainer.publishing import Attempt, Export, export, killed_on_the_way

from luthier_trainer.stop import StopRequested

# How the hub's own library hands files to its HTTP client.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw:DeprecationWarning")

TOKEN = "hf_hunter2"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    monkeypatch.setattr(time, "sleep", lambda _: None)  # the library's pauses between its own tries
    monkeypatch.setenv("HF_TOKEN", "hf_somebody_elses")
    with upload_hub(TOKEN) as stub:
        monkeypatch.setenv("HF_ENDPOINT", stub.url)
        yield stub


def model(folder: Path, name: str = "export_1", seed: int = 0) -> Export:
    return export(folder, name, weights=2_500_000, seed=seed)


def holds(stub: UploadHub, copied: Export, name: str = "someone/bot") -> bool:
    """Whether a repository's newest commit has an export."""
    files = stub.models[name].files
    manifest = json.loads(files["manifest.json"])
    return all(files[file.path] == copied.bytes_of(file.path) for file in copied.files) and set(manifest["files"]) == {
        file.path for file in copied.files
    }


@pytest.mark.parametrize("part_bytes", [0, 1_000_000])
def test_all_files_come_in_one_commit_of_a_private_repository(part_bytes: int, tmp_path: Path, hub: UploadHub) -> None:
    copied = model(tmp_path / "export")
    hub.part_bytes = part_bytes
    attempt = Attempt(copied, TOKEN)
    uri = attempt.to("hf://someone/bot")
    assert uri == f"hf://someone/bot@{1:040x}"
    assert hub.models["someone/bot"].private
    assert len(hub.models["someone/bot"].commits) == 2, "the one that a repository begins with, and ours"
    assert holds(hub, copied)
    assert hub.models["someone/bot"].files["README.md"].startswith(b"---")
    assert attempt.told[-1] == (copied.size, copied.size)
    assert [done for done, _ in attempt.told] == sorted(done for done, _ in attempt.told)
    Attempt(copied, TOKEN).to("hf://someone/open", public=True)
    assert not hub.models["someone/open"].private


def test_the_secrets_token_is_the_only_one_that_leaves_and_the_store_gets_none(
    tmp_path: Path, hub: UploadHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = model(tmp_path / "export")
    (tmp_path / "token").write_text("hf_of_a_login")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    Attempt(copied, TOKEN).to("hf://someone/bot")
    sent = [(path, headers.get("Authorization", headers.get("authorization", ""))) for path, headers in hub.requests]
    assert {token for path, token in sent if "/store/" not in path} == {f"Bearer {TOKEN}"}
    assert {token for path, token in sent if "/store/" in path} == {""}
    assert "no secret" in Attempt(copied).refused("hf://someone/bot").message
    assert "may not write" in Attempt(copied, "hf_wrong").refused("hf://someone/other").message


@pytest.mark.parametrize("secret", ['{"AWS_SECRET_ACCESS_KEY": "hunter2"}', "two words", "line\nline", "é"])
def test_a_secret_that_is_no_token_goes_nowhere(secret: str, tmp_path: Path, hub: UploadHub) -> None:
    error = Attempt(model(tmp_path / "export"), secret).refused("hf://someone/bot")
    assert "'store' must hold a token" in error.message
    assert hub.requests == []


def test_a_process_that_is_killed_leaves_no_commit_and_the_next_attempt_sends_no_file_twice(
    tmp_path: Path, hub: UploadHub
) -> None:
    copied = model(tmp_path / "export")
    moment = Attempt(copied, TOKEN)
    moment.to("hf://someone/probe")
    hub.objects.clear()
    killed_on_the_way(copied, "hf://someone/bot", TOKEN, (), moment=moment.checks - 5, setup="")
    assert len(hub.models["someone/bot"].commits) == 1
    assert len(hub.objects) == 1, "the large file is there, the commit is not"
    hub.sent = 0
    Attempt(copied, TOKEN).to("hf://someone/bot")
    assert hub.sent == 0
    assert holds(hub, copied)


def test_a_stop_at_any_moment_leaves_no_commit(tmp_path: Path, hub: UploadHub) -> None:
    whole = Attempt(export(tmp_path / "whole", weights=300_000), TOKEN)
    whole.to("hf://someone/whole")
    for stop_after in range(0, whole.checks - 1, 3):  # the last check comes after the commit
        copied = export(tmp_path / str(stop_after), weights=300_000, seed=1 + stop_after)
        with pytest.raises(StopRequested):
            Attempt(copied, TOKEN, stop_after=stop_after).to("hf://someone/bot")
        assert "someone/bot" not in hub.models or len(hub.models["someone/bot"].commits) == 1


def test_a_store_that_breaks_off_is_tried_again_and_given_up_without_a_commit(
    tmp_path: Path, hub: UploadHub, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    copied = model(tmp_path / "export")
    with caplog.at_level(logging.DEBUG, "huggingface_hub"):
        hub.breaks = 2
        Attempt(copied, TOKEN).to("hf://someone/bot")
        assert holds(hub, copied)
        hub.breaks = 1000
        hub.objects.clear()
        error = Attempt(copied, TOKEN).refused("hf://someone/other")
    assert error.retryable and error.reason == "DESTINATION_FAILED"
    assert len(hub.models["someone/other"].commits) == 1
    printed = capfd.readouterr()
    text = caplog.text + printed.out + printed.err
    assert TOKEN not in text and SIGNATURE not in text


def test_what_the_hub_refuses_is_told_apart(tmp_path: Path, hub: UploadHub, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = model(tmp_path / "export")
    error = Attempt(copied, TOKEN).refused("hf://stranger/bot")
    assert "'store' may not write to hf://stranger/bot" in error.message and not error.retryable
    for status, retryable in ((503, True), (429, True), (413, False)):
        hub.busy = status
        error = Attempt(copied, TOKEN).refused("hf://someone/bot")
        assert f"HTTP {status}" in error.message and error.retryable == retryable
    hub.busy = 0
    hub.card_problem = '"license" must be one of [apache-2.0, mit]'
    error = Attempt(copied, TOKEN).refused("hf://someone/bot")
    assert '"license" must be one of' in error.message and not error.retryable
    hub.card_problem = ""
    hub.damage = True
    error = Attempt(copied, TOKEN).refused("hf://someone/bot")
    assert "is not what was sent" in error.message and error.retryable
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    error = Attempt(copied, TOKEN).refused("hf://someone/bot")
    assert "reached" in error.message and error.retryable


def test_a_repository_that_is_there_keeps_its_files_its_history_and_who_may_see_it(
    tmp_path: Path, hub: UploadHub
) -> None:
    hub.models["someone/bot"] = Model(False, [{"notes.txt": b"mine", "README.md": b"old"}])
    first, second = model(tmp_path / "1"), model(tmp_path / "2", "export_2", seed=1)
    Attempt(first, TOKEN).to("hf://someone/bot")
    Attempt(second, TOKEN).to("hf://someone/bot")
    repository = hub.models["someone/bot"]
    assert not repository.private
    assert len(repository.commits) == 3
    assert repository.files["notes.txt"] == b"mine" and holds(hub, second)


@pytest.mark.parametrize("there", ["adapter_config.json", "model.safetensors.index.json"])
def test_a_repository_whose_own_files_would_be_loaded_instead_is_refused_before_anything_is_sent(
    there: str, tmp_path: Path, hub: UploadHub
) -> None:
    hub.models["someone/bot"] = Model(True, [{there: b"{}"}])
    error = Attempt(model(tmp_path / "export"), TOKEN).refused("hf://someone/bot")
    assert there in error.message and not error.retryable
    assert hub.sent == 0 and len(hub.models["someone/bot"].commits) == 1


def test_the_same_export_again_makes_no_second_commit(tmp_path: Path, hub: UploadHub) -> None:
    copied = model(tmp_path / "export")
    uri = Attempt(copied, TOKEN).to("hf://someone/bot")
    hub.sent = 0
    assert Attempt(copied, TOKEN).to("hf://someone/bot") == uri
    assert len(hub.models["someone/bot"].commits) == 2 and hub.sent == 0


def test_a_file_that_changed_since_it_was_proven_is_not_sent(tmp_path: Path, hub: UploadHub) -> None:
    copied = model(tmp_path / "export")
    (copied.folder / "model.safetensors").write_bytes(b"\0" * 2_500_000)
    assert "model.safetensors changed" in Attempt(copied, TOKEN).refused("hf://someone/bot").message
    (copied.folder / "model.safetensors").unlink()
    assert "model.safetensors changed" in Attempt(copied, TOKEN).refused("hf://someone/bot").message
    assert hub.objects == {} and len(hub.models["someone/bot"].commits) == 1
