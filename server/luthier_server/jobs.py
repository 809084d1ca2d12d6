"""Jobs as clients see them: creating, finding, cancelling."""

import asyncio
import dataclasses
import functools
import shutil
import sqlite3
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import structlog

from luthier.v1.job_pb2 import FineTuneTask, JobSpec, JobState
from luthier_server import auto, failpoints
from luthier_server import spec as specs
from luthier_server.change import Change
from luthier_server.datasets import Datasets
from luthier_server.errors import Draining, FailedPrecondition, NotFound, Violation
from luthier_server.fitting import Fitting
from luthier_server.hub import Hub
from luthier_server.ids import Ids
from luthier_server.job import (
    ACTIVE,
    AT_REST,
    CANCELLED,
    CANCELLING,
    PAUSED,
    PAUSING,
    QUEUED,
    SUCCEEDED,
    VALIDATING,
    Job,
)
from luthier_server.linking import link_tree
from luthier_server.references import References, is_model_id
from luthier_server.registry import Registry
from luthier_server.store import jobs as rows
from luthier_server.store.database import Database, Transaction
from luthier_server.store.jobs import Checkpoint
from luthier_server.submission import Draft, body_of, new_job, same_request, store
from luthier_server.tasks import Resolved

log = structlog.get_logger()


def microseconds() -> int:
    """Now, in microseconds since the epoch."""
    return int(failpoints.wall_clock() * 1_000_000)


_REMOVALS, _REMOVAL_SECONDS = 20, 0.05


