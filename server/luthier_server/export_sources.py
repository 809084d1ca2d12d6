"""What can be exported: models, and checkpoints of jobs."""

from dataclasses import dataclass
from pathlib import Path

from luthier.trainer.v1.task_pb2 import BaseModelSource
from luthier.v1.job_pb2 import FineTuneTask
from luthier_server.errors import NotFound
from luthier_server.jobs import Jobs
from luthier_server.references import Found, References, is_model_id
from luthier_server.registry import Registry
from luthier_server.store.jobs import Checkpoint
from luthier_server.tasks import base_source


@dataclass(frozen=True, slots=True)
class ExportSource:
    """A tuned model on disk.

    name: `model_...` or `job_...:step-200`. base_model, base_model_revision: what it was made from, as a spec names it.
    is_full: every weight is its own; else it is an adapter. datasets: `ds_...` that can prove an export, best first.
    hub_token_secret: what its base was fetched with. checkpoint: what its job may prune; None for a model. found: the
    same as the registry has it.
    """

    name: str
    directory: Path
    base_model: str
    base_model_revision: str
    is_full: bool
    datasets: tuple[str, ...]
    hub_token_secret: str
    checkpoint: Checkpoint | None
    found: Found

    @property
    def parent(self) -> str:
        """The `model_...` whose weights it cannot do without; empty for none."""
        return self.base_model if not self.is_full and is_model_id(self.base_model) else ""


class ExportSources:
    """Finds what an export names, and the base that this was made from."""

    def __init__(self, references: References, registry: Registry, jobs: Jobs) -> None:
        self._references = references
        self._registry = registry
        self._jobs = jobs

    async def find(self, tenant: str, reference: str, linked: Path | None = None) -> ExportSource:
        """The model or checkpoint. linked: where the files of the checkpoint lie too, if they do: then its job may have
        pruned it. Raises NotFound."""
        job = None
        if linked is not None and linked.is_dir():
            job = await self._jobs.get(tenant, reference.partition(":")[0])
            noted = await self._jobs.noted_checkpoint(tenant, reference)
            found = Found(reference, linked, job.id, job.resolved_spec, checkpoint=noted)
        else:
            found = await self._references.find(tenant, reference)
        if not found.directory.is_dir():
            raise NotFound("model", found.name, "its files are gone")
        task = found.resolved_spec.fine_tune if found.resolved_spec is not None else FineTuneTask()
        model = found.model
        if model is None:
            job = job or await self._jobs.get(tenant, found.job_id)
            revision = await self._references.trained_revision(tenant, job)
            proofs = (task.validation_dataset, task.training_dataset)
        else:
            revision = model.base_model_revision
            proofs = (model.validation_dataset, model.training_dataset)
        return ExportSource(
            name=found.name,
            directory=found.directory.resolve(),
            base_model=task.base_model if model is None else model.base_model,
            base_model_revision=revision,
            is_full=task.HasField("full") if model is None else model.adaptation == "full",
            datasets=tuple(each for each in proofs if each),
            hub_token_secret=task.hub_token_secret,
            checkpoint=found.checkpoint,
            found=found,
        )

    async def model_id(self, tenant: str, reference: str) -> str:
        """The id that a reference to a model means; one that is an id already need not exist. Raises NotFound."""
        return reference if is_model_id(reference) else (await self._references.model(tenant, reference)).id

    async def root(self, tenant: str, source: ExportSource) -> ExportSource:
        """Of models that were made from others the one whose base Luthier did not make, or that was tuned whole. Raises
        NotFound for one that was deleted."""
        while parent := source.parent:
            try:
                source = await self.find(tenant, parent)
            except NotFound as error:
                raise NotFound("model", parent, f"{source.name} goes on from it") from error
        return source

    async def base(self, tenant: str, source: ExportSource) -> BaseModelSource:
        """The model below the adapter of a root. Of full fine-tuning its own directory, which has all weights. Raises
        InvalidArgument."""
        if source.is_full:
            return BaseModelSource(location=str(source.directory))
        report = await self._registry.base(tenant, source.base_model)
        found = base_source(report, source.base_model, source.base_model_revision)
        found.ClearField("adapter_dir")  # what was continued is part of the adapter that came out
        return found
