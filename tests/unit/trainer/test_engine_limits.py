"""What runs out: the disk, the memory, the patience of who cancels."""

import json
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import warm
from fidelity.jobs import Recorder, StopAfter, chats, task, tiny_base
from unit.trainer.attempts import JOB, kinds, read_spool

from luthier.trainer import attempt
from luthier.trainer.v1 import report_pb2, task_pb2
from luthier.trainer.v1.task_pb2 import ControlAction
from luthier.v1 import event_pb2
from luthier_trainer import checkpoint, durable, inspect, sft
from luthier_trainer.control import NoControl
from luthier_trainer.data.masks.masking import Masking
from luthier_trainer.data.masks.template import template_of
from luthier_trainer.data.tokens import tokenised
from luthier_trainer.data.tokens.options import Options
from luthier_trainer.data.tokens.overlong import Overlong
from luthier_trainer.errors import TrainingError
from luthier_trainer.model import load_tokenizer
from luthier_trainer.report import Payload


def warnings(recorder: Recorder) -> list[str]:
    return [each.message for each in recorder.reports if isinstance(each, event_pb2.LogEmitted)]


def run_limited(folder: Path, job: task_pb2.TrainerTask, kib: int) -> list[report_pb2.TrainerReport]:
    """Runs the job in a process of its own that writes no file longer than so many KiB."""
    attempt_dir = folder / "jobs" / JOB / "attempt-1"
    attempt_dir.mkdir(parents=True)
    (attempt_dir / attempt.TASK).write_bytes(job.SerializeToString())
    limits = {resource.RLIMIT_FSIZE: kib * 1024}
    warm.run(warm.trainer, attempt_dir, output=folder / "output", limits=limits, seconds=120)
    return read_spool(attempt_dir)


@pytest.mark.parametrize("full", [False, True], ids=["the tokenizer is too large", "the weights are too large"])
def test_a_checkpoint_that_does_not_fit_is_a_full_disk_and_no_bug(tmp_path: Path, full: bool) -> None:
    job = task(tmp_path, tiny_base(tmp_path), chats(tmp_path / "chats.jsonl"), max_steps=3, full=full)
    reports = run_limited(tmp_path, job, 400 if full else 200)
    assert "step_completed" in kinds(reports)
    assert "checkpoint_saved" not in kinds(reports)
    assert reports[-1].failed.error.reason == "STORAGE_FULL", reports[-1]
    assert reports[-1].failed.retryable
    assert "000002-a1" in reports[-1].failed.error.message
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_tokenised_rows_that_do_not_fit_are_a_full_disk_and_no_bug(tmp_path: Path) -> None:
    job = task(tmp_path, tiny_base(tmp_path), chats(tmp_path / "chats.jsonl", rows=4000), max_steps=3)
    reports = run_limited(tmp_path, job, 64)
    assert (reports[-1].failed.error.reason, reports[-1].failed.retryable) == ("STORAGE_FULL", True), reports[-1]
    assert "tokenised" in reports[-1].failed.error.message
    assert list((tmp_path / "cache" / "tokenised").iterdir()) == []


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(28, "No space left on device"), True),
        (OSError(122, "Disk quota exceeded"), True),
        (OSError(5, "Input/output error"), False),
        (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (Exception("I/O error: Permission denied (os error 13)"), False),
        (ValueError("a row says (os error 28) and goes on"), False),
    ],
)
def test_a_full_disk_is_told_from_other_errors_also_where_only_its_text_says_so(error: Exception, full: bool) -> None:
    assert durable.is_full(error) is full


