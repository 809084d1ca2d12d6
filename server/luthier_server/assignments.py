"""What the trainer of an attempt is given: its task, and the secrets that this names."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from luthier.trainer.v1.task_pb2 import ExportWork, Puppet, TrainerTask
from luthier.v1.export_task_pb2 import ExportTask
from luthier_server import destinations
from luthier_server.card import Form
from luthier_server.cards import Cards
from luthier_server.datasets import Datasets
from luthier_server.errors import NotFound
from luthier_server.export_sources import ExportSources
from luthier_server.exports import Exports
from luthier_server.job import Job
from luthier_server.jobs import Jobs
from luthier_server.lanes import Lane
from luthier_server.registry import Registry
from luthier_server.secrets import Secrets
from luthier_server.store.jobs import Attempt
from luthier_server.tasks import base_source, dataset_source


@dataclass(frozen=True, slots=True)
class AssignmentSettings:
    """devices: CUDA indices, one for each slot of the device lane; empty means CPU."""

    data_dir: Path
    devices: Sequence[int] = ()
    threads: int = 0
    heartbeat_seconds: float = 5
    wake_socket: str = ""
    puppet: Puppet | None = None
    cache_max_bytes: int = 0
    device_memory_bytes: int = 0
    llama_cpp_dir: Path | None = None
    export_roots: Sequence[Path] = ()


class Assignments:
    """Writes the tasks of attempts. Every path in them is chosen here."""

    def __init__(
        self,
        settings: AssignmentSettings,
        jobs: Jobs,
        datasets: Datasets,
        registry: Registry,
        exports: Exports,
        sources: ExportSources,
        cards: Cards,
        secrets: Secrets,
    ) -> None:
        self._settings = settings
        self._jobs = jobs
        self._datasets = datasets
        self._registry = registry
        self._exports = exports
        self._sources = sources
        self._cards = cards
        self._secrets = secrets

    def devices(self, lane: Lane, slot: int) -> Sequence[int]:
        """The CUDA devices of a slot; none on a CPU."""
        return self._settings.devices[slot : slot + 1] if lane == Lane.DEVICE else ()

    async def assign(self, job: Job, attempt: Attempt) -> tuple[TrainerTask, dict[str, str]]:
        """The task of an attempt, and the environment that its trainer gets. Raises NotFound and InvalidArgument for
        what is not there any more, OSError."""
        settings = self._settings
        task = TrainerTask(
            job_id=job.id,
            attempt=attempt.number,
            spec=job.resolved_spec,
            cache_dir=str(settings.data_dir / "cache"),
            cache_max_bytes=settings.cache_max_bytes,
            threads=settings.threads,
            cuda_devices=self.devices(Lane(attempt.lane), attempt.slot),
            wake_socket=settings.wake_socket,
            heartbeat_seconds=settings.heartbeat_seconds,
            puppet=settings.puppet,
        )
        secrets = await (self._export(task, job, attempt) if job.is_export else self._fine_tune(task, job, attempt))
        return task, secrets

    async def _fine_tune(self, task: TrainerTask, job: Job, attempt: Attempt) -> dict[str, str]:
        spec = job.resolved_spec.fine_tune
        base = await self._registry.base(job.tenant, spec.base_model)
        checkpoints = self._settings.data_dir / "jobs" / job.id / "checkpoints"
        checkpoints.mkdir(parents=True, exist_ok=True)
        task.base_model.CopyFrom(base_source(base, spec.base_model, spec.base_model_revision))
        training = await self._datasets.find(job.tenant, spec.training_dataset)
        task.training_dataset.CopyFrom(dataset_source(self._datasets, training))
        if spec.validation_dataset:
            validation = await self._datasets.find(job.tenant, spec.validation_dataset)
            task.validation_dataset.CopyFrom(dataset_source(self._datasets, validation))
        task.checkpoints_dir = str(checkpoints)
        task.model_dir = str(self._registry.directory(attempt.model_id))
        task.model_id = attempt.model_id
        task.resume_from = str(checkpoints / attempt.resume_from) if attempt.resume_from else ""
        points = await self._jobs.resume_points(job.tenant, job.id)
        task.resume_fallbacks.extend(str(checkpoints / each.directory) for each in points[1:])
        task.computed_tokens = job.progress.computed_tokens
        task.memory_limit_bytes = self._settings.device_memory_bytes
        if task.HasField("puppet") and spec.hyperparameters.max_steps:
            task.puppet.steps = spec.hyperparameters.max_steps
        return self._secrets.for_task(spec)

    async def _export(self, task: TrainerTask, job: Job, attempt: Attempt) -> dict[str, str]:
        spec = job.resolved_spec.export
        linked = self._jobs.source_dir(job.id)
        source = await self._sources.find(job.tenant, spec.model, linked)
        if source.checkpoint is not None and not linked.is_dir():  # as after a restore
            await self._jobs.link(source.checkpoint, linked)
        proof = await self._datasets.find(job.tenant, spec.proof_dataset)
        llama_cpp, roots = self._settings.llama_cpp_dir, self._settings.export_roots
        root = await self._sources.root(job.tenant, source)
        task.base_model.CopyFrom(await self._sources.base(job.tenant, root))
        task.export.CopyFrom(
            ExportWork(
                model_dir=str(source.directory if source.checkpoint is None else linked.resolve()),
                model_id=source.name,
                output_dir=str(self._exports.directory(attempt.export_id).resolve()),
                export_id=attempt.export_id,
                card=await self._cards.write(job.tenant, source.found, _card_form(spec)),
                proof_dataset=dataset_source(self._datasets, proof),
                llama_cpp_dir=str(llama_cpp.resolve()) if llama_cpp is not None else "",
                destination_roots=[str(each.absolute()) for each in roots],
            )
        )
        secrets = destinations.credentials(spec.destination, self._secrets)
        if task.base_model.is_hub and root.hub_token_secret:
            with contextlib.suppress(NotFound):  # the base may be here already
                secrets["HF_TOKEN"] = self._secrets.value(root.hub_token_secret)
        return secrets


def _card_form(task: ExportTask) -> Form:
    """What will lie beside the card."""
    if task.HasField("gguf"):
        return Form.GGUF_ADAPTER if task.gguf.adapter_only else Form.GGUF
    return Form.ADAPTER if task.HasField("adapter") else Form.WHOLE
