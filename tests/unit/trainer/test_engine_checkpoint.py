"""Directories that are there whole or not at all."""

import errno
import json
from pathlib import Path

import pytest

from luthier_trainer import checkpoint, durable
from luthier_trainer.errors import TrainingError


def test_a_directory_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    with durable.new_directory(target) as aside:
        (aside / "weights").write_text("w")
        assert not target.exists()
    assert (target / "weights").read_text() == "w"
    assert [each.name for each in target.parent.iterdir()] == ["model"]


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="half-way"), durable.new_directory(tmp_path / "model") as aside:
        (aside / "weights").write_text("w")
        raise RuntimeError("half-way")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_failure_that_a_retry_can_cure(tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as caught, durable.new_directory(tmp_path / "model"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.reason == "STORAGE_FULL"
    assert caught.value.retryable
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_trainer_left_half_written_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".tmp-000002-a1").mkdir()
    (tmp_path / "000001-a1").mkdir()
    durable.sweep(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["000001-a1"]


@pytest.mark.parametrize("damage", ["missing", "shorter", "changed", "no manifest", "manifest of nonsense"])
def test_damage_of_any_kind_is_noticed(tmp_path: Path, damage: str) -> None:
    (tmp_path / "inner").mkdir()
    file = tmp_path / "inner" / "weights"
    file.write_bytes(b"12345")
    durable.write_manifest(tmp_path)
    durable.verify_manifest(tmp_path)
    if damage == "missing":
        file.unlink()
    elif damage == "shorter":
        file.write_bytes(b"1234")
    elif damage == "changed":
        file.write_bytes(b"12346")
    elif damage == "no manifest":
        (tmp_path / durable.MANIFEST).unlink()
    else:
        (tmp_path / durable.MANIFEST).write_text(json.dumps(["nonsense"]))
    with pytest.raises(TrainingError) as caught:
        durable.verify_manifest(tmp_path)
    assert caught.value.reason == "CHECKPOINT_DAMAGED"


def test_a_later_attempts_checkpoint_outlives_an_earlier_ones_of_a_higher_step(tmp_path: Path) -> None:
    for name in ("000100-a1", "000300-a1", "000150-a2", "000200-a2", "notes"):
        (tmp_path / name).mkdir()
    checkpoint.prune(tmp_path, keep=2)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["000150-a2", "000200-a2", "notes"]