class _SmallDisk:
    """Lets a folder hold so many bytes: what is synced beyond them does not fit."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, limit: int) -> None:
        sync = durable._sync

        def sync_if_it_fits(path: Path) -> None:
            if durable.size(folder) > limit:
                raise OSError(28, "No space left on device", str(path))
            sync(path)

        monkeypatch.setattr(durable, "_sync", sync_if_it_fits)


def test_older_checkpoints_and_unused_caches_go_before_a_full_disk_stops_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, data = tiny_base(tmp_path), chats(tmp_path / "chats.jsonl")
    job = task(tmp_path / "job", base, data, max_steps=8)
    job.spec.fine_tune.checkpoints.keep = 9
    other = task(tmp_path / "job", base, chats(tmp_path / "other.jsonl", rows=3), max_steps=1)
    other.training_dataset.sha256 = "1" * 64
    sft.train(other, Recorder(), NoControl())
    measured = task(tmp_path / "measured", base, data, max_steps=2)
    sft.train(measured, Recorder(), NoControl())
    one = durable.size(tmp_path / "measured" / "checkpoints")
    model = durable.size(tmp_path / "measured" / "model")
    job.model_dir = str(tmp_path / "elsewhere")
    _SmallDisk(monkeypatch, tmp_path / "job", model + int(3.5 * one))
    recorder = Recorder()
    end = sft.train(job, recorder, NoControl())
    assert isinstance(end, report_pb2.Finished)
    (said,) = warnings(recorder)
    assert "deleted the checkpoints 000004-a1, 000002-a1 and 1 tokenised datasets that nobody uses" in said
    assert sorted(each.name for each in (tmp_path / "job" / "checkpoints").iterdir()) == ["000006-a1", "000008-a1"]
    for name in ("000006-a1", "000008-a1"):
        durable.verify_manifest(tmp_path / "job" / "checkpoints" / name)


def test_the_newest_checkpoint_survives_a_disk_that_stays_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = task(tmp_path, tiny_base(tmp_path), chats(tmp_path / "chats.jsonl"), max_steps=8)
    recorder = Recorder()
    end = sft.train(job, recorder, StopAfter(recorder, 4))
    assert isinstance(end, report_pb2.Stopped)
    _SmallDisk(monkeypatch, tmp_path, durable.size(tmp_path) // 2)
    job.attempt, job.resume_from = 2, str(tmp_path / "checkpoints" / end.checkpoint)
    with pytest.raises(TrainingError) as caught:
        sft.train(job, Recorder(), NoControl())
    assert caught.value.reason == "STORAGE_FULL"
    assert [each.name for each in (tmp_path / "checkpoints").iterdir()] == ["000004-a1"]
    durable.verify_manifest(tmp_path / "checkpoints" / "000004-a1")


def print_dropped(cache_dir: Path) -> None:
    count, freed = tokenised.drop_unused(cache_dir)
    sys.stdout.write(f"{count} {freed}\n")


def test_a_tokenised_dataset_in_use_is_not_dropped_and_one_out_of_use_is(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(task_pb2.BaseModelSource(location=str(inspect.BUILTIN / "tiny")))
    source = task_pb2.DatasetSource(path=str(chats(tmp_path / "chats.jsonl")))

    def load() -> tokenised.TokenisedRows:
        options = Options(64, Overlong.TRUNCATE, Masking())
        template = template_of(tokenizer)
        return tokenised.load(source, tokenizer, template, options, cache_dir=tmp_path, reporter=Recorder())

    rows = load()

    def drop() -> list[str]:
        code, printed = warm.run(print_dropped, tmp_path, output=tmp_path / "output")
        assert code == 0, printed
        return printed.split()

    assert drop() == ["0", "0"]
    assert len(rows) == 10
    del rows
    count, freed = drop()
    assert count == "1"
    assert int(freed) > 100
    assert list((tmp_path / "tokenised").iterdir()) == []
    assert len(load()) == 10


def test_a_reader_of_checkpoints_never_meets_one_that_is_half_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "000001-a1" / "inner").mkdir(parents=True)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # killed before it begins
    checkpoint.delete(tmp_path / "000001-a1")
    assert checkpoint.newest_first(tmp_path) == []


class _Squeeze(Recorder):
    """Leaves the process `room` bytes of address space once the first step is done; 0 for no limit."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room

    def report(self, payload: Payload, *, durable: bool = False) -> None:
        super().report(payload)
        if self._room and isinstance(payload, event_pb2.StepCompleted) and payload.step == 1:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + self._room
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def train_squeezed(job: bytes, room: int) -> None:
    recorder = _Squeeze(room)
    sft.train(task_pb2.TrainerTask.FromString(job), recorder, NoControl())
    for step in recorder.steps():
        sys.stdout.write(f"loss {step.loss.hex()}\n")
    for message in warnings(recorder):
        sys.stdout.write(f"log {message}\n")


def test_a_machine_that_runs_out_of_memory_goes_on_in_smaller_micro_batches_to_the_same_losses(tmp_path: Path) -> None:
    base = _wide_base(tmp_path)
    data = tmp_path / "long.jsonl"
    with open(data, "w", encoding="utf-8") as file:
        for number in range(32):
            answer = " ".join(str(number + each) for each in range(120))
            file.write(json.dumps({"prompt": f"Count from {number}.", "completion": answer}) + "\n")
    found: list[list[str]] = []
    for room in (0, 160 * 2**20):
        job = task(tmp_path / f"{room}", base, data, max_steps=2, batch_size=16, max_length=256, learning_rate=1e-3)
        job.spec.fine_tune.checkpoints.every_steps = 100
        code, printed = warm.run(
            *(train_squeezed, job.SerializeToString(), room), output=tmp_path / f"{room}.log", seconds=150
        )
        assert code == 0, printed[-2000:]
        found.append(printed.splitlines())
    logs = [[line for line in each if line.startswith("log")] for each in found]
    assert all("are cut off at their end" in line for line in logs[0])
    assert len(logs[1]) > len(logs[0])
    assert all("out of memory: micro-batches have" in line for line in logs[1] if line not in logs[0])
    losses = [[float.fromhex(line.split()[1]) for line in each if line.startswith("loss")] for each in found]
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def _wide_base(folder: Path) -> Path:
    """A model whose activations outweigh everything else."""
    base = tiny_base(folder)
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(base)
    config.intermediate_size, config.initializer_range = 3000, 0.02
    LlamaForCausalLM(config).save_pretrained(base)
    return base


class _Impatient(Recorder):
    """Cancels as soon as tokenising has begun, and notes when."""

    asked = 0.0

    def requested(self) -> ControlAction.ValueType:
        tokenising = any(
            isinstance(each, event_pb2.PhaseProgressed) and each.phase == event_pb2.PHASE_TOKENIZING
            for each in self.reports
        )
        if not tokenising:
            return task_pb2.CONTROL_ACTION_UNSPECIFIED
        self.asked = self.asked or time.monotonic()
        return task_pb2.CONTROL_ACTION_CANCEL


def test_a_cancel_while_a_hundred_thousand_rows_are_tokenised_is_heeded_at_once(tmp_path: Path) -> None:
    data = chats(tmp_path / "chats.jsonl", rows=100_000)
    job: Any = task(tmp_path, tiny_base(tmp_path), data, max_steps=3)
    recorder = _Impatient()
    end = sft.train(job, recorder, recorder)
    assert recorder.asked > 0
    assert time.monotonic() - recorder.asked < 5
    assert end == report_pb2.Stopped(step=0, checkpoint="")
    progressed = [each for each in recorder.reports if isinstance(each, event_pb2.PhaseProgressed)]
    assert progressed[-1].completed < 100_000
    assert list((tmp_path / "cache" / "tokenised").iterdir()) == []
