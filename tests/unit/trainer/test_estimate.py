"""Estimates: the numbers that training then reports, honest about what was only sampled, and advice that helps."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from fidelity import jobs
from fidelity.jobs import Recorder, chats, tiny_base

from luthier.trainer.v1 import report_pb2, task_pb2
from luthier.v1 import dataset_pb2, estimate_pb2, event_pb2, job_pb2
from luthier_trainer import sft, work
from luthier_trainer.control import NoControl
from luthier_trainer.data.tokens import counted
from luthier_trainer.data.tokens.task import tokens_for
from luthier_trainer.inspect import BUILTIN
from luthier_trainer.stop import never

ROWS = 30


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_base(tmp_path)


def task(folder: Path, base: Path, rows: int = ROWS, **more: Any) -> task_pb2.TrainerTask:
    made = jobs.task(folder, base, chats(folder / "chats.jsonl", rows), **more)
    made.training_dataset.rows = rows
    if made.HasField("validation_dataset"):
        made.validation_dataset.rows = rows
    return made


def asked(task: task_pb2.TrainerTask, **how: Any) -> task_pb2.DataAnswer:
    request = task_pb2.TrainerTask()
    request.CopyFrom(task)
    request.estimate.CopyFrom(task_pb2.EstimateWork(**how))
    return work.perform(request, Recorder(), NoControl())


def estimated(task: task_pb2.TrainerTask, **how: Any) -> estimate_pb2.JobEstimate:
    answer = asked(task, **how)
    assert answer.HasField("estimate"), answer.error
    return answer.estimate


def trained(task: task_pb2.TrainerTask) -> tuple[Recorder, report_pb2.Finished]:
    recorder = Recorder()
    finished = sft.train(task, recorder, NoControl())
    assert isinstance(finished, report_pb2.Finished)
    return recorder, finished


@pytest.mark.parametrize(
    ("numbers", "cached"),
    [({"epochs": 1.5}, False), ({"epochs": 2.0, "max_steps": 11}, True), ({"max_steps": 3, "batch_size": 7}, False)],
    ids=["counted anew", "from the cache", "less than an epoch"],
)
def test_tokens_and_steps_are_those_that_training_then_reports(
    tmp_path: Path, base: Path, numbers: dict[str, Any], cached: bool
) -> None:
    request = task(tmp_path, base, **numbers)
    request.spec.fine_tune.validation_fraction = 0.2
    if cached:
        trained(request)
    found = estimated(request)
    recorder, finished = trained(request)
    [plan] = [each for each in recorder.reports if isinstance(each, event_pb2.PlanResolved)]
    assert (found.training_rows, found.validation_rows) == (plan.training_rows, plan.validation_rows) == (24, 6)
    assert found.counted_rows == found.training_rows
    assert found.total_steps == plan.total_steps
    assert found.training_tokens == finished.metrics["trained_tokens"]
    assert 0 < found.trained_tokens_per_epoch < found.tokens_per_epoch
    assert (found.device, found.dtype) == (plan.device, plan.dtype)
    assert found.speed_basis == estimate_pb2.SPEED_BASIS_FORMULA
    assert finished.metrics["mfu"] > 0


def test_memory_disk_and_time_are_told(tmp_path: Path, base: Path) -> None:
    found = estimated(task(tmp_path, base, epochs=2.0), known_mfu=0.25)
    assert 0 < found.device_memory.needed_bytes < found.host_memory.needed_bytes < found.host_memory.total_bytes
    assert found.micro_batch_tokens > 0
    assert found.disk.needed_bytes < found.disk.free_bytes <= found.disk.total_bytes
    assert found.speed_basis == estimate_pb2.SPEED_BASIS_HISTORY
    assert found.tokens_per_second > 0
    assert found.seconds > found.training_tokens / found.tokens_per_second
    assert found.fits
    assert not found.remedies


def test_the_disk_holds_what_is_estimated(tmp_path: Path, base: Path) -> None:
    request = task(tmp_path, base, max_steps=60)
    request.spec.fine_tune.checkpoints.CopyFrom(job_pb2.Checkpoints(every_steps=20, keep=2))
    found = estimated(request)
    trained(request)
    held = sum(each.stat().st_size for each in tmp_path.rglob("*") if each.is_file() and base not in each.parents)
    checkpoints = list((tmp_path / "checkpoints").iterdir())
    assert len(checkpoints) == 2
    # One more checkpoint than are kept lies there while it is written.
    extra = sum(each.stat().st_size for each in checkpoints[0].iterdir())
    assert found.disk.needed_bytes == pytest.approx(held + extra, rel=0.1)


def test_a_large_file_is_sampled_all_over_and_the_estimate_says_so(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = 6000
    with open(path, "w", encoding="utf-8") as file:
        for number in range(rows):  # rows get longer towards the end
            answer = "word " * (1 + 20 * number // rows)
            turns = [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")
    request = jobs.task(tmp_path, BUILTIN / "tiny", path, epochs=1.0)
    request.training_dataset.rows = rows
    request.training_dataset.reading.file_format = dataset_pb2.FILE_FORMAT_JSONL
    tokens = tokens_for(request)
    whole = counted.count(request.training_dataset, tokens, tmp_path, Recorder(), never, rows=rows, seconds=60)
    assert whole.is_whole
    found = estimated(request)
    assert 100 < found.counted_rows < found.training_rows == rows
    assert found.tokens_per_epoch == pytest.approx(int(whole.tokens.sum()), rel=0.1)
    assert any("from all over the file" in note for note in found.notes)


def test_rows_in_error_are_rows_without_tokens(tmp_path: Path, base: Path) -> None:
    request = task(tmp_path, base, epochs=1.0)
    with open(request.training_dataset.path, "a", encoding="utf-8") as file:
        file.write("no json\n")
    request.training_dataset.rows += 1
    found = estimated(request)
    assert found.training_rows == ROWS + 1
    assert found.counted_rows == found.training_rows


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_what_does_not_fit_is_told_with_changes_that_make_it_fit(tmp_path: Path, full: bool) -> None:
    base = tiny_base(tmp_path, width=64)
    request = task(tmp_path, base, full=full, epochs=1.0)
    with open(request.training_dataset.path, "a", encoding="utf-8") as file:
        turns = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "one two three " * 80}]
        file.write(json.dumps({"messages": turns}) + "\n")
    request.training_dataset.rows += 1
    request.memory_limit_bytes = 1
    least = estimated(request).device_memory.needed_bytes
    request.memory_limit_bytes = int(least * 0.97)
    found = estimated(request)
    assert not found.fits
    assert found.device_memory.total_bytes == request.memory_limit_bytes < found.device_memory.needed_bytes
    assert found.remedies
    lengths = [int(match[1]) for each in found.remedies if (match := re.match(r"Lower max_length to (\d+)", each))]
    if lengths:
        request.spec.fine_tune.hyperparameters.max_length = lengths[0]
        assert estimated(request).fits
    if full:
        assert any("adapter" in each for each in found.remedies)
    alone = estimated(request, memory_only=True)
    assert alone.fits == bool(lengths)
    assert not alone.total_steps


def test_nothing_is_refused_that_only_might_not_fit(tmp_path: Path, base: Path) -> None:
    request = task(tmp_path, base, rows=2000, epochs=1.0)  # short rows, and rows of 256 tokens are allowed
    request.memory_limit_bytes = 1
    short = estimated(request, memory_only=True).device_memory.needed_bytes
    request.memory_limit_bytes = short + short // 50
    found = estimated(request, memory_only=True)
    assert found.fits
    assert any("would not fit" in note for note in found.notes)


def test_a_probe_makes_two_steps_and_leaves_nothing(tmp_path: Path, base: Path) -> None:
    request = task(tmp_path, base, epochs=3.0)
    recorder = Recorder()
    request.estimate.probe = True
    before = {each for each in tmp_path.rglob("*") if "cache" not in each.parts}
    answer = work.perform(request, recorder, NoControl())
    assert answer.estimate.speed_basis == estimate_pb2.SPEED_BASIS_PROBE, answer.error
    assert answer.estimate.tokens_per_second > 0
    assert answer.estimate.seconds > 0
    assert {type(each) for each in recorder.reports} == {event_pb2.PhaseProgressed}
    assert {each for each in tmp_path.rglob("*") if "cache" not in each.parts} == before


def test_what_would_fail_the_job_fails_its_estimate(tmp_path: Path, base: Path) -> None:
    request = task(tmp_path, base, epochs=1.0)
    request.base_model.location = str(tmp_path / "absent")
    assert asked(request).error.reason == "MODEL_NOT_FOUND"
