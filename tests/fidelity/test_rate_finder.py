"""The learning-rate range test changes nothing but the rate."""

import json
from pathlib import Path
from typing import Any

import pytest
from fidelity.jobs import Recorder, chats, task, tiny_base
from fidelity.test_resume import weights

from luthier.trainer.v1 import task_pb2
from luthier.trainer.v1.report_pb2 import Finished, Stopped
from luthier.trainer.v1.task_pb2 import ControlAction, TrainerTask
from luthier.v1 import event_pb2, job_pb2
from luthier_trainer import plan, rate_finder, sft
from luthier_trainer.control import NoControl
from luthier_trainer.job import Job


@pytest.fixture(autouse=True)
def small_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_CPU_TOKENS", 40)


def finding(*arguments: Any, **job: Any) -> TrainerTask:
    """A task that looks for its learning rate."""
    made = task(*arguments, find_learning_rate=True, **job)
    made.spec.fine_tune.hyperparameters.ClearField("learning_rate")
    return made


def found(recorder: Recorder) -> list[event_pb2.LearningRateFound]:
    return [each for each in recorder.reports if isinstance(each, event_pb2.LearningRateFound)]


def numbers(recorder: Recorder) -> list[tuple[int, float, float, float, int, int]]:
    return [
        (e.step, e.loss, e.learning_rate, e.grad_norm, e.trained_tokens, e.computed_tokens) for e in recorder.steps()
    ]


class StopAtPhase:
    """Asks for a stop at the `looks`-th look after the finder began, or after it told what it found."""

    def __init__(self, recorder: Recorder, looks: int, *, when_found: bool = False) -> None:
        self._recorder = recorder
        self._looks = looks
        self._when_found = when_found

    def requested(self) -> ControlAction.ValueType:
        """What a trainer reads between micro-batches."""
        phase = event_pb2.PHASE_FINDING_LEARNING_RATE
        began = any(isinstance(e, event_pb2.PhaseProgressed) and e.phase == phase for e in self._recorder.reports)
        if found(self._recorder) if self._when_found else began:
            self._looks -= 1
        return task_pb2.CONTROL_ACTION_PAUSE if self._looks <= 0 else task_pb2.CONTROL_ACTION_UNSPECIFIED


@pytest.mark.parametrize("dtype", [job_pb2.DTYPE_FLOAT32, job_pb2.DTYPE_BFLOAT16])
@pytest.mark.parametrize(
    "kind",
    [
        {"dropout": 0.3, "neftune_alpha": 5.0},
        {"lora": job_pb2.Lora(lora_plus_ratio=4.0), "modules_to_save": ("lm_head",)},
        {"full": True},
    ],
    ids=["lora-dropout-noise", "lora-plus", "full"],
)
def test_a_job_that_found_its_rate_trains_bit_by_bit_as_one_that_was_given_it(
    tmp_path: Path, kind: dict[str, Any], dtype: job_pb2.Dtype.ValueType
) -> None:
    base, data = tiny_base(tmp_path), chats(tmp_path / "chats.jsonl")
    job: dict[str, Any] = {"dtype": dtype, "max_steps": 4, "evaluation": job_pb2.Evaluation(every_steps=2), **kind}
    searching = Recorder()
    sft.train(finding(tmp_path / "finding", base, data, **job), searching, NoControl())
    (told,) = found(searching)
    assert len(told.rates) == len(told.losses) >= 8
    assert list(told.rates) == sorted(told.rates)
    given = Recorder()
    sft.train(task(tmp_path / "given", base, data, learning_rate=told.learning_rate, **job), given, NoControl())
    assert numbers(searching) == numbers(given)
    assert [e.loss for e in searching.evaluations()] == [e.loss for e in given.evaluations()]
    assert weights(tmp_path / "finding" / "model") == weights(tmp_path / "given" / "model")
    lineage = json.loads((tmp_path / "finding" / "model" / "luthier.json").read_text())
    assert lineage["learning_rate"] == told.learning_rate
    assert f"learning rate {told.learning_rate:g}, by a range test" in lineage["plan"]["notes"]


