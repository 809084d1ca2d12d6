"""Checkpoints: a directory each, usable by `from_pretrained`, with what a trainer needs to go on as if it had never
stopped.

    adapter_model.safetensors, adapter_config.json | model.safetensors, config.json    what is trained, in 32 bits
    tokenizer.json, ...                             the tokenizer and its chat template
    optimizer.safetensors                           AdamW's moments by weight
    state.json                                      the State below
    manifest.json                                   size and SHA-256 of every file

No random state is saved, because none is carried over: the order of an epoch is a function of (seed, epoch), and
dropout draws from a stream of its own for each (seed, step).
"""

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from luthier_trainer import durable
from luthier_trainer.errors import TrainingError
from luthier_trainer.masters import Masters
from luthier_trainer.model import Trained
from luthier_trainer.optimizer import Optimizer
from luthier_trainer.report import checkpoint_directory, checkpoint_step
from luthier_trainer.weights import write_weights

STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
_FORMAT = 1


@dataclass
class Counters:
    """How far a job has come; the only thing about it, beside weights and moments, that changes from step to step.

    `loss_total` sums the loss of every step; `evaluated_step` is the newest step that was evaluated, -1 for none.
    """

    step: int = 0
    trained_tokens: int = 0
    computed_tokens: int = 0
    loss_total: float = 0.0
    last_loss: float = 0.0
    seconds: float = 0.0
    evaluated_step: int = -1
    evaluation: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class ResumedPlan:
    """The decisions that a continuation must share to be bitwise equal."""

    device: str
    dtype: str
    attention: str
    micro_batch_tokens: int
    threads: int


@dataclass(frozen=True)
class State:
    """What `state.json` holds. `rows` identifies the training rows and their order; a continuation on other rows would
    be another job."""

    job_id: str
    counters: Counters
    plan: ResumedPlan
    rows: dict[str, Any]


def save(
    folder: Path,
    attempt: int,
    state: State,
    trained: Trained,
    masters: Masters,
    optimizer: Optimizer,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[str, int]:
    """Writes a checkpoint below `folder`, durably. Returns (its directory's name, bytes)."""
    name = checkpoint_directory(state.counters.step, attempt)
    with durable.new_directory(folder / name) as aside:
        write_weights(trained, masters, tokenizer, aside)
        save_file(optimizer.state(), aside / OPTIMIZER)
        durable.write_json(aside / STATE, {"format": _FORMAT, **dataclasses.asdict(state)})
        durable.write_manifest(aside)
    return name, durable.size(folder / name)


def load_state(directory: Path) -> State:
    """Verifies a checkpoint and reads its state. Raises TrainingError CHECKPOINT_DAMAGED."""
    durable.verify_manifest(directory)
    try:
        raw = json.loads((directory / STATE).read_bytes())
        if raw["format"] != _FORMAT:
            raise ValueError(f"format {raw['format']}")
        return State(raw["job_id"], Counters(**raw["counters"]), ResumedPlan(**raw["plan"]), raw["rows"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            "CHECKPOINT_DAMAGED", f"The checkpoint {directory.name} cannot be read: {error}.", "Start the job anew."
        ) from error


def step_of(directory: Path) -> int:
    """The step that a checkpoint's directory holds."""
    return checkpoint_step(directory.name)


def load_optimizer(directory: Path) -> dict[str, torch.Tensor]:
    """AdamW's state of a verified checkpoint."""
    return load_file(directory / OPTIMIZER)


def prune(folder: Path, keep: int) -> None:
    """Deletes all but the `keep` newest checkpoints; a later attempt's are newer than an earlier one's of any step."""
    found: list[tuple[int, int, Path]] = []
    for directory in folder.iterdir() if folder.is_dir() else ():
        try:
            step = checkpoint_step(directory.name)
        except ValueError:
            continue
        found.append((int(directory.name.rpartition("-a")[2]), step, directory))
    for _, _, directory in sorted(found)[:-keep]:
        # Renamed first: a reader never meets a checkpoint that is half gone.
        doomed = directory.rename(directory.with_name(f"{durable.ASIDE}{directory.name}"))
        shutil.rmtree(doomed, ignore_errors=True)
