"""Jobs in VALIDATING: their datasets are checked for their base model before they wait for a device."""

import asyncio
import contextlib
import functools

import structlog

from luthier.v1.dataset_report_pb2 import TokenReport
from luthier.v1.datasets_pb2 import TokenReports
from luthier.v1.event_pb2 import DatasetsChecked, PhaseProgressed
from luthier.v1.job_pb2 import JobError
from luthier_server.change import Change
from luthier_server.checks import Checks
from luthier_server.data_work import WorkTooLong
from luthier_server.errors import InvalidArgument, LuthierError, NotFound, StorageFull, StoreBusy
from luthier_server.job import FAILED, QUEUED, STORAGE_FULL, VALIDATING, Job
from luthier_server.jobs import Jobs

log = structlog.get_logger()
_FINDINGS_SHOWN = 20
_TRIES = 3
_AGAIN_SECONDS = 2.0
_PROGRESS_SECONDS = 1.0
_FULL_SECONDS = 10.0
_FULL = JobError(reason=STORAGE_FULL)
"""No answer for lack of room, or of the database: the job waits, and no try is counted."""


class Validation:
    """Checks the datasets of new jobs, until it is cancelled."""

    def __init__(self, jobs: Jobs, checks: Checks) -> None:
        self._jobs = jobs
        self._checks = checks
        self._running: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Takes every job that is VALIDATING, also those of an earlier server."""
        async with asyncio.TaskGroup() as group:
            while True:
                self._jobs.to_validate.clear()
                pause = None
                try:
                    waiting = await self._jobs.validating()
                except (StorageFull, StoreBusy) as error:
                    log.warning("validation waits", error=str(error))
                    waiting, pause = [], _AGAIN_SECONDS
                else:
                    for job_id in self._running.keys() - {job.id for job in waiting}:
                        self._running[job_id].cancel()
                for job in waiting:
                    if job.id not in self._running:
                        self._running[job.id] = group.create_task(self._validate(job), name=f"validation {job.id}")
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._jobs.to_validate.wait(), pause)

    async def _validate(self, job: Job) -> None:
        try:
            for number in range(1, _TRIES + 1):
                while (error := await self._try(job)) == _FULL:
                    log.warning("validation waits for room on the disk", job_id=job.id)
                    await asyncio.sleep(_FULL_SECONDS)
                if error is None:
                    return
                log.warning("validation gave no answer", job_id=job.id, reason=error.reason, error=error.message)
                if number == _TRIES or error.reason == WorkTooLong.reason:
                    await self._fail(job, error)
                    return
                await asyncio.sleep(_AGAIN_SECONDS)
        finally:
            del self._running[job.id]
            self._jobs.to_validate.set()

    async def _try(self, job: Job) -> JobError | None:
        """Checks the datasets and moves the job; or says why there is no answer, which another try may have."""
        progress = _Progress(self._jobs, job)
        try:
            answer = await self._checks.check_job(job, progress.told)
            if answer.error.reason == STORAGE_FULL:
                return _FULL
            if answer.HasField("error"):
                await self._fail(job, answer.error)
            else:
                await self._pass(job, answer.check)
        except (NotFound, InvalidArgument) as error:
            hint = "bring back what the message names, and create the job anew"
            await self._fail(job, JobError(reason=error.reason, message=error.message, hint=hint))
        except (StorageFull, StoreBusy):
            return _FULL
        except LuthierError as error:
            return JobError(reason=error.reason, message=error.message, hint="see host.log, and run luthierd doctor")
        except Exception:
            log.exception("validation failed", job_id=job.id)
            return JobError(reason="INTERNAL", message="the check of the datasets failed", hint="see luthierd's log")
        finally:
            await progress.close()
        return None

    async def _pass(self, job: Job, reports: TokenReports) -> None:
        checked = DatasetsChecked(training=_short(reports.training))
        if reports.HasField("validation"):
            checked.validation.CopyFrom(_short(reports.validation))

        def decide(change: Change) -> None:
            if change.job.state == VALIDATING:
                change.emit(checked)
                change.move(QUEUED, "VALIDATED", "waits for a free slot")

        await self._jobs.decide(job.tenant, job.id, decide)

    async def _fail(self, job: Job, error: JobError) -> None:
        def decide(change: Change) -> None:
            if change.job.state == VALIDATING:
                change.move(FAILED, error.reason, error.message, error=error)

        await self._jobs.decide(job.tenant, job.id, decide)


class _Progress:
    """Puts the newest progress of a check into its job's log, at most once a second."""

    def __init__(self, jobs: Jobs, job: Job) -> None:
        self._jobs = jobs
        self._job = job
        self._newest: PhaseProgressed | None = None
        self._task = asyncio.create_task(self._write(), name=f"progress {job.id}")

    def told(self, progress: PhaseProgressed) -> None:
        self._newest = progress

    async def _write(self) -> None:
        while True:
            await asyncio.sleep(_PROGRESS_SECONDS)
            newest, self._newest = self._newest, None
            if newest is not None:
                with contextlib.suppress(LuthierError):
                    await self._jobs.decide(self._job.tenant, self._job.id, functools.partial(_tell, newest))

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])


def _tell(progress: PhaseProgressed, change: Change) -> None:
    if change.job.state == VALIDATING:
        change.emit(progress)


def _short(report: TokenReport) -> TokenReport:
    """The report as an event carries it. GetDataset has it whole."""
    short = TokenReport()
    short.CopyFrom(report)
    del short.findings[_FINDINGS_SHOWN:]
    return short
