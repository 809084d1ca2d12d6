"""Checkpoints: a directory each, usable by `from_pretrained`, with what a trainer needs to go on as if it had never
stopped.

    adapter_model.safetensors, adapter_config.json | model.safetensors, config.json    what is trained, in 32 bits
    tokenizer.json, ...                             the tokenizer and its chat template
    optimizer.safetensors                           AdamW's moments by weight
    state.json                                      the State
    manifest.json                                   size and SHA-256 of every file

No random state is saved, because none is carried over: the order of an epoch is a function of (seed, epoch), and
dropout draws from a stream of its own for each (seed, step).
"""

import contextlib
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from luthier_trainer import durable
from luthier_trainer.errors import TrainingError
from luthier_trainer.masters import Masters
from luthier_trainer.model import Trained
from luthier_trainer.optimizer import Optimizer
from luthier_trainer.report import checkpoint_directory, checkpoint_step
from luthier_trainer.state import State, read_state, write_state
from luthier_trainer.weights import write_weights

OPTIMIZER = "optimizer.safetensors"


def save(
    folder: Path,
    attempt: int,
    state: State,
    trained: Trained,
    masters: Masters,
    optimizer: Optimizer,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[str, int]:
    """Writes a checkpoint below `folder`, durably. Returns (its directory's name, bytes). Raises TrainingError
    STORAGE_FULL."""
    name = checkpoint_directory(state.counters.step, attempt)
    with durable.new_directory(folder / name) as aside:
        write_weights(trained, masters, tokenizer, aside)
        save_file(optimizer.state(), aside / OPTIMIZER)
        write_state(aside, state)
        durable.write_manifest(aside)
    return name, durable.size(folder / name)


def load_optimizer(directory: Path) -> dict[str, torch.Tensor]:
    """AdamW's state of a verified checkpoint."""
    return load_file(directory / OPTIMIZER)


def prune(folder: Path, keep: int) -> None:
    """Deletes all but the `keep` newest checkpoints, and the best that each of those knows; a later attempt's are newer
    than an earlier one's of any step."""
    found = newest_first(folder)
    kept = with_bests(found[:keep])
    for directory in found[keep:]:
        if directory.name not in kept:
            delete(directory)


def with_bests(directories: Iterable[Path]) -> set[str]:
    """The names of checkpoints and of the best ones that they know: going on from any of them needs its best."""
    names: set[str] = set()
    for directory in directories:
        names.add(directory.name)
        with contextlib.suppress(TrainingError):  # a damaged one knows nothing
            names.add(read_state(directory).counters.standing.best_checkpoint)
    return names - {""}


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or damaged, by attempt and then by step."""
    found: list[tuple[int, int, Path]] = []
    for directory in folder.iterdir() if folder.is_dir() else ():
        try:
            step = checkpoint_step(directory.name)
        except ValueError:
            continue
        found.append((int(directory.name.rpartition("-a")[2]), step, directory))
    return [directory for _, _, directory in sorted(found, reverse=True)]


def delete(directory: Path) -> None:
    """Deletes a checkpoint. It is renamed first: a reader never meets one that is half gone."""
    doomed = directory.rename(directory.with_name(f"{durable.ASIDE}{directory.name}"))
    shutil.rmtree(doomed, ignore_errors=True)
