"""What can be exported: models, and checkpoints of jobs."""

import asyncio
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.trainer.v1.task_pb2 import BaseModelSource
from luthier.v1.job_pb2 import FineTuneTask
from luthier_server.errors import NotFound
from luthier_server.jobs import Jobs
from luthier_server.registry import Registry
from luthier_server.store.jobs import Checkpoint
from luthier_server.tasks import base_source

_CHECKPOINT = re.compile(r"(?P<job>job_[0-9A-Z]{26}):step-(?P<step>[0-9]{1,12})", re.ASCII)
_LINEAGE = "luthier.json"
_MOST_LINEAGE = 32 * 2**20
_SECRET = re.compile(r"[a-z][a-z0-9_]{0,63}", re.ASCII)


def checkpoint_name(reference: str) -> tuple[str, int] | None:
    """The job and the step that `job_...:step-200` names; None for anything else."""
    match = _CHECKPOINT.fullmatch(reference)
    return (match["job"], int(match["step"])) if match else None


@dataclass(frozen=True, slots=True)
class ExportSource:
    """A tuned model on disk.

    name: `model_...` or `job_...:step-200`. base_model, base_model_revision: what it was made from, as a spec names it.
    is_full: every weight is its own; else it is an adapter. datasets: `ds_...` that can prove an export, the best first.
    hub_token_secret: what its base was fetched with. checkpoint: what its job may prune; None for a model.
    """

    name: str
    directory: Path
    base_model: str
    base_model_revision: str
    is_full: bool
    datasets: tuple[str, ...]
    hub_token_secret: str = ""
    checkpoint: Checkpoint | None = None


class ExportSources:
    """Finds what an export names, and the base that this was made from."""

    def __init__(self, jobs: Jobs, registry: Registry) -> None:
        self._jobs = jobs
        self._registry = registry

    async def find(self, tenant: str, reference: str, linked: Path | None = None) -> ExportSource:
        """The model or checkpoint. linked: a directory that holds the checkpoint's files, if it is there: then its own
        job may have pruned it. Raises NotFound."""
        if (named := checkpoint_name(reference)) is not None:
            return await self._of_checkpoint(tenant, *named, linked)
        return await self._of_model(tenant, reference)

    async def base(self, tenant: str, source: ExportSource) -> BaseModelSource:
        """The model below the adapter: where models were made from others, the one below all their adapters. Of full
        fine-tuning its own directory, which has all weights. Raises NotFound, InvalidArgument."""
        if source.is_full:
            return BaseModelSource(location=str(source.directory))
        name, revision = source.base_model, source.base_model_revision
        while name.startswith("model_"):
            parent = await self.find(tenant, name)
            if parent.is_full:
                return BaseModelSource(location=str(parent.directory))
            name, revision = parent.base_model, parent.base_model_revision
        found = base_source(await self._registry.base(tenant, name), name, revision)
        found.ClearField("adapter_dir")  # what was continued is part of the adapter that came out
        return found

    async def _of_model(self, tenant: str, reference: str) -> ExportSource:
        model = await self._registry.get(tenant, reference)
        directory = self._registry.directory(model.id).resolve()
        lineage = await asyncio.to_thread(_lineage, directory)
        secret = _text(lineage, "spec", "fine_tune", "hub_token_secret")
        return ExportSource(
            name=model.id,
            directory=directory,
            base_model=model.base_model,
            base_model_revision=_text(lineage, "base_model", "revision"),
            is_full=model.adaptation == "full",
            datasets=_named(model.validation_dataset, model.training_dataset),
            hub_token_secret=secret if _SECRET.fullmatch(secret) else "",
        )

    async def _of_checkpoint(self, tenant: str, job_id: str, step: int, linked: Path | None) -> ExportSource:
        task: FineTuneTask = (await self._jobs.get(tenant, job_id)).resolved_spec.fine_tune
        checkpoint, directory = None, linked
        if directory is None or not directory.is_dir():
            checkpoint = await self._jobs.checkpoint(tenant, job_id, step)
            directory = self._jobs.checkpoint_path(checkpoint)
        return ExportSource(
            name=f"{job_id}:step-{step}",
            directory=directory.resolve(),
            base_model=task.base_model,
            base_model_revision=task.base_model_revision,
            is_full=task.WhichOneof("adaptation") == "full",
            datasets=_named(task.validation_dataset, task.training_dataset),
            hub_token_secret=task.hub_token_secret,
            checkpoint=checkpoint,
        )


def _named(*dataset_ids: str) -> tuple[str, ...]:
    return tuple(each for each in dataset_ids if each)


def _lineage(directory: Path) -> Any:
    """What a model's trainer noted of it; empty where that cannot be read. Raises NotFound for a model without files."""
    if not directory.is_dir():
        raise NotFound("model", directory.name, "its files are gone")
    path = directory / _LINEAGE
    try:
        return json.loads(path.read_bytes()) if path.stat().st_size <= _MOST_LINEAGE else {}
    except (OSError, ValueError, RecursionError):
        return {}


def _text(value: Any, *keys: str) -> str:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, str) else ""
