"""The attempts of jobs: how one begins, what its trainer reports, how it ends.

A trainer only reports; whether that moves its job's state is decided here.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from luthier.trainer.v1.report_pb2 import Finished, TrainerReport
from luthier.v1.event_pb2 import AttemptStarted, CheckpointSaved, JobEvent, Phase, PhaseProgressed, StepCompleted
from luthier.v1.job_pb2 import JobError, JobState, Progress
from luthier_server.change import PAYLOADS, Change
from luthier_server.hub import Hub
from luthier_server.ids import Ids
from luthier_server.job import (
    CANCELLED,
    CANCELLING,
    FAILED,
    PAUSED,
    PAUSING,
    PREPARING,
    QUEUED,
    RUNNING,
    STORAGE_FULL,
    SUCCEEDED,
    Job,
)
from luthier_server.jobs import Jobs, microseconds
from luthier_server.lanes import Lane
from luthier_server.made import made_by
from luthier_server.store import exports as export_rows
from luthier_server.store import jobs as rows
from luthier_server.store import model_names as name_rows
from luthier_server.store import models as model_rows
from luthier_server.store.database import Database, Transaction
from luthier_server.store.jobs import Attempt, Checkpoint

log = structlog.get_logger()
_LAST = frozenset({"finished", "failed", "stopped"})
_LONGEST_WAIT = 300.0
_LOST_HINT = "see the log lines; it can be gone on from its newest checkpoint with fine_tune.resume_from"
_LOST_EXPORT_HINT = "see the log lines, and ask for the export again"


@dataclass(frozen=True, slots=True)
class Ending:
    """How an attempt's process ended, for what its last report does not say. curable: another try could do better.
    hint: empty for the usual one."""

    lost_reason: str
    lost_message: str
    log_lines: Sequence[str] = ()
    hint: str = ""
    curable: bool = True
    requeue: bool = False
    storage_full: bool = False


class Attempts:
    """Begins, feeds and settles attempts."""

    def __init__(
        self,
        database: Database,
        hub: Hub,
        jobs: Jobs,
        model_ids: Ids,
        export_ids: Ids,
        *,
        retry_seconds: float = 5,
        clock: Callable[[], int] = microseconds,
    ) -> None:
        self._database = database
        self._hub = hub
        self._jobs = jobs
        self._model_ids = model_ids
        self._export_ids = export_ids
        self._retry_seconds = retry_seconds
        self._clock = clock

    async def next_queued(self, lane: Lane) -> str | None:
        """The job of a lane that waited longest, or None.

        A retry further off than any is ever set was set by a clock that ran ahead: it is due.
        """
        now = self._clock()
        found = await self._database.read(
            "SELECT id FROM jobs WHERE tenant = ? AND lane = ? AND state = ? AND (retry_time <= ? OR retry_time > ?)"
            " ORDER BY id LIMIT 1",
            ("default", lane, QUEUED, now, now + int(_LONGEST_WAIT * 1_000_000)),
        )
        return found[0]["id"] if found else None

    async def next_retry(self) -> float | None:
        """Seconds until a job that waits may be tried again; None when none does."""
        [row] = await self._database.read(
            "SELECT min(retry_time) AS retry_time FROM jobs WHERE tenant = ? AND state = ? AND retry_time > ?",
            ("default", QUEUED, self._clock()),
        )
        return None if row["retry_time"] is None else (row["retry_time"] - self._clock()) / 1_000_000

    async def begin(self, job_id: str, slot: int) -> tuple[Job, Attempt] | None:
        """Gives a queued job its next attempt and makes it PREPARING; None when it does not wait any more."""
        points = await self._jobs.resume_points("default", job_id)

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
                resume_from=points[0].directory if points else "",
                model_id="" if job.is_export else self._model_ids.new("model"),
                pid=0,
                outcome=b"",
                slot=slot,
                end_time=0,
                lane=job.lane,
                export_id=await self._export_id(transaction, job) if job.is_export else "",
            )
            await rows.insert_attempt(transaction, attempt, job.tenant, change.now)
            change.move(PREPARING, "SLOT_FREE")
            return await change.commit(transaction, self._hub, self._jobs.changed.set), attempt

        return await self._database.write(work)

    async def _export_id(self, transaction: Transaction, job: Job) -> str:
        """The id of the export that a job makes. Its attempts share it: what an earlier one has written and proven is
        only copied by the next."""
        if not job.attempt:
            return self._export_ids.new("export")
        return (await rows.load_attempt(transaction, job.id, job.attempt)).export_id

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
            await rows.insert_checkpoints(transaction, job.tenant, checkpoints)
            await change.commit(transaction, self._hub, self._jobs.changed.set)
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
            return await change.commit(transaction, self._hub, self._jobs.changed.set)

        job = await self._database.write(work)
        await self._jobs.let_go(job)
        log.info("attempt ended", job_id=job.id, attempt=attempt.number, state=JobState.Name(job.state))
        return job

    async def _conclude(self, transaction: Transaction, change: Change, attempt: Attempt, ending: Ending) -> None:
        job = change.job
        outcome = TrainerReport.FromString(attempt.outcome)
        kind = outcome.WhichOneof("payload")
        if kind == "finished" and job.is_export:
            await self._keep_export(transaction, change, attempt, outcome.finished)
        elif kind == "finished":
            await self._succeed(transaction, change, attempt, outcome)
        elif job.state == CANCELLING and kind != "failed":
            change.move(CANCELLED, "CANCEL_REQUESTED")
        elif kind == "failed" and outcome.failed.error.reason != STORAGE_FULL:
            error = outcome.failed.error
            if job.state in (PREPARING, RUNNING) and outcome.failed.retryable and _may_retry(job):
                self._retry(change, error.reason, error.message)
            else:
                change.move(FAILED, error.reason, error.message, error=error)
        elif kind == "failed" or ending.storage_full:
            self._rest(change, STORAGE_FULL, "the disk is full: goes on by itself when there is room")
        elif job.state == PAUSING:
            self._rest(change, "PAUSE_REQUESTED", "")
        elif kind == "stopped" or ending.requeue:
            change.move(QUEUED, ending.lost_reason, "starts over" if job.is_export else ending.lost_message)
        elif ending.curable and _may_retry(job):
            self._retry(change, ending.lost_reason, ending.lost_message)
        else:
            error = JobError(
                reason=ending.lost_reason,
                message=ending.lost_message,
                hint=ending.hint or (_LOST_EXPORT_HINT if job.is_export else _LOST_HINT),
                log_lines=ending.log_lines,
            )
            change.move(FAILED, error.reason, error.message, error=error)

    def _rest(self, change: Change, reason: str, message: str) -> None:
        """PAUSED, or CANCELLED for a job that was to be cancelled."""
        if change.job.state == CANCELLING:
            change.move(CANCELLED, "CANCEL_REQUESTED")
            return
        if change.job.state != PAUSING:
            change.move(PAUSING, reason, message)
        change.move(PAUSED, reason, message)
        change.set(pause_reason=reason)

    def _retry(self, change: Change, reason: str, message: str) -> None:
        retries = change.job.retries + 1
        wait = min(self._retry_seconds * 2 ** (retries - 1), _LONGEST_WAIT)
        change.set(retries=retries, retry_time=change.now + int(wait * 1_000_000))
        allowed = change.job.resolved_spec.max_retries
        change.move(QUEUED, reason, f"{message} (retry {retries} of {allowed}, not before {wait:.0f} s from now)")

    async def _succeed(
        self, transaction: Transaction, change: Change, attempt: Attempt, outcome: TrainerReport
    ) -> None:
        job = change.job
        message = await self._keep_model(transaction, change, attempt, outcome.finished)
        if job.state == PREPARING:
            change.move(RUNNING, "TRAINING")
        progress = Progress()
        progress.CopyFrom(job.progress)
        progress.eta_seconds = 0  # training that stopped early has steps left
        change.set(progress=progress)
        change.move(SUCCEEDED, "FINISHED", message, model_id=attempt.model_id)

    async def _keep_model(self, transaction: Transaction, change: Change, attempt: Attempt, finished: Finished) -> str:
        """Adds the model, as the next version of the name that the job asks for; returns what there is to say of it."""
        job = change.job
        model = made_by(
            job,
            model_id=attempt.model_id,
            step=finished.step,
            size_bytes=finished.size_bytes,
            metrics=dict(finished.metrics),
            now=change.now,
            base_licence=finished.base_licence,
            base_model_revision=finished.base_revision,
        )
        await model_rows.insert(transaction, model)
        name = job.resolved_spec.fine_tune.model_name
        if not name:
            return ""
        version = await name_rows.register(transaction, job.tenant, name, model.id, change.now)
        return f"the model is {name}@{version.version}"

    async def _keep_export(
        self, transaction: Transaction, change: Change, attempt: Attempt, finished: Finished
    ) -> None:
        job, task = change.job, change.job.resolved_spec.export
        await export_rows.insert(
            transaction,
            export_rows.Export(
                id=attempt.export_id,
                tenant=job.tenant,
                model_id=task.model,
                job_id=job.id,
                task=task,
                files=tuple(finished.files),
                proof=finished.proof,
                size_bytes=finished.size_bytes,
                destination_uri=finished.destination_uri,
                create_time=change.now,
            ),
        )
        if job.state == PREPARING:
            change.move(RUNNING, "EXPORTING")
        change.move(SUCCEEDED, "FINISHED", export_id=attempt.export_id)


def _may_retry(job: Job) -> bool:
    return job.retries < job.resolved_spec.max_retries


async def _last_reason(transaction: Transaction, job: Job) -> str:
    """Why the job waits again: the reason of its newest StateChanged."""
    found = await transaction.fetch(
        "SELECT payload FROM events WHERE job_id = ? AND sequence = ?", (job.id, job.last_sequence)
    )
    return JobEvent.FromString(found[0]["payload"]).state_changed.reason if found else ""


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
    elif isinstance(payload, PhaseProgressed):
        # An export makes no steps.
        if payload.phase == Phase.PHASE_EXPORTING and change.job.state == PREPARING:
            change.move(RUNNING, "EXPORTING")
    elif isinstance(payload, CheckpointSaved):
        checkpoints.append(
            Checkpoint(change.job.id, payload.step, attempt.number, payload.directory, payload.size_bytes, change.now)
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
