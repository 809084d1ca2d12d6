"""The state in a checkpoint: everything a continuation must know beside weights and moments. Loads no torch."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier_trainer import durable
from luthier_trainer.errors import TrainingError
from luthier_trainer.report import checkpoint_step
from luthier_trainer.standing import Standing

STATE = "state.json"
_FORMAT = 1


@dataclass
class Counters:
    """How far a job has come; the only thing about it, beside weights and moments, that changes from step to step.

    `loss_total` sums the loss of every step; `evaluated_step` is the newest step that was evaluated, -1 for none;
    `skipped` are the steps that were made without an update because something was not finite, oldest first; `empty`
    counts those whose rows train nothing; `sampled_step` is the newest step whose samples were told, -1 for none.
    """

    step: int = 0
    trained_tokens: int = 0
    computed_tokens: int = 0
    loss_total: float = 0.0
    last_loss: float = 0.0
    seconds: float = 0.0
    evaluated_step: int = -1
    evaluation: dict[str, float] = dataclasses.field(default_factory=dict)
    skipped: list[int] = dataclasses.field(default_factory=list)
    empty: int = 0
    sampled_step: int = -1
    standing: Standing = dataclasses.field(default_factory=Standing)


@dataclass(frozen=True)
class ResumedPlan:
    """The decisions that a continuation must share to be bitwise equal."""

    device: str
    dtype: str
    attention: str
    micro_batch_tokens: int
    threads: int
    activation_checkpointing: bool = False


@dataclass(frozen=True)
class State:
    """What `state.json` holds. `rows` identifies the training rows and their order; a continuation on other rows would
    be another job. `next_loss` is what `recheck` computes anew after a resume from at most `next_loss_tokens` tokens,
    None when nothing was noted; `environment` names the processor and the libraries it was computed with. `found_rate`
    is the learning rate that a range test found, None without one: a continuation does not look for it again."""

    job_id: str
    counters: Counters
    plan: ResumedPlan
    rows: dict[str, Any]
    next_loss: float | None = None
    next_loss_tokens: int = 0
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    found_rate: float | None = None


def write_state(directory: Path, state: State) -> None:
    """Writes the state into a checkpoint's directory."""
    durable.write_json(directory / STATE, {"format": _FORMAT, **dataclasses.asdict(state)})


def verified_state(directory: Path) -> State:
    """Verifies every file of a checkpoint and reads its state. Raises TrainingError CHECKPOINT_DAMAGED."""
    durable.verify_manifest(directory)
    return read_state(directory)


def read_state(directory: Path) -> State:
    """The state of a checkpoint that was verified. Raises TrainingError CHECKPOINT_DAMAGED when it makes no sense."""
    try:
        raw = json.loads((directory / STATE).read_bytes())
        if raw.pop("format") != _FORMAT:
            raise ValueError("its format is not known")
        numbers = raw.pop("counters")
        standing = Standing(**numbers.pop("standing", {}))
        counters, plan = Counters(**numbers, standing=standing), ResumedPlan(**raw.pop("plan"))
        return State(counters=counters, plan=plan, **raw)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainingError(
            "CHECKPOINT_DAMAGED", f"The checkpoint {directory.name} cannot be read: {error}.", "Start the job anew."
        ) from error


def step_of(directory: Path) -> int:
    """The step that a checkpoint's directory holds."""
    return checkpoint_step(directory.name)
