"""The files of a checkpoint as those of a model: linked, verified, there whole or not at all."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier_server.errors import FailedPrecondition, NotFound, StorageFull
from luthier_server.linking import link

LINEAGE = "luthier.json"
_MOST_BYTES = 8 << 20
_ASIDE = ".new-"
_MANIFEST = "manifest.json"
_STATE = "state.json"
_OF_TRAINING = frozenset({"optimizer.safetensors", _STATE, _MANIFEST})
"""What only a trainer that goes on from the checkpoint needs."""


def read_note(directory: Path) -> dict[str, Any]:
    """What a model's own directory says of where it came from; empty where there is nothing that can be read."""
    try:
        with open(directory / LINEAGE, "rb") as file:
            noted = json.loads(file.read(_MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return noted if isinstance(noted, dict) else {}


def promote(name: str, source: Path, target: Path, lineage: Mapping[str, Any]) -> tuple[int, dict[str, float]]:
    """Makes `target` a model's directory of the checkpoint `name` in `source`, with a note of where it came from; files
    are linked where that is possible. Returns the bytes of all files, and the checkpoint's numbers.

    Raises NotFound when the checkpoint goes meanwhile, FailedPrecondition CHECKPOINT_DAMAGED when it differs from its
    manifest, StorageFull.
    """
    aside = target.with_name(f"{_ASIDE}{target.name}")
    aside.mkdir()
    try:
        metrics = _numbers(json.loads((source / _STATE).read_bytes()))
        for path, noted in json.loads((source / _MANIFEST).read_bytes())["files"].items():
            if path in _OF_TRAINING:
                continue
            file = aside / path
            if not file.resolve().is_relative_to(aside.resolve()):
                raise ValueError(f"{path} lies elsewhere")
            file.parent.mkdir(parents=True, exist_ok=True)
            link(source / path, file)
            with open(file, "rb") as content:
                if hashlib.file_digest(content, "sha256").hexdigest() != noted["sha256"]:
                    raise ValueError(f"{path} differs from its manifest")
        note = json.dumps({**lineage, "metrics": metrics}, indent=2, sort_keys=True) + "\n"
        (aside / LINEAGE).write_text(note, encoding="utf-8")
        for made in (*aside.rglob("*"), aside):
            _sync(made)
        size = sum(each.stat().st_size for each in aside.rglob("*") if each.is_file())
        aside.rename(target)
        _sync(target.parent)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, FileNotFoundError) and not source.is_dir():
            raise NotFound("checkpoint", name, "it was deleted just now") from error
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull() from error
        if isinstance(error, FileNotFoundError | ValueError | KeyError | TypeError | AttributeError):
            raise FailedPrecondition(
                f"checkpoint '{name}' is damaged ({error}): register another one",
                subject=name,
                reason="CHECKPOINT_DAMAGED",
            ) from error
        raise
    return size, metrics


def _numbers(state: Mapping[str, Any]) -> dict[str, float]:
    """What a checkpoint's state tells of training so far, by the names that a finished job's numbers have."""
    counters = state.get("counters")
    if not counters:  # a puppet's
        return {}
    made = counters.get("step", 0) - len(counters.get("skipped", ())) - counters.get("empty", 0)
    numbers = {"trained_tokens": float(counters.get("trained_tokens", 0))}
    if made > 0:
        numbers |= {"train_loss": counters["loss_total"] / made, "final_loss": counters["last_loss"]}
    if counters.get("evaluated_step", -1) == counters.get("step"):
        numbers |= counters.get("evaluation", {})
    return numbers


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
