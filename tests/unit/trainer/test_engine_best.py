"""The best evaluation: which it is, when training stops, and whose weights come out."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fidelity.jobs import Recorder, StopAfter, chats, task, tiny_base
from safetensors.torch import load_file

from luthier.trainer.v1.report_pb2 import Finished, Stopped
from luthier.trainer.v1.task_pb2 import TrainerTask
from luthier.v1 import event_pb2, job_pb2
from luthier_trainer import checkpoint, sft
from luthier_trainer.control import NoControl
from luthier_trainer.evaluate import evaluate
from luthier_trainer.standing import Standing

Losses = dict[int, float]
LOSSES: Losses = {2: 3.0, 4: 2.0, 6: 2.5, 8: 2.25, 10: 2.125, 12: 1.0}


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> Callable[[Losses], None]:
    """Replaces what evaluations find: a tiny model on tiny data improves for longer than a test should take."""

    def of_steps(chosen: Losses) -> None:
        def evaluated(*arguments: Any, step: int, epoch: float) -> event_pb2.EvaluationCompleted:
            result = evaluate(*arguments, step=step, epoch=epoch)
            result.loss = chosen.get(step, 9.0)
            return result

        monkeypatch.setattr(sft, "evaluate", evaluated)

    return of_steps


def request(folder: Path, base: Path, data: Path, *, patience: int | None = None, **numbers: Any) -> TrainerTask:
    evaluation = job_pb2.Evaluation(every_steps=2)
    if patience:
        evaluation.early_stopping.patience = patience
    made = task(folder, base, data, evaluation=evaluation, **({"max_steps": 12} | numbers))
    made.spec.fine_tune.checkpoints.keep_best = True
    return made


def weights(folder: Path) -> dict[str, bytes]:
    (file,) = folder.glob("*model.safetensors")
    return {name: each.numpy().tobytes() for name, each in load_file(file).items()}


def logged(recorder: Recorder) -> list[str]:
    return [each.message for each in recorder.reports if isinstance(each, event_pb2.LogEmitted)]


def test_slow_progress_adds_up_and_one_that_is_not_finite_is_none() -> None:
    standing = Standing()
    found = [standing.add(step, -loss, {}, 0.1) for step, loss in enumerate([2.0, 1.95, 1.89, math.nan, 1.9], start=1)]
    assert found == [True, True, True, False, False]
    assert (standing.best_step, standing.unimproved) == (3, 2)


@pytest.mark.parametrize(
    ("full", "saved", "dtype"),
    [
        (False, (), job_pb2.DTYPE_FLOAT32),
        (False, ("lm_head",), job_pb2.DTYPE_BFLOAT16),
        (True, (), job_pb2.DTYPE_FLOAT32),
        (True, (), job_pb2.DTYPE_BFLOAT16),
    ],
)
def test_a_job_stops_early_and_its_model_is_the_best_checkpoint_bit_by_bit(
    tmp_path: Path,
    losses: Callable[[Losses], None],
    full: bool,
    saved: tuple[str, ...],
    dtype: job_pb2.Dtype.ValueType,
) -> None:
    losses(LOSSES)
    recorder = Recorder()
    made = request(
        tmp_path,
        tiny_base(tmp_path, tied=full),
        chats(tmp_path / "chats.jsonl"),
        patience=3,
        full=full,
        modules_to_save=saved,
        dtype=dtype,
        log_every=7,
    )
    made.spec.fine_tune.evaluation.sample_prompts.append("Count 1.")
    end = sft.train(made, recorder, NoControl())
    assert isinstance(end, Finished)
    found = {name: end.metrics[name] for name in ("stopped_early", "best_step", "best_eval_loss", "eval_loss")}
    assert found == {"stopped_early": 1.0, "best_step": 4.0, "best_eval_loss": 2.0, "eval_loss": 2.0}
    assert (end.step, end.metrics["last_eval_loss"]) == (4, 2.125)
    assert [each.step for each in recorder.evaluations() if each.best] == [2, 4]
    assert [each.step for each in recorder.steps()] == [1, 7, 10], "the last step is told"
    assert [each.step for each in recorder.reports if isinstance(each, event_pb2.SamplesGenerated)] == [0, 4]
    assert any("stopped early at step 10 of 12" in each for each in logged(recorder))
    names = sorted(each.name for each in (tmp_path / "checkpoints").iterdir())
    assert names == ["000004-a1", "000008-a1", "000010-a1"]
    assert weights(tmp_path / "model") == weights(tmp_path / "checkpoints" / "000004-a1")
    assert weights(tmp_path / "model") != weights(tmp_path / "checkpoints" / "000010-a1")


def test_without_keep_best_the_model_is_that_of_the_last_step(tmp_path: Path, losses: Callable[[Losses], None]) -> None:
    losses(LOSSES)
    made = request(tmp_path, tiny_base(tmp_path), chats(tmp_path / "chats.jsonl"), patience=1)
    made.spec.fine_tune.checkpoints.keep_best = False
    end = sft.train(made, Recorder(), NoControl())
    assert isinstance(end, Finished)
    assert (end.step, end.metrics["best_step"], end.metrics["eval_loss"]) == (6, 4.0, 2.5)
    assert weights(tmp_path / "model") == weights(tmp_path / "checkpoints" / "000006-a1")


@pytest.mark.parametrize(("stop", "looks"), [(3, 1), (4, 1), (5, 1), (9, 2), (10, 1)])
def test_a_resume_anywhere_decides_the_same(
    tmp_path: Path, losses: Callable[[Losses], None], stop: int, looks: int
) -> None:
    losses(LOSSES)
    base, data = tiny_base(tmp_path), chats(tmp_path / "chats.jsonl")
    whole = sft.train(request(tmp_path / "whole", base, data, patience=3), Recorder(), NoControl())
    recorder = Recorder()
    stopped = sft.train(request(tmp_path / "b", base, data, patience=3), recorder, StopAfter(recorder, stop, looks))
    assert isinstance(stopped, Stopped)
    resume_from = tmp_path / "b" / "checkpoints" / stopped.checkpoint
    again = request(tmp_path / "b", base, data, patience=3, attempt=2, resume_from=resume_from)
    end = sft.train(again, Recorder(), NoControl())
    assert isinstance(whole, Finished)
    assert isinstance(end, Finished)
    assert end.step == whole.step == 4
    for name in ("stopped_early", "best_step", "best_eval_loss", "eval_loss", "last_eval_loss", "trained_tokens"):
        assert end.metrics[name] == whole.metrics[name]
    assert weights(tmp_path / "b" / "model") == weights(tmp_path / "whole" / "model")


def test_a_crash_between_the_best_evaluation_and_its_checkpoint_loses_nothing(
    tmp_path: Path, losses: Callable[[Losses], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses(LOSSES)
    base, data = tiny_base(tmp_path), chats(tmp_path / "chats.jsonl")
    save = checkpoint.save

    def crash(folder: Path, attempt: int, state: Any, *parts: Any) -> tuple[str, int]:
        if state.counters.step == 4:
            raise KeyboardInterrupt
        return save(folder, attempt, state, *parts)

    monkeypatch.setattr(checkpoint, "save", crash)
    with pytest.raises(KeyboardInterrupt):
        sft.train(request(tmp_path, base, data, patience=3), Recorder(), NoControl())
    monkeypatch.setattr(checkpoint, "save", save)
    resume_from = tmp_path / "checkpoints" / "000002-a1"
    end = sft.train(
        request(tmp_path, base, data, patience=3, attempt=2, resume_from=resume_from), Recorder(), NoControl()
    )
    assert isinstance(end, Finished)
    assert end.step == 4
    assert weights(tmp_path / "model") == weights(tmp_path / "checkpoints" / "000004-a2")


def test_a_best_checkpoint_that_is_gone_is_told_and_the_best_from_there_on_is_kept(
    tmp_path: Path, losses: Callable[[Losses], None]
) -> None:
    losses(LOSSES)
    base, data = tiny_base(tmp_path), chats(tmp_path / "chats.jsonl")
    recorder = Recorder()
    sft.train(request(tmp_path, base, data), recorder, StopAfter(recorder, 7))
    checkpoint.delete(tmp_path / "checkpoints" / "000004-a1")
    resume_from = tmp_path / "checkpoints" / "000007-a1"
    second = Recorder()
    end = sft.train(
        request(tmp_path, base, data, max_steps=11, attempt=2, resume_from=resume_from), second, NoControl()
    )
    assert isinstance(end, Finished)
    assert any("the best checkpoint, of step 4, is not there" in each for each in logged(second))
    assert end.step == 10


def test_samples_are_told_at_each_evaluation_when_asked_for(tmp_path: Path) -> None:
    evaluation = job_pb2.Evaluation(
        every_steps=2, sample_prompts=["Count 1."], samples_at=job_pb2.SAMPLES_AT_EACH_EVALUATION, sample_max_tokens=2
    )
    base, data = tiny_base(tmp_path), chats(tmp_path / "chats.jsonl")
    recorder = Recorder()
    sft.train(task(tmp_path, base, data, max_steps=5, evaluation=evaluation), recorder, NoControl())
    told = [each.step for each in recorder.reports if isinstance(each, event_pb2.SamplesGenerated)]
    assert told == [0, 2, 4, 5]
