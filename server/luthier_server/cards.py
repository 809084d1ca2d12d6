"""Gathers what a card tells of a model: its row, its `luthier.json`, its datasets, and the models it goes on from."""

import asyncio
import re
from collections.abc import Mapping, Sequence
from typing import Any

from luthier_server.card import Form, Subject, TrainingData, card, form_of, is_hub_id
from luthier_server.errors import NotFound
from luthier_server.made import made_by
from luthier_server.promotion import read_note
from luthier_server.references import Found
from luthier_server.store.database import Database
from luthier_server.store.datasets import Dataset
from luthier_server.store.datasets import Datasets as DatasetRows
from luthier_server.store.jobs import Jobs as JobRows
from luthier_server.store.models import Model, Models

_MOST_PARENTS = 100
_HUB_SOURCE = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)", re.ASCII)


class Cards:
    """Writes the cards of every tenant's models and checkpoints."""

    def __init__(self, database: Database) -> None:
        self._models = Models(database)
        self._datasets = DatasetRows(database)
        self._jobs = JobRows(database)

    async def write(self, tenant: str, found: Found, form: Form | None = None) -> str:
        """The card of a model or checkpoint; with a form that of an export of it. Raises NotFound."""
        model = found.model or await self._of_checkpoint(tenant, found)
        made = await asyncio.to_thread(read_note, found.directory)
        parents, base = await self._parents(tenant, model)
        data = [
            await self._data(tenant, role, dataset_id, made.get(f"{role}_dataset"))
            for role, dataset_id in (("training", model.training_dataset), ("validation", model.validation_dataset))
            if dataset_id
        ]
        return card(Subject(model, made, base, data, parents), form or form_of(model))

    async def _of_checkpoint(self, tenant: str, found: Found) -> Model:
        """The model that a checkpoint would be."""
        job = await self._jobs.get(tenant, found.job_id)
        if job is None or found.checkpoint is None:
            raise NotFound("job", found.job_id)
        licence, revision = await self._models.of_same_base(tenant, job.id, job.resolved_spec.fine_tune.base_model)
        return made_by(
            job,
            model_id="",
            step=found.checkpoint.step,
            size_bytes=found.checkpoint.size_bytes,
            metrics={},
            now=found.checkpoint.create_time,
            base_licence=licence,
            base_model_revision=revision,
            checkpoint=found.name,
        )

    async def _parents(self, tenant: str, model: Model) -> tuple[Sequence[str], str]:
        """The models that this one goes on from, nearest first, and the base at their root."""
        parents: list[str] = []
        walked: Model | None = model
        base = model.base_model
        while walked is not None and walked.parent_model and len(parents) < _MOST_PARENTS:
            parents.append(walked.parent_model)
            walked = await self._models.get(tenant, walked.parent_model)
            base = walked.base_model if walked is not None else base
        return parents, base

    async def _data(self, tenant: str, role: str, dataset_id: str, noted: object) -> TrainingData:
        """A dataset, by its row, and by what the model noted of it once that is deleted."""
        dataset = await self._datasets.by_id(tenant, dataset_id)
        if dataset is not None:
            name = f"{dataset.name}@{dataset.version}"
            hub_id = await self._hub_id(tenant, dataset)
            return TrainingData(role, dataset_id, name, dataset.sha256, dataset.row_count, hub_id)
        known: Mapping[str, Any] = noted if isinstance(noted, dict) else {}
        rows = known.get("rows")
        return TrainingData(
            role,
            dataset_id,
            str(known.get("name", "")),
            str(known.get("sha256", "")),
            rows if isinstance(rows, int) else 0,
        )

    async def _hub_id(self, tenant: str, dataset: Dataset) -> str:
        """The Hub's dataset that rows came from, also when they were split or sampled since; empty for none, and for a
        mixture."""
        walked: Dataset | None = dataset
        for _ in range(_MOST_PARENTS):
            if walked is None:
                break
            match = _HUB_SOURCE.match(walked.source)
            if match is not None and is_hub_id(match[1]):
                return match[1]
            if walked.lineage is None or len(walked.lineage.parents) != 1:
                break
            walked = await self._datasets.by_id(tenant, walked.lineage.parents[0])
        return ""
