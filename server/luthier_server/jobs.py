"""All that happens to jobs: creating, finding, cancelling, and what their trainers report.

Only this module moves a job's state. A trainer only reports.
"""

import asyncio
import dataclasses
import hashlib
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from luthier.trainer.v1.report_pb2 import TrainerReport
from luthier.v1.event_pb2 import AttemptStarted, CheckpointSaved, JobEvent, StepCompleted
from luthier.v1.job_pb2 import JobError, JobSpec, JobState, Progress
from luthier_server import spec as specs
from luthier_server.change import PAYLOADS, Change
from luthier_server.datasets import Datasets
from luthier_server.errors import AlreadyExists, Draining, Exhausted, FailedPrecondition, NotFound, Violation
from luthier_server.hub import Hub
from luthier_server.ids import Ids
from luthier_server.job import (
    ACTIVE,
    CANCELLED,
    CANCELLING,
    FAILED,
    PREPARING,
    QUEUED,
    RUNNING,
    SUCCEEDED,
    TERMINAL,
    Job,
)
from luthier_server.registry import Registry
from luthier_server.store import datasets as dataset_rows
from luthier_server.store import jobs as rows
from luthier_server.store import models as model_rows
from luthier_server.store.database import Database, Transaction
from luthier_server.store.jobs import Attempt, Checkpoint

log = structlog.get_logger()
_LAST = frozenset({"finished", "failed", "stopped"})


def microseconds() -> int:
    """Now, in microseconds since the epoch."""
    return time.time_ns() // 1000


@dataclass(frozen=True, slots=True)
class Ending:
    """How an attempt's process ended, for what its last report does not say."""

    lost_reason: str
    lost_message: str
    log_lines: Sequence[str] = ()
    requeue: bool = False


