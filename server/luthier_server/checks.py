"""What a dataset is for a base model: previews, and the check that a job passes before it waits for a device."""

import asyncio
import contextlib
import math
import os
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

from luthier.trainer.v1.task_pb2 import CheckWork, DataAnswer, PreviewWork, TrainerTask
from luthier.v1.datasets_pb2 import (
    CheckDatasetRequest,
    PreviewDatasetRequest,
    PreviewDatasetResponse,
    TokenReports,
    TransferProgress,
)
from luthier.v1.event_pb2 import PhaseProgressed
from luthier.v1.job_pb2 import FineTuneTask, JobError, JobSpec
from luthier_server import spec as specs
from luthier_server.data_work import DataWork, WorkFailed, WorkLimits, WorkProgress
from luthier_server.datasets import Datasets
from luthier_server.errors import InvalidArgument, Violation, sentences
from luthier_server.job import Job
from luthier_server.references import References
from luthier_server.registry import Registry
from luthier_server.secrets import Secrets
from luthier_server.store.datasets import Dataset
from luthier_server.store.jobs import Jobs as JobRows
from luthier_server.tasks import base_source, dataset_source

_ROWS = 3
_PREVIEWS = 4


class Checks:
    """Shows and checks datasets as a base model will see them, by the trainer's own code."""

    def __init__(
        self,
        datasets: Datasets,
        registry: Registry,
        references: References,
        jobs: JobRows,
        work: DataWork,
        secrets: Secrets,
        cache: Path,
        *,
        cache_max_bytes: int,
        limits: WorkLimits,
    ) -> None:
        self._datasets = datasets
        self._registry = registry
        self._references = references
        self._jobs = jobs
        self._work = work
        self._secrets = secrets
        self._cache = cache
        self._cache_max_bytes = cache_max_bytes
        self._limits = limits
        self._previews = asyncio.Semaphore(_PREVIEWS)
        # A check keeps a core busy: half of them are left to training. Those that people ask for keep no job waiting.
        self._asked = asyncio.Semaphore(max(1, (os.cpu_count() or 1) // 2))
        self._of_jobs = _Places(max(1, (os.cpu_count() or 1) // 2))

    async def preview(self, tenant: str, request: PreviewDatasetRequest) -> PreviewDatasetResponse:
        """Rows as the model will see them. Raises NotFound, InvalidArgument, WorkFailed, Unavailable."""
        dataset = await self._datasets.find(tenant, request.dataset)
        wanted = await self._wanted(tenant, request)
        task = await self._task(tenant, wanted, dataset, None)
        task.preview.CopyFrom(PreviewWork(count=request.count or _ROWS, lines=request.lines))
        async with self._previews:
            answer = await self._work.run(task, self._secrets.for_task(wanted), seconds=self._limits.preview)
        raise_error(answer)
        return answer.preview

    async def check(self, tenant: str, request: CheckDatasetRequest) -> AsyncIterator[TransferProgress | TokenReports]:
        """Tells how far it is, and ends with what was found, which is kept. Raises as `preview`."""
        training = await self._datasets.find(tenant, request.dataset)
        validation = (
            await self._datasets.find(tenant, request.validation_dataset) if request.validation_dataset else None
        )
        wanted = await self._wanted(tenant, request)
        news: asyncio.Queue[TransferProgress | None] = asyncio.Queue()
        checking = asyncio.create_task(
            self._check(tenant, wanted, training, validation, lambda each: news.put_nowait(_transfer(each.progress)))
        )
        checking.add_done_callback(lambda _: news.put_nowait(None))
        try:
            while (told := await news.get()) is not None:
                yield told
            answer = await checking
            raise_error(answer)
            yield answer.check
        finally:
            checking.cancel()
            await asyncio.wait([checking])

    async def check_job(self, job: Job, on_progress: Callable[[WorkProgress], None]) -> DataAnswer:
        """What the datasets of a job are for its base model; an answer's error is the job's. Raises as `preview`."""
        spec = job.resolved_spec.fine_tune
        training = await self._datasets.find(job.tenant, spec.training_dataset)
        validation = await self._datasets.find(job.tenant, spec.validation_dataset) if spec.validation_dataset else None
        return await self._check(job.tenant, spec, training, validation, on_progress, job=job)

    async def step_aside(self, job: Job) -> None:
        """Lets the check of another job begin, where it can, though that of this one goes on."""
        await self._of_jobs.step_aside(job.id)

    async def _check(
        self,
        tenant: str,
        wanted: FineTuneTask,
        training: Dataset,
        validation: Dataset | None,
        on_progress: Callable[[WorkProgress], None],
        *,
        job: Job | None = None,
    ) -> DataAnswer:
        task = await self._task(tenant, wanted, training, validation)
        task.check.CopyFrom(CheckWork())
        task.job_id = job.id if job is not None else ""
        secrets = self._secrets.for_task(wanted)
        async with self._asked if job is None else self._of_jobs.place(job.id):
            answer = await self._work.run(task, secrets, silence=self._limits.silence, on_progress=on_progress)
        if answer.HasField("check"):
            await self._complete(tenant, task.spec, answer.check, training, validation)
        return answer

    async def _complete(
        self, tenant: str, spec: JobSpec, reports: TokenReports, training: Dataset, validation: Dataset | None
    ) -> None:
        """Fills in what the child cannot know, and keeps the reports."""
        wanted = spec.fine_tune
        for report, dataset in ((reports.training, training), (reports.validation, validation)):
            if dataset is None:
                continue
            report.dataset_id = dataset.id
            report.base_model = wanted.base_model
            report.max_length = report.max_length or wanted.hyperparameters.max_length
            report.tokenization.CopyFrom(wanted.tokenization)
            if wanted.tokenization.chat_template:
                report.tokenization.chat_template = "given"  # its hash is there
        statistics = reports.training.statistics
        statistics.estimated_steps = specs.steps(wanted, training.row_count)
        rate = await self._jobs.newest_rate(tenant, wanted.base_model)
        if rate and statistics.rows:
            tokens_a_step = statistics.tokens / statistics.rows * wanted.hyperparameters.batch_size
            statistics.estimated_seconds = math.ceil(statistics.estimated_steps * tokens_a_step / rate)
        await self._datasets.save_token_report(tenant, reports.training)
        if validation is not None:
            await self._datasets.save_token_report(tenant, reports.validation)

    async def _wanted(self, tenant: str, request: PreviewDatasetRequest | CheckDatasetRequest) -> FineTuneTask:
        """The job that the dataset is looked at for. Raises InvalidArgument."""
        specs.refuse(list(specs.tokenization_violations(request.tokenization, "tokenization")))
        wanted = FineTuneTask(
            base_model=await self._references.base(tenant, request.base_model),
            base_model_revision=request.base_model_revision,
            tokenization=request.tokenization,
            hub_token_secret=request.hub_token_secret,
        )
        if request.HasField("max_length"):
            wanted.hyperparameters.max_length = request.max_length
        return wanted

    async def _task(
        self, tenant: str, wanted: FineTuneTask, training: Dataset, validation: Dataset | None
    ) -> TrainerTask:
        base = await self._registry.base(tenant, wanted.base_model) if wanted.base_model else None
        if base is not None:
            length = wanted.hyperparameters.max_length
            specs.refuse(list(specs.length_violations(length, base.max_positions, wanted.base_model, "max_length")))
        spec = specs.resolved(
            JobSpec(fine_tune=wanted),
            rows=training.row_count,
            max_positions=base.max_positions if base is not None else 0,
            row_format=training.format,
        )
        task = TrainerTask(
            spec=spec,
            training_dataset=dataset_source(self._datasets, training),
            cache_dir=str(self._cache),
            cache_max_bytes=self._cache_max_bytes,
        )
        if base is not None:
            task.base_model.CopyFrom(base_source(base, wanted.base_model, wanted.base_model_revision))
        if validation is not None:
            task.validation_dataset.CopyFrom(dataset_source(self._datasets, validation))
        return task


class _Places:
    """As many places for checks that jobs wait for, and as many for those that no job waits for any more."""

    def __init__(self, count: int) -> None:
        self._waited_for = asyncio.Semaphore(count)
        self._aside = asyncio.Semaphore(count)
        self._held: dict[str, asyncio.Semaphore] = {}
        self._let_go: list[str] = []
        """Nobody waits for these, the first first, and yet they hold a place that others wait for."""

    @contextlib.asynccontextmanager
    async def place(self, job_id: str) -> AsyncIterator[None]:
        """Waits for a place, and holds one."""
        await self._waited_for.acquire()
        self._held[job_id] = self._waited_for
        try:
            yield
        finally:
            if job_id in self._let_go:
                self._let_go.remove(job_id)
            (left := self._held.pop(job_id)).release()
            if left is self._aside and self._let_go:
                await self.step_aside(self._let_go.pop(0))

    async def step_aside(self, job_id: str) -> None:
        """Changes the kind of place, as soon as one is free."""
        if self._held.get(job_id) is not self._waited_for:
            return
        if self._aside.locked():
            if job_id not in self._let_go:
                self._let_go.append(job_id)
            return
        await self._aside.acquire()  # at once
        self._held[job_id] = self._aside
        self._waited_for.release()


def _transfer(progress: PhaseProgressed) -> TransferProgress:
    return TransferProgress(completed=progress.completed, total=progress.total, unit=progress.unit or "rows")


def raise_error(answer: DataAnswer, path: str = "") -> None:
    """Raises InvalidArgument for an answer that says why there is none; `path` comes before the fields it is about.
    Raises WorkFailed for one that tells of the child, not of what it was asked."""
    if not answer.HasField("error"):
        return
    error: JobError = answer.error
    text = sentences(error.message, error.hint)
    # Without a path nothing was asked that says how much memory a job would take.
    if error.reason == "INTERNAL" or (error.reason == "OUT_OF_MEMORY" and not path):
        raise WorkFailed(text)
    raise InvalidArgument(
        text,
        [Violation(path + _FIELDS.get(error.reason, "training_dataset" if path else "dataset"), text[:400])],
        reason=error.reason,
    )


_FIELDS: Mapping[str, str] = {
    "MODEL_NOT_FOUND": "base_model",
    "TEMPLATE_MISSING": "tokenization.chat_template",
    "TEMPLATE_UNSUPPORTED": "tokenization.chat_template",
    "TEMPLATE_INVALID": "tokenization.chat_template",
    "TEMPLATE_UNKNOWN": "tokenization.chat_template_name",
    "TOKENIZER_UNSUPPORTED": "base_model",
    "TEMPLATE_MISMATCH": "tokenization.chat_template_name",
    "TEMPLATE_TOO_SLOW": "tokenization.chat_template",
    "TEMPLATE_TOO_LARGE": "tokenization.chat_template",
    "MODULE_NOT_FOUND": "lora.target_modules",
    "ADAPTER_UNSUPPORTED": "lora",
    "QUANTIZATION_UNAVAILABLE": "lora.quantization",
    "OUT_OF_MEMORY": "hyperparameters.max_length",
}
