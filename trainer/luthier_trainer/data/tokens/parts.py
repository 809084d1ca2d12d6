"""Which rows of a job are trained on and which are evaluated."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np

from luthier.trainer.v1 import task_pb2
from luthier_trainer.errors import TrainingError
from luthier_trainer.order import Indices, hold_out


class Rows(Protocol):
    """Tokenised rows, all of them or as they are wanted."""

    def __len__(self) -> int: ...

    def scores(self, indices: Indices) -> bool:
        """Whether any token of these rows is a target of the loss."""
        ...


_Rows = TypeVar("_Rows", bound=Rows)


@dataclass(frozen=True)
class Part(Generic[_Rows]):
    """Rows by their indices."""

    rows: _Rows
    indices: Indices

    @property
    def scores(self) -> bool:
        """Whether any token of them is a target of the loss."""
        return self.rows.scores(self.indices)


def parts(
    task: task_pb2.TrainerTask, training: _Rows, load: Callable[[task_pb2.DatasetSource], _Rows]
) -> tuple[Part[_Rows], Part[_Rows] | None]:
    """The rows to train on, and those to evaluate: held out of the training rows, or loaded. Raises as `load`."""
    spec = task.spec.fine_tune
    if not task.HasField("validation_dataset"):
        kept, held_out = hold_out(spec.hyperparameters.seed, len(training), spec.validation_fraction)
        return Part(training, kept), Part(training, held_out) if len(held_out) else None
    validation = load(task.validation_dataset)
    return Part(training, np.arange(len(training))), Part(validation, np.arange(len(validation)))


def require_scores(training: Part[_Rows], evaluated: Part[_Rows] | None) -> None:
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