@pytest.mark.parametrize("looks", [1, 5, 40], ids=["at-once", "before-its-steps", "in-its-steps"])
def test_a_stop_in_the_test_leaves_nothing_and_the_next_attempt_finds_the_same(tmp_path: Path, looks: int) -> None:
    base, data = tiny_base(tmp_path), chats(tmp_path / "chats.jsonl")
    first, second = Recorder(), Recorder()
    end = sft.train(finding(tmp_path, base, data, max_steps=2), first, StopAtPhase(first, looks))
    assert end == Stopped(step=0, checkpoint="")
    assert not found(first)
    straight = Recorder()
    sft.train(finding(tmp_path / "straight", base, data, max_steps=2), straight, NoControl())
    assert isinstance(sft.train(finding(tmp_path, base, data, attempt=2, max_steps=2), second, NoControl()), Finished)
    assert found(second) == found(straight)
    assert numbers(second) == numbers(straight)


def test_what_was_found_is_in_the_checkpoint_and_is_not_looked_for_again(tmp_path: Path) -> None:
    base, data = tiny_base(tmp_path), chats(tmp_path / "chats.jsonl")
    straight, first, second = Recorder(), Recorder(), Recorder()
    sft.train(finding(tmp_path / "straight", base, data, max_steps=4), straight, NoControl())
    stopped = sft.train(finding(tmp_path, base, data, max_steps=4), first, StopAtPhase(first, 5, when_found=True))
    assert isinstance(stopped, Stopped)
    assert stopped.step > 0
    checkpoint = tmp_path / "checkpoints" / stopped.checkpoint
    (told,) = found(first)
    assert json.loads((checkpoint / "state.json").read_text())["found_rate"] == told.learning_rate
    sft.train(finding(tmp_path, base, data, attempt=2, resume_from=checkpoint, max_steps=4), second, NoControl())
    assert not found(second)
    made = [
        each[:-1] for each in [*numbers(first), *numbers(second)]
    ]  # the step that was broken off was computed twice
    assert made == [each[:-1] for each in numbers(straight)]
    assert weights(tmp_path / "model") == weights(tmp_path / "straight" / "model")


def test_weights_moments_counters_and_random_streams_are_as_before(
    tmp_path: Path, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    seen: list[tuple[Any, ...]] = []
    real = rate_finder.find

    def snapshot(job: Job) -> tuple[Any, ...]:
        copies = {name: each.clone() for name, each in job.forward.model.state_dict().items()}
        return copies, job.optimizer.state(), str(job.counters), torch.get_rng_state(), job.masters.gradients.clone()

    def find(job: Job, *rest: Any) -> None:
        seen.append(snapshot(job))
        real(job, *rest)
        seen.append(snapshot(job))

    monkeypatch.setattr(rate_finder, "find", find)
    base, data = tiny_base(tmp_path), chats(tmp_path / "chats.jsonl")
    sft.train(finding(tmp_path, base, data, max_steps=1, dropout=0.2), Recorder(), NoControl())
    (weights_before, moments_before, *before), (weights_after, moments_after, *after) = seen
    assert all(torch.equal(weights_before[name], each) for name, each in weights_after.items())
    assert moments_before == moments_after == {}
    assert before[0] == after[0]
    assert torch.equal(before[1], after[1])
    assert torch.equal(before[2], after[2])


def test_a_curve_without_a_minimum_gives_the_default_rate_and_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rate_finder, "_LORA_RANGE", (1e-12, 1e-11))
    base, data = tiny_base(tmp_path), chats(tmp_path / "chats.jsonl")
    recorder = Recorder()
    sft.train(finding(tmp_path, base, data, max_steps=2), recorder, NoControl())
    (told,) = found(recorder)
    assert told.learning_rate == 2e-4
    assert told.rule == "the default, because the loss has no clear minimum"
    (warning,) = [e for e in recorder.reports if isinstance(e, event_pb2.LogEmitted)]
    assert warning.level == event_pb2.LOG_LEVEL_WARNING
    assert warning.message == (
        "no learning rate was found, because the loss has no clear minimum: the job trains with the default, 0.0002"
    )
