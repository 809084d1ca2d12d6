"""Resume changes nothing."""

import random
from pathlib import Path
from typing import Any

import pytest
from fidelity.jobs import Recorder, StopAfter, chats, task, tiny_base
from safetensors.torch import load_file

from luthier.trainer.v1.report_pb2 import Finished, Stopped
from luthier.v1 import job_pb2
from luthier.v1.event_pb2 import ResumeChecked
from luthier_trainer import plan, resume, sft
from luthier_trainer.control import NoControl
from luthier_trainer.errors import TrainingError

EVERY_TWO = job_pb2.Evaluation(every_steps=2)


def weights(folder: Path) -> dict[str, bytes]:
    """Every tensor of a model's directory as bytes, so that equal means bitwise equal."""
    (file,) = folder.glob("*model.safetensors")
    return {name: each.numpy().tobytes() for name, each in load_file(file).items()}


def numbers(recorder: Recorder) -> list[tuple[int, float, float, float, int]]:
    return [(e.step, e.loss, e.learning_rate, e.grad_norm, e.trained_tokens) for e in recorder.steps()]


@pytest.fixture(autouse=True)
def small_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_CPU_TOKENS", 40)


@pytest.mark.parametrize("dtype", [job_pb2.DTYPE_FLOAT32, job_pb2.DTYPE_BFLOAT16])
@pytest.mark.parametrize(
    ("full", "dropout", "saved"),
    [(False, 0.3, ()), (False, 0.0, ("lm_head",)), (True, 0.0, ())],
    ids=["lora-dropout", "saved-head", "full"],
)
def test_a_stopped_job_goes_on_as_if_it_had_never_stopped(
    tmp_path: Path,
    full: bool,
    dropout: float,
    saved: tuple[str, ...],
    dtype: job_pb2.Dtype.ValueType,
) -> None:
    base, data = tiny_base(tmp_path, tied=full), chats(tmp_path / "chats.jsonl")
    job: dict[str, Any] = {
        "full": full,
        "dropout": dropout,
        "modules_to_save": saved,
        "dtype": dtype,
        "max_steps": 7,
        "evaluation": EVERY_TWO,
    }
    whole = Recorder()
    straight = sft.train(task(tmp_path / "straight", base, data, **job), whole, NoControl())
    assert isinstance(straight, Finished)

    for stop, looks in ((3, 2), (4, 1)):  # amid a step, and at an evaluation
        first = Recorder()
        folder = tmp_path / f"stopped-at-{stop}"
        stopped = sft.train(task(folder, base, data, **job), first, StopAfter(first, stop, looks))
        assert isinstance(stopped, Stopped)
        assert stopped == Stopped(step=stop, checkpoint=f"{stop:06d}-a1")

        second = Recorder()
        resume_from = folder / "checkpoints" / stopped.checkpoint
        again = task(folder, base, data, attempt=2, resume_from=resume_from, **job)
        again.computed_tokens = list(first.steps())[-1].computed_tokens
        finished = sft.train(again, second, NoControl())
        assert isinstance(finished, Finished)

        assert numbers(first) + numbers(second) == numbers(whole)
        evaluated = {each.step: each.loss for each in (*first.evaluations(), *second.evaluations())}
        assert evaluated == {each.step: each.loss for each in whole.evaluations()}
        assert set(evaluated) == {0, 2, 4, 6, 7}
        assert weights(folder / "model") == weights(tmp_path / "straight" / "model")
        same = {"train_loss", "final_loss", "eval_loss", "base_eval_loss", "trained_tokens"}
        assert {name: finished.metrics[name] for name in same} == {name: straight.metrics[name] for name in same}


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    base, data = tiny_base(tmp_path), chats(tmp_path / "chats.jsonl")
    sft.train(task(tmp_path, base, data, max_steps=7), Recorder(), NoControl())
    assert sorted(each.name for each in (tmp_path / "checkpoints").iterdir()) == ["000004-a1", "000006-a1"]


@pytest.mark.parametrize("full", [False, True], ids=["lora-dropout", "full"])
@pytest.mark.parametrize("evaluation", [None, EVERY_TWO], ids=["plain", "evaluated"])
def test_five_stops_at_random_steps_change_no_bit(
    tmp_path: Path, full: bool, evaluation: job_pb2.Evaluation | None
) -> None:
    base, data = tiny_base(tmp_path), chats(tmp_path / "chats.jsonl")
    job: dict[str, Any] = {"full": full, "dropout": 0.0 if full else 0.2, "max_steps": 12, "evaluation": evaluation}
    whole = Recorder()
    sft.train(task(tmp_path / "straight", base, data, **job), whole, NoControl())

    folder = tmp_path / "broken"
    stops = sorted(random.Random(f"{full} {evaluation}").sample(range(1, 12), 5))
    recorders: list[Recorder] = []
    resume_from: Path | None = None
    for attempt, stop in enumerate([*stops, 12], start=1):
        recorder = Recorder()
        request = task(folder, base, data, attempt=attempt, resume_from=resume_from, **job)
        end = sft.train(request, recorder, StopAfter(recorder, stop) if stop < 12 else NoControl())
        recorders.append(recorder)
        if isinstance(end, Stopped):
            assert end.step == stop
            resume_from = folder / "checkpoints" / end.checkpoint
    assert isinstance(end, Finished)

    assert [each for recorder in recorders for each in numbers(recorder)] == numbers(whole)
    assert weights(folder / "model") == weights(tmp_path / "straight" / "model")
    checks = [each for recorder in recorders for each in recorder.reports if isinstance(each, ResumeChecked)]
    assert [(each.step, each.verified, each.message) for each in checks] == [
        (stop, True, "resume verified") for stop in stops
    ]
    assert all(each.recorded_loss == each.recomputed_loss > 0 for each in checks)


def test_a_damaged_checkpoint_is_passed_over_and_the_end_is_the_same(tmp_path: Path) -> None:
    base, data = tiny_base(tmp_path), chats(tmp_path / "chats.jsonl")
    job: dict[str, Any] = {"max_steps": 6, "dropout": 0.2}
    sft.train(task(tmp_path / "straight", base, data, **job), Recorder(), NoControl())
    recorder, folder = Recorder(), tmp_path / "broken"
    sft.train(task(folder, base, data, **job), recorder, StopAfter(recorder, 5))
    newest, before = (folder / "checkpoints" / name for name in ("000005-a1", "000004-a1"))
    file = newest / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    again = task(folder, base, data, attempt=2, resume_from=newest, **job)
    again.resume_fallbacks.append(str(before))
    chosen, said = resume.choose(again)
    assert said == "The checkpoint 000005-a1 is damaged: adapter_model.safetensors. The job goes on from 000004-a1."
    second = Recorder()
    assert isinstance(sft.train(chosen, second, NoControl()), Finished)
    assert [each.step for each in second.steps()] == [5, 6]
    assert weights(folder / "model") == weights(tmp_path / "straight" / "model")


def test_a_checkpoint_of_other_rows_is_refused(tmp_path: Path) -> None:
    base, data = tiny_base(tmp_path), chats(tmp_path / "chats.jsonl")
    recorder = Recorder()
    sft.train(task(tmp_path, base, data, max_steps=5), recorder, StopAfter(recorder, 2))
    checkpoint = tmp_path / "checkpoints" / "000002-a1"
    with pytest.raises(TrainingError) as caught:
        sft.train(task(tmp_path, base, data, max_steps=5, seed=8, resume_from=checkpoint), Recorder(), NoControl())
    assert caught.value.reason == "CHECKPOINT_MISMATCH"