class Jobs:
    """The jobs of every tenant."""

    def __init__(
        self,
        database: Database,
        hub: Hub,
        datasets: Datasets,
        registry: Registry,
        references: References,
        jobs_dir: Path,
        exports_dir: Path,
        *,
        job_ids: Ids,
        max_queued: int,
        validates: bool = True,
        fitting: Fitting | None = None,
        clock: Callable[[], int] = microseconds,
    ) -> None:
        self._database = database
        self._rows = rows.Jobs(database)
        self._hub = hub
        self._datasets = datasets
        self._registry = registry
        self._references = references
        self._jobs_dir = jobs_dir
        self._exports_dir = exports_dir
        self._job_ids = job_ids
        self._max_queued = max_queued
        self._first_state = VALIDATING if validates else QUEUED
        self._fitting = fitting
        self._clock = clock
        self._draining = False
        self.changed = asyncio.Event()
        self.to_validate = asyncio.Event()

    def refuse_new(self) -> None:
        """The server is stopping: no job is created any more."""
        self._draining = True

    async def create(self, tenant: str, spec: JobSpec, request_id: str, validate_only: bool) -> Job:
        """Makes a job, or finds the one that the same request made before.

        Raises InvalidArgument with every violation, NotFound for a dataset or model, AlreadyExists when the request id
        was used for another spec, FailedPrecondition when the machine is too small, Exhausted when the queue is full.
        """

        async def draw() -> Draft:
            found = await self.resolve(tenant, spec)
            source = await self._origin(tenant, found.spec)
            if self._fitting is not None:
                await self._fitting.require(found)
            return Draft(
                found.spec,
                self._first_state,
                found.dataset_ids,
                found.reasons,
                model_id=base_model if is_model_id(base_model := found.spec.fine_tune.base_model) else "",
                checkpoint_of=source.job_id if source else "",
                link=functools.partial(self._take_origin, source) if source else None,
            )

        return await self.submit(tenant, spec, request_id, validate_only, draw)

    async def submit(
        self, tenant: str, spec: JobSpec, request_id: str, validate_only: bool, draw: Callable[[], Awaitable[Draft]]
    ) -> Job:
        """Makes the job that `draw` has drafted for a spec, or finds the one that the same request made before.

        Raises what `draw` raises, AlreadyExists when the request id was used for another spec, FailedPrecondition when
        its job was deleted, Exhausted when the queue is full, Draining.
        """
        if self._draining:
            raise Draining()
        body = body_of(spec)
        if request_id and (earlier := await self._rows.by_request(tenant, request_id)):
            return same_request(*earlier, body, request_id)
        draft = await draw()
        job = new_job("" if validate_only else self._job_ids.new("job"), tenant, spec, draft.resolved, self._clock())
        if validate_only:
            return dataclasses.replace(job, state=draft.first_state)

        async def work(transaction: Transaction) -> Job:
            change = await store(transaction, job, draft, checkpoints, request_id, body, self._max_queued)
            if draft.first_state == VALIDATING:
                transaction.after_commit(self.to_validate.set)
            return await change.commit(transaction, self._hub, self.changed.set)

        try:
            checkpoints = await draft.link(job) if draft.link is not None else []
            return await self._database.write(work)
        except Exception as error:
            await asyncio.to_thread(shutil.rmtree, self._jobs_dir / job.id, ignore_errors=True)
            if not isinstance(error, sqlite3.IntegrityError):
                raise
            earlier = await self._rows.by_request(tenant, request_id)
            if earlier is None:
                raise
            return same_request(*earlier, body, request_id)

    async def resolve(self, tenant: str, spec: JobSpec) -> Resolved:
        """What a spec means: every default, and the model and rows that it names. Raises InvalidArgument with every
        violation, NotFound for a dataset."""
        specs.refuse(list(specs.cross_violations(spec)))
        task = spec.fine_tune
        training = await self._datasets.find(tenant, task.training_dataset)
        violations = list(specs.format_violations("training_dataset", training.format))
        validation = None
        if task.validation_dataset:
            validation = await self._datasets.find(tenant, task.validation_dataset)
            violations += specs.format_violations("validation_dataset", validation.format)
        base_model = await self._references.base(tenant, task.base_model)
        base = await self._registry.base(tenant, base_model)
        if task.WhichOneof("adaptation") != "full":
            violations += specs.module_violations(task.lora, base.module_names, task.base_model)
        elif base.adapter_dir:
            violations.append(
                Violation("spec.fine_tune.full", f"{task.base_model} is an adapter: go on from it with lora")
            )
        violations += specs.length_violations(
            task.hyperparameters.max_length,
            base.max_positions,
            task.base_model,
            "spec.fine_tune.hyperparameters.max_length",
        )
        if task.validation_fraction and int(training.row_count * task.validation_fraction) >= training.row_count:
            violations.append(Violation("spec.fine_tune.validation_fraction", "leaves no row to train on"))
        specs.refuse(violations)
        decided, reasons = auto.decided(spec, rows=training.row_count, base=base)
        resolved = specs.resolved(
            decided, rows=training.row_count, max_positions=base.max_positions, row_format=training.format
        )
        resolved.fine_tune.base_model = base_model
        resolved.fine_tune.training_dataset = training.id
        if validation is not None:
            resolved.fine_tune.validation_dataset = validation.id
        return Resolved(resolved, base, training, validation, tuple(reasons))

    async def _origin(self, tenant: str, resolved: JobSpec) -> Checkpoint | None:
        """The checkpoint that a new job goes on from, or None. Raises InvalidArgument where the job would differ."""
        task = resolved.fine_tune
        if not task.resume_from:
            return None
        found = await self._references.find(tenant, task.resume_from)
        before = FineTuneTask()  # what the store gives out belongs to all
        before.CopyFrom((await self.get(tenant, found.job_id)).resolved_spec.fine_tune)
        specs.resolve_adaptation(before)
        specs.refuse(
            [
                Violation(f"spec.fine_tune.{field}", f"must be as in {found.job_id}, whose checkpoint is gone on from")
                for field in ("base_model", "base_model_revision", "training_dataset", "lora", "full")
                if getattr(before, field) != getattr(task, field)
            ]
        )
        return found.checkpoint

    async def _take_origin(self, source: Checkpoint, job: Job) -> list[Checkpoint]:
        """Links another job's checkpoint into the new job, as of attempt 0, so that it outlives the other job."""
        name = f"{source.step:06d}-a0"
        await self.link(source, self._jobs_dir / job.id / "checkpoints" / name)
        return [Checkpoint(job.id, source.step, 0, name, source.size_bytes, job.create_time)]

    async def link(self, checkpoint: Checkpoint, target: Path) -> None:
        """Makes a directory that holds a checkpoint's files, whole or not at all; they stay there when the checkpoint
        goes. Raises NotFound when it has gone."""
        there = self._references.checkpoint_dir(checkpoint)
        try:
            await asyncio.to_thread(link_tree, there, target)
        except OSError as error:
            if there.is_dir():
                raise
            name = f"{checkpoint.job_id}:step-{checkpoint.step}"
            raise NotFound("checkpoint", name, "it was pruned meanwhile") from error

    async def get(self, tenant: str, job_id: str) -> Job:
        """The job. Raises NotFound."""
        job = await self._rows.get(tenant, job_id)
        if job is None:
            raise NotFound("job", job_id)
        return job

    async def page(
        self,
        tenant: str,
        *,
        below: str,
        limit: int,
        states: Sequence[JobState.ValueType],
        labels: Mapping[str, str],
        id_prefix: str,
    ) -> list[Job]:
        """Jobs newest first, with ids below `below` (empty: from the newest)."""
        return await self._rows.page(
            tenant, below=below, limit=limit, states=states, labels=labels, id_prefix=id_prefix
        )

    async def validating(self) -> list[Job]:
        """The jobs that are being validated or wait for it, the next one first; at most 100."""
        return await self._rows.validating()

    async def unchecked(self, reason: str) -> list[Job]:
        """The jobs that were queued for this reason before their datasets were checked, and whose check is missing."""
        return await self._rows.unchecked(reason)

    async def queue_positions(self, tenant: str) -> dict[str, int]:
        """Place in the queue of its lane, from 1, of every job that waits."""
        waiting: dict[str, int] = {}
        places: dict[str, int] = {}
        for job_id, lane in await self._rows.queued(tenant):
            waiting[lane] = places[job_id] = waiting.get(lane, 0) + 1
        return places

    async def checkpoints(self, tenant: str, job_id: str) -> list[Checkpoint]:
        """The checkpoints on disk, newest first: by attempt, then by step. Raises NotFound."""
        await self.get(tenant, job_id)
        return await self.resume_points(tenant, job_id)

    async def noted_checkpoint(self, tenant: str, name: str) -> Checkpoint | None:
        """What is known of the checkpoint `job_...:step-200`, also when it was pruned; None for nothing."""
        job_id, _, step = name.partition(":step-")
        known = await self._rows.checkpoints(tenant, job_id)
        return next((each for each in known if str(each.step) == step), None)

    async def resume_points(self, tenant: str, job_id: str) -> list[Checkpoint]:
        """Where a job's next attempt may go on from, best first."""
        known = await self._rows.checkpoints(tenant, job_id)
        return [each for each in known if self._references.checkpoint_dir(each).is_dir()]

    async def cancel(self, tenant: str, job_id: str) -> Job:
        """Asks a job to stop; one that no trainer works on is CANCELLED at once.

        Raises NotFound, and FailedPrecondition for a job that succeeded or failed.
        """

        def decide(change: Change) -> None:
            if change.job.state in (CANCELLED, CANCELLING):
                return
            _refuse_ended(change.job, "cancelled")
            if change.job.state in ACTIVE:
                change.move(CANCELLING, "CANCEL_REQUESTED", _leaving(change.job))
            else:
                change.move(CANCELLED, "CANCEL_REQUESTED")

        return await self.decide(tenant, job_id, decide)

    async def pause(self, tenant: str, job_id: str) -> Job:
        """Asks a job to rest; one that no trainer works on is PAUSED at once.

        Raises NotFound, and FailedPrecondition for a job that has ended or is being cancelled.
        """

        def decide(change: Change) -> None:
            if change.job.state in (PAUSING, PAUSED):
                change.set(pause_reason="PAUSE_REQUESTED" if change.job.state == PAUSED else "")
                return
            _refuse_ended(change.job, "paused")
            if change.job.state == CANCELLING:
                raise FailedPrecondition(f"job '{job_id}' is being cancelled", subject=job_id, reason="JOB_CANCELLING")
            if change.job.state == VALIDATING:
                raise FailedPrecondition(
                    f"job '{job_id}' is being validated and holds no device: pause it once it is queued",
                    subject=job_id,
                    reason="JOB_VALIDATING",
                )
            if change.job.state in ACTIVE:
                change.move(PAUSING, "PAUSE_REQUESTED", _leaving(change.job))
            else:
                change.move(PAUSED, "PAUSE_REQUESTED")
                change.set(pause_reason="PAUSE_REQUESTED")

        return await self.decide(tenant, job_id, decide)

    async def resume(self, tenant: str, job_id: str, reason: str = "RESUME_REQUESTED") -> Job:
        """Queues a paused job again. A job that waits or runs already stays as it is.

        Raises NotFound, and FailedPrecondition for a job that has ended or is on its way to rest.
        """

        def decide(change: Change) -> None:
            if change.job.state == PAUSED:
                change.move(QUEUED, reason, "waits for a free slot")
                return
            _refuse_ended(change.job, "resumed")
            if change.job.state in (PAUSING, CANCELLING):
                raise FailedPrecondition(
                    f"job '{job_id}' is not at rest yet: try again when its trainer has left",
                    subject=job_id,
                    reason="JOB_NOT_AT_REST",
                )

        return await self.decide(tenant, job_id, decide)

    async def decide(self, tenant: str, job_id: str, decide: Callable[[Change], None]) -> Job:
        """Has `decide` change a job, in one transaction with the events of the change. Raises NotFound."""

        async def work(transaction: Transaction) -> Job:
            job = await rows.load(transaction, job_id)
            if job is None or job.tenant != tenant:
                raise NotFound("job", job_id)
            change = Change(job, self._clock())
            decide(change)
            if change.job == job:
                return job
            transaction.after_commit(self.changed.set)
            if job.state == VALIDATING:
                transaction.after_commit(self.to_validate.set)
            return await change.commit(transaction, self._hub, self.changed.set)

        job = await self._database.write(work)
        await self.let_go(job)
        return job

    def source_dir(self, job_id: str) -> Path:
        """Where an export job keeps the checkpoint that it exports, until it ends."""
        return self._jobs_dir / job_id / "source"

    async def let_go(self, job: Job) -> None:
        """Removes what a job needed until its end, if this is it, and an export that came to nothing."""
        if not (job.terminal and job.is_export):
            return
        await asyncio.to_thread(shutil.rmtree, self.source_dir(job.id), ignore_errors=True)
        if job.state != SUCCEEDED and job.attempt:
            await self._discard((await self._rows.attempt(job.id, job.attempt)).export_id)

    async def _discard(self, export_id: str) -> None:
        for name in (export_id, f".tmp-{export_id}"):
            await asyncio.to_thread(shutil.rmtree, self._exports_dir / name, ignore_errors=True)

    async def delete(self, tenant: str, job_id: str) -> Job:
        """Deletes a job at rest: its events, spools and checkpoints. Its model stays; its watches end NOT_FOUND.

        Raises NotFound, and FailedPrecondition while a trainer works on it or it waits for one.
        """

        unfinished = ""

        async def work(transaction: Transaction) -> Job:
            nonlocal unfinished
            job = await rows.load(transaction, job_id)
            if job is None or job.tenant != tenant:
                raise NotFound("job", job_id)
            if job.is_export and job.attempt and job.state != SUCCEEDED:
                unfinished = (await rows.load_attempt(transaction, job_id, job.attempt)).export_id
            if job.state not in AT_REST:
                raise FailedPrecondition(
                    f"job '{job_id}' is not at rest: cancel or pause it first", subject=job_id, reason="JOB_NOT_AT_REST"
                )
            if exporting := await rows.exporting_checkpoints(transaction, tenant, job_id):
                raise FailedPrecondition(
                    f"a checkpoint of job '{job_id}' is being exported by {', '.join(exporting)}: wait for it, or"
                    " cancel it",
                    subject=job_id,
                    reason="JOB_IN_USE",
                )
            await rows.bury(transaction, job, self._clock())
            transaction.after_commit(lambda: self._hub.delete(job_id))
            return job

        job = await self._database.write(work)
        await asyncio.to_thread(_remove, self._jobs_dir / job_id)
        if unfinished:
            await self._discard(unfinished)
        return job


def _remove(folder: Path) -> None:
    """Removes a job's folder, also while the host still notes there how its last trainer ended."""
    for _ in range(_REMOVALS):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(_REMOVAL_SECONDS)


def _leaving(job: Job) -> str:
    return "the trainer leaves" if job.is_export else "the trainer saves a checkpoint and leaves"


def _refuse_ended(job: Job, verb: str) -> None:
    if job.terminal:
        name = JobState.Name(job.state).removeprefix("JOB_STATE_")
        raise FailedPrecondition(
            f"job '{job.id}' has {name.lower()} and cannot be {verb}".replace("has cancelled", "was cancelled"),
            subject=job.id,
            reason="JOB_ENDED",
            metadata={"state": name},
        )
