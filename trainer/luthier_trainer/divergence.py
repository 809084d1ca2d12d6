"""Losses, gradients and weights that are not finite, and how a job goes on.

A loss or a gradient that is not finite is seen before the update, so weights and moments are still those of the step
before: the update is left out, which is what a return to before the step and a jump over its batch would give. The
step counts as made: numbers, learning rates and the order of the rows stay. It is told as a log line with its rows and
gets no StepCompleted, for it has no loss.

An update that makes weights or moments infinite or NaN is seen right after it, before its step is told and before any
checkpoint: `Diverged`. Nothing in memory can be used then, so the job is set up anew from its newest checkpoint (or
from scratch), computes the steps since then again, and makes the step that diverged without an update. The steps that
come again are equal, on a CPU to the last bit, so they are not told twice: within an attempt the steps of the log
never go back.

A single bad batch costs one step so. A second one within 10 steps is no accident: LOSS_NOT_FINITE ends the job, and no
retry would help.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from luthier.v1 import event_pb2
from luthier_trainer.errors import TrainingError
from luthier_trainer.job import Job
from luthier_trainer.state import Counters

_NEAR = 10
_ROWS_NAMED = 20
_HINT = "Lower the learning rate, keep max_grad_norm at 1, or compute in float32; and look at the rows of these steps."


class Diverged(Exception):
    """The update of the step after `counters.step` made weights or moments that are not finite."""


@dataclass(frozen=True)
class Carried:
    """What a job that is set up anew takes over from the one that diverged: what was told, and what it costs."""

    told: int
    left_out: frozenset[int]
    budget: int
    counters: Counters
    found_rate: float | None

    def hand_to(self, job: Job) -> None:
        """Makes a job that was just set up go on in silence up to what was told."""
        job.told, job.left_out, job.found_rate = self.told, self.left_out, self.found_rate
        job.batches = dataclasses.replace(job.batches, budget=self.budget)
        job.counters.computed_tokens = self.counters.computed_tokens
        job.counters.seconds = self.counters.seconds
        job.counters.evaluated_step = self.counters.evaluated_step
        job.counters.evaluation = self.counters.evaluation
        job.counters.sampled_step = self.counters.sampled_step
        job.counters.standing = self.counters.standing


def leave_out(job: Job, what: str) -> None:
    """Counts the next step as made without an update, because `what` is not finite: `the loss`. Raises TrainingError
    LOSS_NOT_FINITE when that happened just before."""
    step = job.counters.step + 1
    _refuse_a_second(job, step, what)
    job.counters.step = step
    job.counters.skipped.append(step)
    if step > job.told:
        rows = _rows(job.order.batch(step - 1).tolist())
        _warn(job, f"step {step} is made without an update: {what} of {rows} is not finite")


def leave_out_empty(job: Job) -> None:
    """Counts the next step as made without an update, because none of its rows trains a token: an update by nothing but
    momentum and weight decay would be no step on the data."""
    step = job.counters.step + 1
    job.counters.step = step
    job.counters.empty += 1
    if step > job.told:
        job.told = step
        rows = _rows(job.order.batch(step - 1).tolist())
        _warn(job, f"step {step} is made without an update: nothing of {rows} is trained")


def roll_back(job: Job) -> Carried:
    """What the job that diverged leaves to the next one, which is to start from `job.saved`. Raises TrainingError
    LOSS_NOT_FINITE when a step before was left out too."""
    step, counters = job.counters.step + 1, job.counters
    _refuse_a_second(job, step, "the update")
    saved, name = job.saved
    _warn(
        job,
        f"the update of step {step} made weights that are not finite: rolled back to step {saved}"
        f" ({name or 'from scratch'}), and step {step} will be made without its update",
    )
    told = max(job.told, counters.step)
    return Carried(told, job.left_out | {step}, job.batches.budget, counters, job.found_rate)


def _refuse_a_second(job: Job, step: int, what: str) -> None:
    near = [each for each in job.counters.skipped if step - each <= _NEAR]
    if near:
        raise TrainingError(
            "LOSS_NOT_FINITE",
            f"At step {step} {what} is not finite, and step {near[-1]} was left out for the same reason.",
            _HINT,
        )


def _rows(indices: Sequence[int]) -> str:
    """Rows as people count them, from 1."""
    named = ", ".join(str(index + 1) for index in sorted(indices)[:_ROWS_NAMED])
    more = f" and {len(indices) - _ROWS_NAMED} more" if len(indices) > _ROWS_NAMED else ""
    return f"{'row' if len(indices) == 1 else 'rows'} {named}{more}"


def _warn(job: Job, message: str) -> None:
    job.reporter.report(event_pb2.LogEmitted(level=event_pb2.LOG_LEVEL_WARNING, message=message))
