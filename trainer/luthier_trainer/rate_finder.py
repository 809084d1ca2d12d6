"""The learning-rate range test (Smith 2017, arXiv 1506.01186): the rate that a job trains with, found before its first
step.

Mini steps on the job's own first batches, each at a higher rate than the one before, through everything that a step of
training goes through: micro-batches, masters, clipping, AdamW, dropout's and NEFTune's draws. Of each batch's loss the
loss of the same batch under the job's first weights is taken away, with the same draws: batches differ more from each
other than a mini step changes, and this way the curve shows the change alone. `rate_curve` reads it.

Afterwards weights, moments, counters and random streams are as they were, bit by bit: the job trains as one that was
given the rate.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from luthier.v1 import event_pb2
from luthier_trainer import rate_curve
from luthier_trainer.flatten import Example, scored_tokens
from luthier_trainer.job import Job
from luthier_trainer.stop import Check
from luthier_trainer.streams import step_seed

_MOST_STEPS = 80
_FEWEST_STEPS = 24
_FEWEST_ROWS = 4
_SHARE = 0.2
_LORA_RANGE = (1e-5, 1.0)
_FULL_RANGE = (1e-6, 0.1)
_REPORT_SECONDS = 0.5

Accumulate = Callable[[Job, Sequence[Example], Check], tuple[torch.Tensor, int]]
"""Leaves the gradient of a step's examples in the masters and returns (mean loss, on the device; real tokens)."""


def find(job: Job, accumulate: Accumulate, check: Check) -> None:
    """Sets `job.found_rate` and reports how, where the job asks for that and no checkpoint knows it already. Raises
    StopRequested, with the job as it was."""
    if not job.settings.find_rate or job.found_rate is not None:
        return
    with _untouched(job):
        tried, losses, start = _test(job, accumulate, check)
    reading = rate_curve.read(tried, losses, start)
    rate, rule = reading.rate, reading.rule
    if rate is None:
        rate = job.settings.peak_rate
        rule = f"the default, because {reading.rule}"
        message = f"no learning rate was found, because {reading.rule}: the job trains with the default, {rate:g}"
        job.reporter.report(event_pb2.LogEmitted(level=event_pb2.LOG_LEVEL_WARNING, message=message))
    job.found_rate = rate
    job.reporter.report(
        event_pb2.LearningRateFound(learning_rate=rate, rates=tried, losses=reading.losses, rule=rule), durable=True
    )


def extent(total_steps: int, batch_size: int) -> tuple[int, int]:
    """(mini steps, rows of each) for a job of so many steps.

    80 mini steps on whole batches where the job has 400 steps or more; else fewer, and of shorter jobs parts of their
    batches, so that they take a fifth of the job's rows, but at least 24 of 4 rows: fewer show no curve.
    """
    steps = max(_FEWEST_STEPS, min(_MOST_STEPS, int(total_steps * _SHARE)))
    rows = int(total_steps * batch_size * _SHARE) // steps
    return steps, min(batch_size, max(_FEWEST_ROWS, rows))


def _test(job: Job, accumulate: Accumulate, check: Check) -> tuple[list[float], list[float], float]:
    """(the rates that were tried, the loss at each, the loss to begin with). Ends early when the loss explodes."""
    batches = _batches(job)
    progress = _Progress(job, 2 * len(batches))
    before = []
    for index, examples in batches:
        before.append(_loss(job, index, examples, check))
        progress.add()
    start = sum(before) / max(len(before), 1)
    if not math.isfinite(start) or len(batches) < 2:
        return [], [], start
    low, high = _LORA_RANGE if job.settings.lora is not None else _FULL_RANGE
    tried: list[float] = []
    losses: list[float] = []
    for rate, (index, examples), first in zip(rate_curve.rates(low, high, len(batches)), batches, before, strict=True):
        job.counters.step = index
        mean, _ = accumulate(job, examples, check)
        loss = float(mean)
        if not math.isfinite(loss):
            break
        tried.append(rate)
        losses.append(start + loss - first)
        if _explodes(losses, start) or not math.isfinite(float(job.optimizer.step(rate))):
            break
        progress.add()
    progress.end()
    return tried, losses, start


def _batches(job: Job) -> list[tuple[int, Sequence[Example]]]:
    """(step, examples) of the job's first batches that train something, cut to the rows of a mini step."""
    steps, rows = extent(job.total_steps, job.settings.batch_size)
    found: list[tuple[int, Sequence[Example]]] = []
    for index in range(job.counters.step, job.counters.step + 2 * steps):
        if len(found) == steps:
            break
        examples = [each for row in job.order.batch(index)[:rows] for each in job.rows.examples(int(row))]
        if scored_tokens(examples):
            found.append((index, examples))
    return found


@torch.no_grad()
def _loss(job: Job, step: int, examples: Sequence[Example], check: Check) -> float:
    """The mean loss of a step's examples under the weights as they are, with the draws that the step will have."""
    seed = step_seed(job.settings.seed, step)
    torch.manual_seed(seed)
    total = torch.zeros((), dtype=torch.float64, device=job.compute.device)
    done = 0
    for batch in job.batches.of(examples):
        check()
        if len(batch.targets):
            with job.neftune.noise(batch.lengths, first=done, seed=seed):
                total += job.forward.loss_sum(batch)
        done += len(batch.lengths)
    return float(total) / scored_tokens(examples)


def _explodes(losses: Sequence[float], start: float) -> bool:
    """Whether the last losses are so far above the first that nothing better is to come."""
    recent = losses[-3:]
    return len(recent) == 3 and min(recent) > 1.25 * start


@contextlib.contextmanager
def _untouched(job: Job) -> Iterator[None]:
    """Whatever is trained within, and however that ends, the job is as before afterwards. Copies lie on the host."""
    model, counters = job.forward.model, job.counters
    training = model.training
    values = job.masters.values.detach().to("cpu", copy=True)
    moments = {name: each.to("cpu") for name, each in job.optimizer.state().items()}
    devices = [job.compute.device] if job.compute.device.type == "cuda" else []
    job.counters = dataclasses.replace(counters)
    model.train()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        job.counters = counters
        job.masters.values.copy_(values)
        job.masters.publish()
        job.masters.zero_gradients()
        job.optimizer.load(moments)
        model.train(training)


class _Progress:
    """Tells how far the test is, at most twice a second."""

    def __init__(self, job: Job, total: int) -> None:
        self._job = job
        self._total = total
        self._done = 0
        self._told_at = 0.0
        self._tell()

    def add(self) -> None:
        """One more pass over a batch."""
        self._done += 1
        if time.monotonic() - self._told_at >= _REPORT_SECONDS:
            self._tell()

    def end(self) -> None:
        """It is over, early or not."""
        self._done = self._total
        self._tell()

    def _tell(self) -> None:
        self._told_at = time.monotonic()
        phase = event_pb2.PHASE_FINDING_LEARNING_RATE
        self._job.reporter.report(
            event_pb2.PhaseProgressed(phase=phase, completed=self._done, total=self._total, unit="passes")
        )
