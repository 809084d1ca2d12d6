"""Copies in folders of this machine."""

import json
import os
import shutil
from pathlib import Path

import pytest
from unit.trainer.publishing import Attempt, Export, export, killed_on_the_way

from luthier_trainer import durable
from luthier_trainer.stop import StopRequested


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder that the operator allows."""
    (tmp_path / "exports").mkdir()
    return tmp_path / "exports"


def small(folder: Path, name: str = "export_1", seed: int = 0) -> Export:
    return export(folder, name, weights=3_000_000, seed=seed)


def is_copy(folder: Path, of: Export) -> bool:
    """Whether a folder holds an export, all of it and nothing else."""
    durable.verify_manifest(folder)
    found = {each.relative_to(folder).as_posix() for each in folder.rglob("*") if each.is_file()}
    manifest = json.loads((folder / "manifest.json").read_bytes())
    return found == set(manifest["files"]) | {"manifest.json"} == {file.path for file in of.files} | {"manifest.json"}


def test_all_bytes_arrive_in_a_new_folder_that_others_may_read(tmp_path: Path, root: Path) -> None:
    copied = small(tmp_path / "export")
    attempt = Attempt(copied, roots=[root])
    assert attempt.to(f"file://{root}/team%20a/bot/") == f"file://{root}/team%20a/bot"
    assert is_copy(root / "team a" / "bot", copied)
    assert (root / "team a" / "bot" / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert [each.name for each in (root / "team a").iterdir()] == ["bot"]
    assert attempt.told[-1] == (copied.size, copied.size)


def test_a_process_that_is_killed_leaves_no_folder_and_the_next_attempt_keeps_what_is_whole(
    tmp_path: Path, root: Path
) -> None:
    copied = small(tmp_path / "export")
    killed_on_the_way(copied, f"file://{root}/bot", "", [root], moment=6, setup="")
    assert not (root / "bot").exists()
    (aside,) = root.iterdir()
    assert aside.name == ".tmp-bot-export_1"
    assert not (aside / "manifest.json").exists()
    written = (aside / "README.md").stat().st_ino, (aside / "README.md").stat().st_mtime_ns
    Attempt(copied, roots=[root]).to(f"file://{root}/bot")
    assert is_copy(root / "bot", copied)
    assert ((root / "bot/README.md").stat().st_ino, (root / "bot/README.md").stat().st_mtime_ns) == written
    assert [each.name for each in root.iterdir()] == ["bot"]


def test_a_stop_at_any_moment_leaves_nothing(tmp_path: Path, root: Path) -> None:
    copied = small(tmp_path / "export")
    whole = Attempt(copied, roots=[root])
    whole.to(f"file://{root}/whole")
    shutil.rmtree(root / "whole")
    for stop_after in range(whole.checks):
        with pytest.raises(StopRequested):
            Attempt(copied, roots=[root], stop_after=stop_after).to(f"file://{root}/bot")
        assert list(root.iterdir()) == []


@pytest.mark.parametrize(
    "uri",
    ["file:///etc/bot", "file://{root}/../bot", "file://{root}", "file://{root}x/bot", "file://{root}/%2e%2e/bot", "file://host{root}/b"],
)  # fmt: skip
def test_a_folder_that_is_not_below_a_root_is_refused(uri: str, tmp_path: Path, root: Path) -> None:
    copied = small(tmp_path / "export")
    assert Attempt(copied, roots=[root]).refused(uri.replace("{root}", str(root))).reason == "DESTINATION_FAILED"
    assert "none" in Attempt(copied).refused(f"file://{root}/bot").hint
    assert sorted(each.name for each in tmp_path.iterdir()) == ["export", "exports"]


@pytest.mark.parametrize("link", ["team", "team/inner", "team/inner/bot", "team/inner/.tmp-bot-export_1"])
def test_a_link_below_the_root_leads_nowhere(link: str, tmp_path: Path, root: Path) -> None:
    copied = small(tmp_path / "export")
    outside = tmp_path / "outside"
    (outside / "inner").mkdir(parents=True)
    (root / link).parent.mkdir(parents=True, exist_ok=True)
    (root / link).symlink_to(outside)
    error = Attempt(copied, roots=[root]).refused(f"file://{root}/team/inner/bot")
    assert error.reason == "DESTINATION_FAILED" and not error.retryable
    assert [each.name for each in outside.rglob("*")] == ["inner"]


def test_a_link_that_is_put_into_the_copy_on_its_way_leads_nowhere(tmp_path: Path, root: Path) -> None:
    copied = small(tmp_path / "export")
    secret = tmp_path / "secret"
    secret.write_text("mine")
    aside = root / ".tmp-bot-export_1"
    (aside / "nested").mkdir(parents=True)
    (aside / "README.md").symlink_to(secret)
    (aside / "nested" / "deep").symlink_to(tmp_path)
    Attempt(copied, roots=[root]).refused(f"file://{root}/bot")
    assert secret.read_text() == "mine" and not (tmp_path / "empty.txt").exists()


def test_a_file_that_has_another_name_elsewhere_is_replaced_and_not_written_to(tmp_path: Path, root: Path) -> None:
    copied = small(tmp_path / "export")
    (tmp_path / "mine").write_text("mine")
    (root / ".tmp-bot-export_1").mkdir()
    (root / ".tmp-bot-export_1" / "README.md").hardlink_to(tmp_path / "mine")
    Attempt(copied, roots=[root]).to(f"file://{root}/bot")
    assert is_copy(root / "bot", copied)
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_root_that_is_a_link_is_the_operators_own(tmp_path: Path, root: Path) -> None:
    copied = small(tmp_path / "export")
    (tmp_path / "alias").symlink_to(root)
    Attempt(copied, roots=[tmp_path / "alias"]).to(f"file://{tmp_path}/alias/bot")
    assert is_copy(root / "bot", copied)


def test_what_is_there_already_is_left_as_it_is_unless_it_is_this_very_copy(tmp_path: Path, root: Path) -> None:
    first, second = small(tmp_path / "1"), small(tmp_path / "2", "export_2", seed=1)
    Attempt(first, roots=[root]).to(f"file://{root}/bot")
    assert Attempt(first, roots=[root]).to(f"file://{root}/bot") == f"file://{root}/bot"
    error = Attempt(second, roots=[root]).refused(f"file://{root}/bot")
    assert "already" in error.message and not error.retryable
    assert is_copy(root / "bot", first)
    (root / "bot" / "tokenizer.json").write_text("{}")
    Attempt(first, roots=[root]).refused(f"file://{root}/bot")
    (root / "mine").mkdir()
    Attempt(first, roots=[root]).refused(f"file://{root}/mine")
    assert list((root / "mine").iterdir()) == []


def test_bytes_that_come_back_changed_from_the_disk_are_noticed(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = small(tmp_path / "export")
    sync = os.fsync

    def damaging(descriptor: int) -> None:
        sync(descriptor)
        damaged = root / ".tmp-bot-export_1" / "model.safetensors"
        if damaged.exists():
            with open(damaged, "r+b") as file:
                file.write(b"?")

    monkeypatch.setattr(os, "fsync", damaging)
    error = Attempt(copied, roots=[root]).refused(f"file://{root}/bot")
    assert "model.safetensors is not what was written" in error.message and error.retryable
    assert list(root.iterdir()) == []


def test_a_root_that_is_gone_or_closed_and_a_full_disk_are_told_apart(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = small(tmp_path / "export")
    gone = Attempt(copied, roots=[tmp_path / "gone"]).refused(f"file://{tmp_path}/gone/bot")
    assert (gone.reason, gone.retryable) == ("DESTINATION_FAILED", True)
    assert not (tmp_path / "gone").exists()

    def failing(number: int) -> None:
        def fsync(_: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", fsync)

    failing(28)
    assert Attempt(copied, roots=[root]).refused(f"file://{root}/bot").reason == "STORAGE_FULL"
    failing(13)
    closed = Attempt(copied, roots=[root]).refused(f"file://{root}/bot")
    assert "may not write" in closed.message and not closed.retryable
    assert list(root.iterdir()) == []
