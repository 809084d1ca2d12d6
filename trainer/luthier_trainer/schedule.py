"""The learning rate over the steps, equal to transformers' `get_scheduler`."""

import math

from luthier.v1 import job_pb2


def warmup_steps(total_steps: int, steps: int | None, ratio: float | None) -> int:
    """Steps of warmup: `steps` when given, else the share `ratio` of all, rounded up as transformers does."""
    if steps is not None:
        return steps
    return math.ceil(total_steps * ratio) if ratio else 0


def learning_rate(
    peak: float, shape: job_pb2.LrScheduler.ValueType, step: int, *, warmup: int, total_steps: int
) -> float:
    """The rate that optimizer step `step`, counted from 0, uses: up from 0 in a line over `warmup` steps, then
    `shape`."""
    if step < warmup:
        return peak * step / max(1, warmup)
    if shape == job_pb2.LR_SCHEDULER_CONSTANT:
        return peak
    progress = (step - warmup) / max(1, total_steps - warmup)
    if shape == job_pb2.LR_SCHEDULER_LINEAR:
        return peak * max(0.0, 1.0 - progress)
    return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
