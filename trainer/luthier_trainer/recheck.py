"""Whether a resumed job computes what it computed before: the loss of the next batch, noted with each checkpoint and
computed anew after a resume.

It is taken from the first micro-batch of the step to come, forward only and without dropout. So it depends on every
weight, on the rows and their order, and on how this machine rounds; it draws no random number and leaves no gradient.
It takes at most 1,024 tokens, and no more than this job trains in a second, which go forward in about a third of one:
a slow machine must save its checkpoint within the grace of a cancel.
"""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import peft
import torch
import transformers

from luthier.v1 import event_pb2
from luthier_trainer.data.tokens.stored import StoredExample
from luthier_trainer.job import Job
from luthier_trainer.state import State

_MOST_TOKENS = 1024
_FEWEST_TOKENS = 64
_CLOSE = 1e-5
_WORDS = {"micro_batch_tokens": "micro-batch tokens"}


def noted(job: Job) -> State:
    """What a checkpoint of the job as it is now notes."""
    tokens = max(_FEWEST_TOKENS, min(_MOST_TOKENS, int(job.throughput.tokens_per_second)))
    return dataclasses.replace(
        job.state(),
        next_loss=next_loss(job, tokens),
        next_loss_tokens=tokens,
        environment=_environment(job.compute.device),
    )


def next_loss(job: Job, tokens: int) -> float | None:
    """Mean loss per target over at most so many tokens; None after the last step, for a step that trains nothing, for a
    row of one token, and for a loss that is not finite."""
    if job.counters.step >= job.total_steps:
        return None
    budget = min(tokens, job.batches.budget)
    batch = next(dataclasses.replace(job.batches, budget=budget).of(_examples(job, tokens)), None)
    if batch is None or not len(batch.targets):
        return None
    model = job.forward.model
    model.train(False)
    try:
        total, _ = job.forward.score(batch)
    finally:
        model.train()
    loss = float(total) / len(batch.targets)
    return loss if math.isfinite(loss) else None


def _examples(job: Job, tokens: int) -> Iterator[StoredExample]:
    """The rows of the next step, cut to the first tokens; every token of one whose answer lies behind them counts."""
    for index in job.order.batch(job.counters.step):
        for example in job.rows.examples(int(index)):
            ids, trained = example.input_ids[:tokens], example.trained[:tokens]
            yield StoredExample(ids, trained if trained[1:].any() else np.ones_like(trained))


def _environment(device: torch.device) -> dict[str, str]:
    """What rounding depends on beside the plan."""
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "processor": processor,
    }


def recheck(job: Job, recorded: State) -> event_pb2.ResumeChecked | None:
    """Compares the job, taken up from a checkpoint and before its first step, with what the checkpoint noted. None when
    nothing was noted, as after the last step."""
    before = recorded.next_loss
    now = None if before is None else next_loss(job, recorded.next_loss_tokens)
    if before is None or now is None:
        return None
    found = {**dataclasses.asdict(job.resumed_plan()), **_environment(job.compute.device)}
    noted = {**dataclasses.asdict(recorded.plan), **recorded.environment}
    differences = [
        f"{_WORDS.get(name, name)} {value}, was {noted[name]}"
        for name, value in found.items()
        if name in noted and noted[name] != value
    ]
    verified = now == before and not differences
    return event_pb2.ResumeChecked(
        step=job.counters.step,
        verified=verified,
        recorded_loss=before,
        recomputed_loss=now,
        message="resume verified" if verified else _message(differences, before, now),
    )


def _message(differences: list[str], before: float, now: float) -> str:
    error = abs(now - before) / max(abs(before), 1e-30)
    if now == before:
        closeness = "the losses are equal to the last bit"
    elif error <= _CLOSE:
        closeness = "the losses are equal within 1e-5"
    else:
        closeness = f"the losses differ by {error:.1e} of their size"
    return f"{', '.join(differences) or 'nothing that was noted differs'}: {closeness}"
