"""The learning rate over the steps, equal to transformers' schedules of the same settings."""

import math

from luthier.v1 import job_pb2


def warmup_steps(total_steps: int, steps: int | None, ratio: float | None) -> int:
    """Steps of warmup: `steps` when given, else the share `ratio` of all, rounded up as transformers does."""
    if steps is not None:
        return steps
    return math.ceil(total_steps * ratio) if ratio else 0


def decay_steps(total_steps: int, ratio: float) -> int:
    """Steps in which warmup-stable-decay decays: the share `ratio` of all, rounded up like the warmup."""
    return math.ceil(total_steps * ratio)


def learning_rate(
    peak: float,
    shape: job_pb2.LrScheduler.ValueType,
    step: int,
    *,
    warmup: int,
    total_steps: int,
    decay: int = 0,
    floor: float = 0.0,
) -> float:
    """The rate that optimizer step `step`, counted from 0, uses: up in a line over `warmup` steps, then `shape`.

    `decay` are the last steps, in which warmup-stable-decay comes down; `floor` is the share of the peak that is left
    after the last step. Equal to transformers' `get_cosine_with_min_lr_schedule_with_warmup`,
    `get_polynomial_decay_schedule_with_warmup` of power 1, `get_constant_schedule_with_warmup` and `get_wsd_schedule`
    of a linear decay. Only the last one warms up from the floor; the others from 0.
    """
    stable_decay = shape == job_pb2.LR_SCHEDULER_WARMUP_STABLE_DECAY
    if step < warmup:
        progress = step / warmup
        return peak * (floor + (1.0 - floor) * progress if stable_decay else progress)
    if shape == job_pb2.LR_SCHEDULER_CONSTANT:
        return peak
    if stable_decay:
        start = total_steps - decay
        left = 1.0 - max(0, step - start) / max(1, decay)
    else:
        progress = (step - warmup) / max(1, total_steps - warmup)
        left = 1.0 - progress
        if shape == job_pb2.LR_SCHEDULER_COSINE:
            left = 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (floor + (1.0 - floor) * max(0.0, left))
