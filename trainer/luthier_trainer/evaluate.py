"""Evaluation: the mean loss over held-out rows."""

import math
from collections.abc import Sequence
from typing import Protocol

import torch

from luthier.v1 import event_pb2
from luthier_trainer.batches import Batches
from luthier_trainer.flatten import Example
from luthier_trainer.forward import Forward
from luthier_trainer.order import Indices
from luthier_trainer.stop import Check


class Rows(Protocol):
    """Tokenised rows, by index."""

    def examples(self, index: int) -> Sequence[Example]: ...


def evaluate(
    forward: Forward, batches: Batches, rows: Rows, indices: Indices, check: Check, *, step: int, epoch: float
) -> event_pb2.EvaluationCompleted:
    """Loss, perplexity and accuracy per scored token over `indices` of `rows`. Raises StopRequested."""
    model = forward.model
    model.train(False)
    loss = torch.zeros((), dtype=torch.float64, device=batches.device)
    correct = torch.zeros((), dtype=torch.int64, device=batches.device)
    scored = 0
    try:
        for batch in batches.of(example for index in indices for example in rows.examples(int(index))):
            check()
            batch_loss, batch_correct = forward.score(batch)
            loss += batch_loss
            correct += batch_correct
            scored += len(batch.targets)
    finally:
        model.train()
    mean = float(loss) / max(scored, 1)
    return event_pb2.EvaluationCompleted(
        step=step,
        epoch=epoch,
        loss=mean,
        perplexity=math.exp(mean) if mean < 700 else math.inf,
        token_accuracy=int(correct) / max(scored, 1),
        scored_tokens=scored,
        rows=len(indices),
    )