class Jobs:
    """The jobs of every tenant."""

    def __init__(
        self,
        database: Database,
        hub: Hub,
        datasets: Datasets,
        registry: Registry,
        jobs_dir: Path,
        *,
        job_ids: Ids,
        model_ids: Ids,
        max_queued: int,
        clock: Callable[[], int] = microseconds,
    ) -> None:
        self._database = database
        self._rows = rows.Jobs(database)
        self._hub = hub
        self._datasets = datasets
        self._registry = registry
        self._jobs_dir = jobs_dir
        self._job_ids = job_ids
        self._model_ids = model_ids
        self._max_queued = max_queued
        self._clock = clock
        self._draining = False
        self.changed = asyncio.Event()

    def refuse_new(self) -> None:
        """The server is stopping: no job is created any more."""
        self._draining = True

    async def create(self, tenant: str, spec: JobSpec, request_id: str, validate_only: bool) -> Job:
        """Makes a job, or finds the one that the same request made before.

        Raises InvalidArgument with every violation, NotFound for a dataset or model, AlreadyExists when the request id
        was used for another spec, Exhausted when the queue is full.
        """
        if self._draining:
            raise Draining()
        body = hashlib.sha256(spec.SerializeToString(deterministic=True)).hexdigest()
        if request_id and (earlier := await self._rows.by_request(tenant, request_id)):
            return _same_request(*earlier, body, request_id)
        specs.refuse(list(specs.cross_violations(spec)))
        resolved, dataset_ids = await self._resolve(tenant, spec)
        now = self._clock()
        job = Job(
            id="" if validate_only else self._job_ids.new("job"),
            tenant=tenant,
            state=JobState.JOB_STATE_UNSPECIFIED,
            spec=spec,
            resolved_spec=resolved,
            error=JobError(),
            progress=Progress(),
            attempt=0,
            retries=0,
            last_sequence=0,
            model_id="",
            create_time=now,
            start_time=0,
            end_time=0,
        )
        if validate_only:
            return dataclasses.replace(job, state=QUEUED)

        async def work(transaction: Transaction) -> Job:
            [count] = await transaction.fetch(
                "SELECT count(*) AS queued FROM jobs WHERE tenant = ? AND state = ?", (tenant, QUEUED)
            )
            if count["queued"] >= self._max_queued:
                raise Exhausted(
                    f"{count['queued']} jobs wait already: try again when some have ended",
                    subject="queue",
                    reason="QUEUE_FULL",
                    retry_seconds=30,
                )
            await rows.insert(transaction, job, request_id, body)
            for dataset_id in dataset_ids:
                if not await dataset_rows.present(transaction, tenant, dataset_id):
                    raise NotFound("dataset", dataset_id)
                await dataset_rows.hold(transaction, tenant, dataset_id, job.id)
            change = Change(job, now)
            change.move(QUEUED, "SUBMITTED", "waits for a free slot")
            return await change.commit(transaction, self._hub, self.changed.set)

        try:
            return await self._database.write(work)
        except sqlite3.IntegrityError:
            earlier = await self._rows.by_request(tenant, request_id)
            if earlier is None:
                raise
            return _same_request(*earlier, body, request_id)

    async def _resolve(self, tenant: str, spec: JobSpec) -> tuple[JobSpec, list[str]]:
        task = spec.fine_tune
        violations: list[Violation] = []
        training = await self._datasets.find(tenant, task.training_dataset)
        found = [training]
        validation = None
        if task.validation_dataset:
            validation = await self._datasets.find(tenant, task.validation_dataset)
            found.append(validation)
        base = await self._registry.base(tenant, task.base_model)
        if task.WhichOneof("adaptation") != "full":
            violations += specs.module_violations(task.lora, base.module_names, task.base_model)
        elif base.adapter_dir:
            violations.append(
                Violation("spec.fine_tune.full", f"{task.base_model} is an adapter: go on from it with lora")
            )
        if base.max_positions and task.hyperparameters.max_length > base.max_positions:
            violations.append(
                Violation(
                    "spec.fine_tune.hyperparameters.max_length",
                    f"{task.base_model} was made for at most {base.max_positions} tokens",
                )
            )
        if task.validation_fraction and int(training.row_count * task.validation_fraction) >= training.row_count:
            violations.append(Violation("spec.fine_tune.validation_fraction", "leaves no row to train on"))
        specs.refuse(violations)
        resolved = specs.resolved(spec, rows=training.row_count, max_positions=base.max_positions)
        resolved.fine_tune.training_dataset = training.id
        if validation is not None:
            resolved.fine_tune.validation_dataset = validation.id
        return resolved, [each.id for each in found]

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

    async def queue_positions(self, tenant: str) -> dict[str, int]:
        """Place in the queue, from 1, of every job that waits."""
        return {job_id: place for place, job_id in enumerate(await self._rows.queued_ids(tenant), start=1)}

    async def checkpoint_dir(self, tenant: str, job_id: str, step: int) -> Path:
        """The newest attempt's checkpoint of that step. Raises NotFound."""
        await self.get(tenant, job_id)
        name = f"{job_id}:step-{step}"
        known = await self._rows.checkpoints(tenant, job_id)
        for each in known:
            path = self._jobs_dir / job_id / "checkpoints" / each.directory
            if each.step == step and path.is_dir():
                return path
        there = sorted({each.step for each in known if self._kept(each)})
        raise NotFound("checkpoint", name, f"the job has steps {', '.join(map(str, there)) or 'none'}")

    async def resume_point(self, job: Job) -> Checkpoint | None:
        """The newest checkpoint that is on disk, or None."""
        for each in await self._rows.checkpoints(job.tenant, job.id):
            if self._kept(each):
                return each
        return None

    def _kept(self, checkpoint: Checkpoint) -> bool:
        return (self._jobs_dir / checkpoint.job_id / "checkpoints" / checkpoint.directory).is_dir()

    async def cancel(self, tenant: str, job_id: str) -> Job:
        """Asks a job to stop; one that only waits is CANCELLED at once.

        Raises NotFound, and FailedPrecondition for a job that succeeded or failed.
        """

        async def work(transaction: Transaction) -> Job:
            job = await rows.load(transaction, job_id)
            if job is None or job.tenant != tenant:
                raise NotFound("job", job_id)
            if job.state in (CANCELLED, CANCELLING):
                return job
            if job.state in TERMINAL:
                name = JobState.Name(job.state).removeprefix("JOB_STATE_")
                raise FailedPrecondition(
                    f"job '{job_id}' has {name.lower()} and cannot be cancelled",
                    subject=job_id,
                    reason="JOB_ENDED",
                    metadata={"state": name},
                )
            change = Change(job, self._clock())
            if job.state in ACTIVE:
                change.move(CANCELLING, "CANCEL_REQUESTED", "the trainer saves a checkpoint and leaves")
            else:
                change.move(CANCELLED, "CANCEL_REQUESTED")
            transaction.after_commit(self.changed.set)
            return await change.commit(transaction, self._hub, self.changed.set)

        return await self._database.write(work)

    async def next_queued(self) -> str | None:
        """The job that waited longest, or None."""
        found = await self._database.read(
            "SELECT id FROM jobs WHERE tenant = ? AND state = ? ORDER BY id LIMIT 1", ("default", QUEUED)
        )
        return found[0]["id"] if found else None

    async def begin_attempt(self, job_id: str) -> tuple[Job, Attempt] | None:
        """Gives a queued job its next attempt and makes it PREPARING; None when it does not wait any more."""
        waiting = await self._rows.get("default", job_id)
        if waiting is None:
            return None
        resume = await self.resume_point(waiting)

        async def work(transaction: Transaction) -> tuple[Job, Attempt] | None:
            job = await rows.load(transaction, job_id)
            if job is None or job.state != QUEUED:
                return None
            change = Change(job, self._clock())
            change.set(attempt=job.attempt + 1, start_time=job.start_time or change.now)
            attempt = Attempt(
                job_id=job_id,
                number=change.job.attempt,
                spool_offset=0,
                reports=0,
                reason="FIRST" if job.attempt == 0 else await _last_reason(transaction, job),
                resume_from=resume.directory if resume else "",
                model_id=self._model_ids.new("model"),
                pid=0,
                outcome=b"",
                end_time=0,
            )
            await rows.insert_attempt(transaction, attempt, job.tenant, change.now)
            change.move(PREPARING, "SLOT_FREE")
            return await change.commit(transaction, self._hub, self.changed.set), attempt

        return await self._database.write(work)

    async def ingest(self, attempt: Attempt, reports: Sequence[TrainerReport], offset: int) -> Attempt:
        """Turns an attempt's next reports into events, and remembers that its spool is read up to `offset`.

        One transaction holds both, so that a report is ingested exactly once, whatever dies when.
        """

        async def work(transaction: Transaction) -> Attempt:
            job = await rows.load(transaction, attempt.job_id)
            stored = await rows.load_attempt(transaction, attempt.job_id, attempt.number)
            if job is None or job.attempt != attempt.number or stored.spool_offset != attempt.spool_offset:
                raise AssertionError(f"{attempt.job_id}: attempt {attempt.number} is not the one that is being read")
            change = Change(job, self._clock())
            after = dataclasses.replace(stored, spool_offset=offset)
            checkpoints: list[Checkpoint] = []
            for report in reports:
                if report.sequence <= after.reports:
                    raise AssertionError(f"{job.id}: report {report.sequence} came twice")
                after = _take(change, dataclasses.replace(after, reports=report.sequence), report, checkpoints)
            await rows.save_attempt(transaction, after)
            await rows.insert_checkpoints(transaction, job.tenant, checkpoints, change.now)
            await change.commit(transaction, self._hub, self.changed.set)
            return after

        return await self._database.write(work)

    async def settle(self, attempt: Attempt, ending: Ending) -> Job:
        """Ends an attempt whose process is gone and whose spool is read, by its last report or for want of one."""

        async def work(transaction: Transaction) -> Job:
            job = await rows.load(transaction, attempt.job_id)
            stored = await rows.load_attempt(transaction, attempt.job_id, attempt.number)
            if job is None or stored.end_time or job.attempt != attempt.number:
                raise AssertionError(f"{attempt.job_id}: attempt {attempt.number} is settled already")
            change = Change(job, self._clock())
            await self._conclude(transaction, change, stored, ending)
            await rows.save_attempt(transaction, dataclasses.replace(stored, end_time=change.now))
            return await change.commit(transaction, self._hub, self.changed.set)

        job = await self._database.write(work)
        log.info("attempt ended", job_id=job.id, attempt=attempt.number, state=JobState.Name(job.state))
        return job

    async def _conclude(self, transaction: Transaction, change: Change, attempt: Attempt, ending: Ending) -> None:
        job = change.job
        outcome = TrainerReport.FromString(attempt.outcome)
        kind = outcome.WhichOneof("payload")
        if kind == "finished":
            await self._succeed(transaction, change, attempt, outcome)
        elif kind == "failed":
            error = outcome.failed.error
            if job.state != CANCELLING and outcome.failed.retryable and _may_retry(job):
                self._retry(change, error.reason, error.message)
            else:
                change.move(FAILED, error.reason, error.message, error=error)
        elif job.state == CANCELLING:
            change.move(CANCELLED, "CANCEL_REQUESTED")
        elif kind == "stopped" or ending.requeue:
            change.move(QUEUED, ending.lost_reason, ending.lost_message)
        elif _may_retry(job):
            self._retry(change, ending.lost_reason, ending.lost_message)
        else:
            error = JobError(
                reason=ending.lost_reason,
                message=ending.lost_message,
                hint="see the log lines; set max_retries to try again from the newest checkpoint",
                log_lines=ending.log_lines,
            )
            change.move(FAILED, error.reason, error.message, error=error)

    def _retry(self, change: Change, reason: str, message: str) -> None:
        retries = change.job.retries + 1
        change.set(retries=retries)
        allowed = change.job.resolved_spec.max_retries
        change.move(QUEUED, reason, f"{message} (retry {retries} of {allowed})")

    async def _succeed(
        self, transaction: Transaction, change: Change, attempt: Attempt, outcome: TrainerReport
    ) -> None:
        job = change.job
        task = job.resolved_spec.fine_tune
        stem = task.base_model.rstrip("/").rpartition("/")[2]
        await model_rows.insert(
            transaction,
            model_rows.Model(
                id=attempt.model_id,
                tenant=job.tenant,
                name=f"{stem}-{task.suffix or job.spec.display_name or 'tuned'}",
                job_id=job.id,
                base_model=task.base_model,
                adaptation=task.WhichOneof("adaptation") or "lora",
                step=outcome.finished.step,
                size_bytes=outcome.finished.size_bytes,
                metrics=dict(outcome.finished.metrics),
                create_time=change.now,
            ),
        )
        if job.state == PREPARING:
            change.move(RUNNING, "TRAINING")
        change.move(SUCCEEDED, "FINISHED", model_id=attempt.model_id)


