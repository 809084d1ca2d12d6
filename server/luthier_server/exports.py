"""Exports: models in the form that others load. A job makes each; here they are asked for, found and deleted."""

import asyncio
import dataclasses
import functools
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from luthier.v1.export_task_pb2 import ExportTask, GgufType, WeightType
from luthier.v1.job_pb2 import JobSpec
from luthier_server import destinations
from luthier_server import spec as specs
from luthier_server.datasets import Datasets
from luthier_server.errors import InvalidArgument, NotFound, Obstacle, Violation
from luthier_server.export_sources import ExportSource, ExportSources
from luthier_server.job import QUEUED, Job
from luthier_server.jobs import Jobs
from luthier_server.lineage import EXPORT, Node
from luthier_server.secrets import Secrets
from luthier_server.store import exports as rows
from luthier_server.store.database import Database, Transaction
from luthier_server.store.exports import Export
from luthier_server.store.jobs import Checkpoint
from luthier_server.submission import Draft

_PROOF_ROWS = 16
_SHARD_BYTES = 5_000_000_000
_RETRIES = 2
_FOLDER = re.compile(r"(?:\.tmp-)?(?P<id>export_[0-9A-Z]{26})", re.ASCII)  # also one that is written aside


@dataclass(frozen=True, slots=True)
class _Refusal:
    """What is wrong with a field, and a stable name for it."""

    violation: Violation
    reason: str = ""


class Exports:
    """The exports of every tenant, over `exports/ID`."""

    def __init__(
        self,
        database: Database,
        jobs: Jobs,
        sources: ExportSources,
        datasets: Datasets,
        secrets: Secrets,
        exports_dir: Path,
        roots: Sequence[Path],
    ) -> None:
        self._database = database
        self._rows = rows.Exports(database)
        self._jobs = jobs
        self._sources = sources
        self._datasets = datasets
        self._secrets = secrets
        self._exports_dir = exports_dir
        self._roots = tuple(roots)

    def directory(self, export_id: str) -> Path:
        """Where an export's files lie."""
        return self._exports_dir / export_id

    async def create(self, tenant: str, task: ExportTask, request_id: str, validate_only: bool) -> Job:
        """Makes the job of an export, or finds the one that the same request made before.

        Raises InvalidArgument with every violation, and as `Jobs.submit`.
        """
        spec = JobSpec(display_name=f"export of {task.model}"[:120], export=task)
        return await self._jobs.submit(
            tenant, spec, request_id, validate_only, functools.partial(self._draft, tenant, spec)
        )

    async def get(self, tenant: str, export_id: str) -> Export:
        """The export with its files. Raises NotFound."""
        export = await self._rows.get(tenant, export_id)
        if export is None:
            raise NotFound("export", export_id)
        return export

    async def page(self, tenant: str, *, below: str, limit: int, model: str, id_prefix: str) -> list[Export]:
        """Exports newest first, without their files, with ids below `below` (empty: from the newest); with `model`
        only those of it. Raises NotFound for a name that means no model."""
        # Also of a checkpoint that is gone.
        model_id = model if ":" in model or not model else (await self._sources.model_id(tenant, model))
        return await self._rows.page(tenant, below=below, limit=limit, model_id=model_id, id_prefix=id_prefix)

    async def made_of(self, tenant: str, models: Sequence[str]) -> list[tuple[str, Node]]:
        """The exports of these models and checkpoints as lineage: pairs of what each was made of and the export."""
        found = await self._rows.of(tenant, models)
        return [(each.model_id, Node(each.id, EXPORT, _form(each.task))) for each in found]

    async def delete(self, tenant: str, export_id: str) -> None:
        """Deletes an export and its files. Raises NotFound."""

        async def work(transaction: Transaction) -> None:
            if not await rows.delete(transaction, tenant, export_id):
                raise NotFound("export", export_id)

        await self._database.write(work)
        await asyncio.to_thread(shutil.rmtree, self.directory(export_id), ignore_errors=True)

    async def sweep(self) -> None:
        """Removes what no export and no attempt needs: leftovers of a server that ended between two steps."""
        known = await self._rows.ids()
        for left in await asyncio.to_thread(lambda: list(self._exports_dir.iterdir())):
            match = _FOLDER.fullmatch(left.name)
            if match is not None and match["id"] not in known:
                await asyncio.to_thread(shutil.rmtree, left, ignore_errors=True)
        for job_id in await self._rows.ended_jobs():
            if (source := self._jobs.source_dir(job_id)).exists():
                await asyncio.to_thread(shutil.rmtree, source, ignore_errors=True)

    async def _draft(self, tenant: str, spec: JobSpec) -> Draft:
        task = spec.export
        refusals: list[_Refusal] = []
        source = None
        try:
            source = await self._sources.find(tenant, task.model)
            await self._sources.root(tenant, source)
        except NotFound as error:
            refusals.append(_Refusal(Violation("export.model", error.message), error.reason))
        else:
            refusals += _format_refusals(task, source)
        proof = await self._proof_dataset(tenant, task, source, refusals)
        refusals += map(_Refusal, destinations.check(task.destination, self._roots))
        try:
            destinations.credentials(task.destination, self._secrets)
        except NotFound as error:
            path = "export.destination.credentials_secret"
            refusals.append(_Refusal(Violation(path, error.message), error.reason))
        if source is None or refusals:
            first = refusals[0]
            more = f" (and {len(refusals) - 1} more)" if len(refusals) > 1 else ""
            raise InvalidArgument(
                f"{first.violation.field}: {first.violation.description}{more}",
                [each.violation for each in refusals],
                reason=first.reason,
            )
        draft = Draft(resolved(spec, source.name, proof), QUEUED, [proof], model_id=source.name)
        if source.checkpoint is None:
            return draft
        return dataclasses.replace(
            draft,
            model_id=source.parent,
            checkpoint_of=source.checkpoint.job_id,
            link=functools.partial(self._keep_checkpoint, source.checkpoint),
        )

    async def _proof_dataset(
        self, tenant: str, task: ExportTask, source: ExportSource | None, refusals: list[_Refusal]
    ) -> str:
        """The `ds_...` that proves an export; what keeps it from being that is added to `refusals`."""
        path = "export.proof_dataset"
        wanted = (task.proof_dataset,) if task.proof_dataset else source.datasets if source is not None else ()
        missing = None
        for each in wanted:
            try:
                found = await self._datasets.find(tenant, each)
            except NotFound as error:
                missing = error
                continue
            formats = specs.format_violations("proof_dataset", found.format)
            refusals += (_Refusal(Violation(path, each.description)) for each in formats)
            return found.id
        if task.proof_dataset and missing is not None:
            refusals.append(_Refusal(Violation(path, missing.message), missing.reason))
        elif source is not None:
            text = "the datasets that it was tuned and evaluated on are gone: name one that proves the export"
            refusals.append(_Refusal(Violation(path, text)))
        return ""

    async def _keep_checkpoint(self, checkpoint: Checkpoint, job: Job) -> list[Checkpoint]:
        """Links a checkpoint into the job that exports it: its own job may prune it. It is none of the exporting
        job's."""
        await self._jobs.link(checkpoint, self._jobs.source_dir(job.id))
        return []


