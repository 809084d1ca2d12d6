"""Losses, gradients and weights that are not finite: one bad step is left out, a second one ends the job."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fidelity.jobs import Recorder, chats, task, tiny_base
from safetensors.torch import load_file

from luthier.trainer.v1 import report_pb2
from luthier.v1 import event_pb2, job_pb2
from luthier_trainer import sft
from luthier_trainer.control import NoControl
from luthier_trainer.errors import TrainingError
from luthier_trainer.forward import Forward
from luthier_trainer.job import Job
from luthier_trainer.masters import Masters
from luthier_trainer.optimizer import AdamSettings, Optimizer

EVERY_TWO = job_pb2.Evaluation(every_steps=2)
Run = Callable[..., tuple[Recorder, Any]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    base, data = tiny_base(tmp_path), chats(tmp_path / "chats.jsonl")

    def train(folder: str, **numbers: Any) -> tuple[Recorder, Any]:
        recorder = Recorder()
        return recorder, sft.train(task(tmp_path / folder, base, data, **numbers), recorder, NoControl())

    return train


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, float]], None]:
    """Multiplies the loss of some steps by something; a gradient follows its loss."""
    accumulate, loss_sum = sft._accumulate, Forward.loss_sum
    factor = [1.0]

    def poisoned(factors: dict[int, float]) -> None:
        def of_step(job: Job, *arguments: Any) -> tuple[torch.Tensor, int]:
            factor[0] = factors.get(job.counters.step + 1, 1.0)
            return accumulate(job, *arguments)

        monkeypatch.setattr(sft, "_accumulate", of_step)
        monkeypatch.setattr(Forward, "loss_sum", lambda self, batch: loss_sum(self, batch) * factor[0])

    return poisoned


@pytest.fixture
def explode(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the given update, counted from 1, write an infinite weight, once."""
    update, calls = Optimizer.step, [0]

    def exploding(number: int) -> None:
        def step(self: Optimizer, rate: float, loss: torch.Tensor) -> torch.Tensor:
            norm = update(self, rate, loss)
            calls[0] += 1
            if calls[0] == number:
                self._masters.values[3] = math.inf
            return norm

        monkeypatch.setattr(Optimizer, "step", step)

    return exploding


def warnings(recorder: Recorder) -> list[str]:
    return [each.message for each in recorder.reports if isinstance(each, event_pb2.LogEmitted)]


def weights(folder: Path) -> dict[str, bytes]:
    state = load_file(folder / "model" / "adapter_model.safetensors")
    return {name: each.numpy().tobytes() for name, each in state.items()}


@pytest.mark.parametrize(("factor", "what"), [(math.nan, "the loss"), (math.inf, "the loss"), (1e30, "the gradient")])
def test_a_single_bad_batch_costs_its_step_and_nothing_else(
    run: Run, poison: Callable[[dict[int, float]], None], factor: float, what: str
) -> None:
    whole, _ = run("whole", max_steps=6)
    poison({4: factor})
    recorder, end = run("poisoned", max_steps=6)
    steps = list(recorder.steps())
    assert [each.step for each in steps] == [1, 2, 3, 5, 6]
    assert [each.loss for each in steps[:3]] == [each.loss for each in whole.steps()][:3]
    rates = {each.step: each.learning_rate for each in whole.steps()}
    assert all(each.learning_rate == rates[each.step] for each in steps)
    assert all(math.isfinite(each.loss) for each in steps)
    (said,) = warnings(recorder)
    assert said.startswith(f"step 4 is made without an update: {what} of row")
    assert said.count(",") == 3  # four rows
    assert isinstance(end, report_pb2.Finished)
    assert (end.step, end.metrics["skipped_steps"]) == (6, 1.0)
    assert end.metrics["train_loss"] == pytest.approx(sum(each.loss for each in steps) / 5)


def test_a_second_bad_batch_within_ten_steps_ends_the_job_and_no_retry_would_help(
    run: Run, poison: Callable[[dict[int, float]], None]
) -> None:
    poison({2: math.nan, 12: math.nan})
    with pytest.raises(TrainingError) as caught:
        run("poisoned", max_steps=20)
    assert (caught.value.reason, caught.value.retryable) == ("LOSS_NOT_FINITE", False)
    assert "step 12" in caught.value.message
    assert "step 2 " in caught.value.message
    assert "learning rate" in caught.value.hint


def test_two_bad_batches_far_apart_cost_two_steps(run: Run, poison: Callable[[dict[int, float]], None]) -> None:
    poison({2: math.nan, 13: math.nan})
    recorder, end = run("poisoned", max_steps=14)
    assert [each.step for each in recorder.steps()] == [1, *range(3, 13), 14]
    assert end.metrics["skipped_steps"] == 2.0


@pytest.mark.parametrize("step", [2, 6], ids=["before the first checkpoint", "after a checkpoint"])
def test_an_update_that_destroys_the_weights_is_undone_and_the_steps_since_the_checkpoint_come_again_in_silence(
    tmp_path: Path,
    run: Run,
    poison: Callable[[dict[int, float]], None],
    explode: Callable[[int], None],
    step: int,
) -> None:
    job: dict[str, Any] = {"max_steps": 8, "dropout": 0.2, "evaluation": EVERY_TWO}
    poison({step: math.nan})
    expected, _ = run("poisoned", **job)
    poison({})
    explode(step)
    recorder, end = run("exploded", **job)
    numbers = [[(e.step, e.loss, e.grad_norm, e.trained_tokens) for e in each.steps()] for each in (recorder, expected)]
    assert numbers[0] == numbers[1]
    evaluated = [[(e.step, e.loss) for e in each.evaluations()] for each in (recorder, expected)]
    assert evaluated[0] == evaluated[1]
    assert len([each for each in recorder.reports if isinstance(each, event_pb2.PlanResolved)]) == 1
    rolled_back, left_out = warnings(recorder)
    target = "step 4 (000004-a1)" if step == 6 else "step 0 (from scratch)"
    assert f"update of step {step} made weights that are not finite: rolled back to {target}" in rolled_back
    assert left_out.startswith(f"step {step} is made without an update: the update of rows ")
    assert weights(tmp_path / "exploded") == weights(tmp_path / "poisoned")
    computed = [each.computed_tokens for each in recorder.steps()]
    assert computed == sorted(computed)
    assert computed[-1] > list(expected.steps())[-1].computed_tokens
    assert end.metrics["skipped_steps"] == 1.0


def test_a_learning_rate_that_destroys_every_update_ends_the_job(tmp_path: Path, run: Run) -> None:
    with pytest.raises(TrainingError) as caught:
        run("wild", max_steps=9, learning_rate=1e39, lr_scheduler=job_pb2.LR_SCHEDULER_CONSTANT, warmup_ratio=0.0)
    assert (caught.value.reason, caught.value.retryable) == ("LOSS_NOT_FINITE", False)
    assert "step 2" in caught.value.message
    assert not (tmp_path / "wild" / "model").exists()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["values", "exp_avg", "exp_avg_sq"])
def test_every_weight_and_moment_is_looked_at(where: str, bad: float) -> None:
    model = torch.nn.Linear(3, 2)
    masters = Masters(model, torch.float32)
    optimizer = Optimizer(masters, AdamSettings(0.9, 0.999, 1e-8, 0.1, 1.0))
    assert optimizer.is_finite()
    masters.gradients.fill_(1.0)
    optimizer.step(0.1)
    assert optimizer.is_finite()
    if where == "values":
        masters.values[-1] = bad
    else:
        list(optimizer._adam.state.values())[-1][where][-1] = bad
    assert not optimizer.is_finite()