def _may_retry(job: Job) -> bool:
    return job.retries < job.resolved_spec.max_retries


async def _last_reason(transaction: Transaction, job: Job) -> str:
    """Why the job waits again: the reason of its newest StateChanged."""
    found = await transaction.fetch(
        "SELECT payload FROM events WHERE job_id = ? AND sequence = ?", (job.id, job.last_sequence)
    )
    return JobEvent.FromString(found[0]["payload"]).state_changed.reason if found else ""


def _same_request(job: Job, body_then: str, body: str, request_id: str) -> Job:
    if body_then != body:
        raise AlreadyExists(
            f"request_id {request_id} was used for another spec: send a new one",
            kind="request_id",
            name=request_id,
            reason="REQUEST_ID_REUSED",
        )
    return job


def _take(change: Change, attempt: Attempt, report: TrainerReport, checkpoints: list[Checkpoint]) -> Attempt:
    """Adds one report to a change; returns the attempt with it."""
    kind = report.WhichOneof("payload")
    if kind == "started":
        started = report.started
        change.emit(
            AttemptStarted(
                attempt=attempt.number,
                resumed_from_step=started.resumed_from_step,
                checkpoint=started.checkpoint,
                discarded_from_step=started.resumed_from_step,
                reason=attempt.reason,
                pid=started.pid,
            ),
            time=report.time,
        )
        return dataclasses.replace(attempt, pid=started.pid)
    if kind in _LAST:
        return dataclasses.replace(attempt, outcome=report.SerializeToString())
    if kind is None or kind == "heartbeat":
        return attempt
    payload = getattr(report, kind)
    if payload.DESCRIPTOR.full_name not in PAYLOADS:
        return attempt
    if isinstance(payload, StepCompleted):
        if change.job.state == PREPARING:
            change.move(RUNNING, "TRAINING")
        change.set(progress=_progress(payload, change.job))
    elif isinstance(payload, CheckpointSaved):
        checkpoints.append(
            Checkpoint(change.job.id, payload.step, attempt.number, payload.directory, payload.size_bytes)
        )
    change.emit(payload, time=report.time)
    return attempt


def _progress(step: StepCompleted, job: Job) -> Progress:
    eta = 0.0
    if step.tokens_per_second > 0 and step.step > 0:
        left = (step.total_steps - step.step) * step.trained_tokens / step.step
        eta = left / step.tokens_per_second
    return Progress(
        step=step.step,
        total_steps=step.total_steps,
        epoch=step.epoch,
        loss=step.loss,
        learning_rate=step.learning_rate,
        tokens_per_second=step.tokens_per_second,
        trained_tokens=step.trained_tokens,
        eta_seconds=eta,
        computed_tokens=step.computed_tokens,
    )
