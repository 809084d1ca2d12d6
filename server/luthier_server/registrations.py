"""What people say of models: names, tags, descriptions. A checkpoint that is given a name becomes a model."""

import asyncio
import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict

from luthier_server import spec as specs
from luthier_server.errors import LuthierError, NotFound, Violation
from luthier_server.ids import Ids
from luthier_server.made import made_by
from luthier_server.promotion import promote, read_note
from luthier_server.references import Found, References
from luthier_server.store import model_names as name_rows
from luthier_server.store import models as rows
from luthier_server.store.database import Database, Transaction
from luthier_server.store.jobs import Jobs as JobRows
from luthier_server.store.models import Model, Version

MOST_TAGS = 32


class Registrations:
    """Names and describes the models of every tenant."""

    def __init__(
        self,
        database: Database,
        references: References,
        models_dir: Path,
        model_ids: Ids,
        *,
        clock: Callable[[], int],
    ) -> None:
        self._database = database
        self._references = references
        self._models = rows.Models(database)
        self._jobs = JobRows(database)
        self._models_dir = models_dir
        self._model_ids = model_ids
        self._clock = clock

    async def register(self, tenant: str, reference: str, name: str) -> Version:
        """Makes a model the next version of a name, or finds the version that it is already. A checkpoint becomes a
        model first, once, whatever it is called.

        Raises NotFound, InvalidArgument for a name that looks like an id, FailedPrecondition for a damaged checkpoint,
        StorageFull.
        """
        specs.refuse(list(specs.name_violations(name, "name")))
        found = await self._references.find(tenant, reference)
        known = found.model.id if found.model is not None else await self._models.of_checkpoint(tenant, found.name)
        made = None if known else await self._copied(tenant, found)

        async def work(transaction: Transaction) -> Version:
            model_id = known or await rows.registered(transaction, tenant, found.name)
            if not model_id and made is not None:
                if made.adaptation != "full" and made.parent_model:
                    await _require(transaction, tenant, made.parent_model, f"{found.name} goes on from it")
                await rows.insert(transaction, made)
                model_id = made.id
            await _require(transaction, tenant, model_id, "it was deleted just now")
            return await name_rows.register(transaction, tenant, name, model_id, self._clock())

        try:
            version = await self._database.write(work)
        except LuthierError:
            if made is not None:
                await self._discard(made.id)
            raise
        if made is not None and version.model_id != made.id:  # another call was faster
            await self._discard(made.id)
        return version

    async def update(
        self,
        tenant: str,
        reference: str,
        *,
        set_tags: Mapping[str, str],
        remove_tags: Sequence[str],
        description: str | None,
    ) -> Model:
        """Changes a model's tags, and its description unless that is None. Raises NotFound, InvalidArgument."""
        both = sorted(set(set_tags) & set(remove_tags))
        specs.refuse([Violation("remove_tags", f"'{key}' is to be set too: do one of them") for key in both])
        model = await self._references.model(tenant, reference)

        async def work(transaction: Transaction) -> None:
            await _require(transaction, tenant, model.id, "it was deleted just now")
            count = await rows.tag(transaction, tenant, model.id, set_tags, remove_tags)
            if set_tags and count > MOST_TAGS:
                specs.refuse([Violation("set_tags", f"makes {count} tags; a model has {MOST_TAGS} at most")])
            if description is not None:
                await rows.describe(transaction, tenant, model.id, description)

        await self._database.write(work)
        return await self._references.model(tenant, model.id)

    async def _discard(self, model_id: str) -> None:
        await asyncio.to_thread(shutil.rmtree, self._models_dir / model_id, ignore_errors=True)

    async def _copied(self, tenant: str, found: Found) -> Model:
        """The model that a checkpoint is, with its files in place, and not yet a row."""
        job = await self._jobs.get(tenant, found.job_id)
        checkpoint = found.checkpoint
        if job is None or checkpoint is None:
            raise NotFound("job", found.job_id)
        licence, revision = await self._models.of_same_base(tenant, job.id, job.resolved_spec.fine_tune.base_model)
        model = made_by(
            job,
            model_id=self._model_ids.new("model"),
            step=checkpoint.step,
            size_bytes=0,
            metrics={},
            now=self._clock(),
            base_licence=licence,
            base_model_revision=revision,
            checkpoint=found.name,
        )
        target = self._models_dir / model.id
        noted = await asyncio.to_thread(read_note, self._models_dir / model.parent_model) if model.parent_model else {}
        lineage = _lineage(model, noted)
        size, metrics = await asyncio.to_thread(promote, found.name, found.directory, target, lineage)
        return dataclasses.replace(model, size_bytes=size, metrics=metrics)


async def _require(transaction: Transaction, tenant: str, model_id: str, why: str) -> None:
    if not await rows.present(transaction, tenant, model_id):
        raise NotFound("model", model_id, why)


def _lineage(model: Model, parent: Mapping[str, Any]) -> dict[str, object]:
    """What the server knows of a checkpoint, in the words in which a trainer notes it for a finished model. parent: the
    same of the model that it goes on from, whose base is its base too."""
    base = parent.get("base_model")
    above: Mapping[str, Any] = base if isinstance(base, dict) else {}
    is_elsewhere = model.base_model.startswith(("builtin/", "/")) or model.parent_model
    return {
        "format": 1,
        "job_id": model.job_id,
        "model_id": model.id,
        "checkpoint": model.checkpoint,
        "steps": model.step,
        "spec": MessageToDict(model.resolved_spec, preserving_proto_field_name=True) if model.resolved_spec else {},
        "base_model": {
            "name": model.base_model,
            "hub_id": above.get("hub_id", "") if is_elsewhere else model.base_model,
            "revision": model.base_model_revision or above.get("revision", ""),
            "licence": model.base_licence,
        },
    }