async def dependents(transaction: Transaction, tenant: str, model_id: str) -> list[Obstacle]:
    """What keeps a model from being deleted: its exports are proven by it."""
    found = await rows.of_model(transaction, tenant, model_id)
    return [Obstacle("EXPORT", each, f"{each} was made of it: delete that one first") for each in found]


def _form(task: ExportTask) -> str:
    """What an export is, in a few words: `gguf q4_k_m`."""
    if task.HasField("gguf"):
        number = GgufType.Name(task.gguf.type).removeprefix("GGUF_TYPE_").lower()
        return f"gguf {number}{' adapter' if task.gguf.adapter_only else ''}"
    if task.HasField("merged"):
        return f"merged {WeightType.Name(task.merged.weights).removeprefix('WEIGHT_TYPE_').lower()}"
    return "adapter"


def resolved(spec: JobSpec, model: str, proof_dataset: str) -> JobSpec:
    """The spec with every default that the comments in `export_task.proto` promise."""
    full = JobSpec()
    full.CopyFrom(spec)
    full.max_retries = _RETRIES
    task = full.export
    task.model = model
    task.proof_dataset = proof_dataset
    if not task.HasField("proof_rows"):
        task.proof_rows = _PROOF_ROWS
    if task.HasField("merged"):
        task.merged.weights = task.merged.weights or WeightType.WEIGHT_TYPE_BF16
        if not task.merged.HasField("max_shard_bytes"):
            task.merged.max_shard_bytes = _SHARD_BYTES
    elif task.HasField("gguf"):
        task.gguf.type = task.gguf.type or GgufType.GGUF_TYPE_F16
    return full


def _format_refusals(task: ExportTask, source: ExportSource) -> list[_Refusal]:
    found = []
    gguf = task.gguf
    if gguf.adapter_only and gguf.type not in (GgufType.GGUF_TYPE_UNSPECIFIED, GgufType.GGUF_TYPE_F16):
        found.append(Violation("export.gguf.type", "an adapter alone is written as f16: leave it unset"))
    if source.is_full and task.HasField("adapter"):
        found.append(Violation("export.adapter", f"{source.name} was tuned whole and has no adapter: take merged"))
    if source.is_full and gguf.adapter_only:
        found.append(
            Violation("export.gguf.adapter_only", f"{source.name} was tuned whole and has no adapter: leave it out")
        )
    return [_Refusal(each) for each in found]
