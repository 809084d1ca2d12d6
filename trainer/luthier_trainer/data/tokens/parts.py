"""Which rows of a job are trained on and which are evaluated."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from luthier.trainer.v1 import task_pb2
from luthier_trainer.data.tokens.tokenised import TokenisedRows
from luthier_trainer.errors import TrainingError
from luthier_trainer.order import Indices, hold_out


@dataclass(frozen=True)
class Part:
    """Rows by their indices."""

    rows: TokenisedRows
    indices: Indices

    @property
    def scores(self) -> bool:
        """Whether any token of them is a target of the loss."""
        return bool(self.rows.scored[self.indices].any())


def parts(
    task: task_pb2.TrainerTask, training: TokenisedRows, load: Callable[[task_pb2.DatasetSource], TokenisedRows]
) -> tuple[Part, Part | None]:
    """The rows to train on, and those to evaluate: held out of the training rows, or loaded. Raises as `load`."""
    spec = task.spec.fine_tune
    if not task.HasField("validation_dataset"):
        kept, held_out = hold_out(spec.hyperparameters.seed, len(training), spec.validation_fraction)
        return Part(training, kept), Part(training, held_out) if len(held_out) else None
    validation = load(task.validation_dataset)
    return Part(training, np.arange(len(training))), Part(validation, np.arange(len(validation)))


def require_scores(training: Part, evaluated: Part | None) -> None:
    """Raises TrainingError DATASET_INVALID for a job that would train, or evaluate, nothing and call it a loss of 0."""
    if not training.scores:
        raise TrainingError(
            "DATASET_INVALID",
            "No row that is left to train on has a token to train within max_length.",
            "Raise max_length, hold out fewer rows, or choose another `overlong` policy.",
        )
    if evaluated is not None and not evaluated.scores:
        raise TrainingError(
            "DATASET_INVALID",
            "No row to evaluate has a token to score within max_length.",
            "Raise max_length, hold out more rows, or choose another `overlong` policy.",
        )
