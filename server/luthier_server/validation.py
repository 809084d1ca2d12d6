"""Jobs in VALIDATING: their datasets are checked for their base model before they wait for a device.

A check that will take long and has found no error so far lets its job go on: the job is QUEUED, the check goes on
beside it, and a trainer that starts meanwhile tokenises the rows that it needs itself. Then the check's end is an event
of whatever the job does by then; an error ends a job that still waits, and a trainer finds the same error by itself, as
it ends no job before all rows are there.
"""

import asyncio
import contextlib
import functools
import time
from collections.abc import Awaitable, Callable

import structlog

from luthier.v1.dataset_report_pb2 import TokenReport
from luthier.v1.datasets_pb2 import TokenReports
from luthier.v1.event_pb2 import DatasetsChecked, PhaseProgressed
from luthier.v1.job_pb2 import JobError
from luthier_server.change import Change
from luthier_server.checks import Checks
from luthier_server.data_work import WorkProgress, WorkTooLong
from luthier_server.errors import InvalidArgument, LuthierError, NotFound, StorageFull, StoreBusy
from luthier_server.job import CANCELLED, FAILED, QUEUED, STORAGE_FULL, VALIDATING, Job
from luthier_server.jobs import Jobs

log = structlog.get_logger()
_FINDINGS_SHOWN = 20
_TRIES = 3
_AGAIN_SECONDS = 2.0
_PROGRESS_SECONDS = 1.0
_FULL_SECONDS = 10.0
_PATIENCE_SECONDS = 1.0
"""A check that goes on longer after its first progress is a long one; so is one that has more ahead than behind it."""
ALONGSIDE = "VALIDATING_ALONGSIDE"
_FULL = JobError(reason=STORAGE_FULL)
"""No answer for lack of room, or of the database: the job waits, and no try is counted."""


class Validation:
    """Checks the datasets of new jobs, until it is cancelled."""

    def __init__(self, jobs: Jobs, checks: Checks) -> None:
        self._jobs = jobs
        self._checks = checks
        self._running: dict[str, asyncio.Task[None]] = {}
        self._alongside: set[str] = set()

    async def run(self) -> None:
        """Takes every job that is VALIDATING, also those of an earlier server, and what checks that one left undone."""
        async with asyncio.TaskGroup() as group:
            with contextlib.suppress(StoreBusy):
                for job in await self._jobs.unchecked(ALONGSIDE):
                    self._alongside.add(job.id)
                    self._running[job.id] = group.create_task(self._validate(job), name=f"validation {job.id}")
            while True:
                self._jobs.to_validate.clear()
                pause = None
                try:
                    waiting = await self._jobs.validating()
                    await self._end_needless()
                except (StorageFull, StoreBusy) as error:
                    log.warning("validation waits", error=str(error))
                    waiting, pause = [], _AGAIN_SECONDS
                else:
                    for job_id in self._running.keys() - self._alongside - {job.id for job in waiting}:
                        self._end(job_id)
                    # Nobody tells of the end of a job that validates no more.
                    pause = _AGAIN_SECONDS if self._alongside else None
                for job in waiting:
                    if job.id not in self._running:
                        self._running[job.id] = group.create_task(self._validate(job), name=f"validation {job.id}")
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._jobs.to_validate.wait()

    async def _end_needless(self) -> None:
        """Ends the checks that go on beside jobs which failed, were cancelled or are gone. That of one which succeeded
        comes to its end: its report is kept with the dataset."""
        for job_id in list(self._alongside):
            try:
                over = (await self._jobs.get("default", job_id)).state in (FAILED, CANCELLED)
            except NotFound:
                over = True
            if over:
                self._end(job_id)

    def _end(self, job_id: str) -> None:
        """Ends a check. Once: a second cancel would not let it clean up after the first."""
        if (running := self._running.get(job_id)) is not None and not running.cancelling():
            running.cancel()

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
            self._alongside.discard(job.id)
            self._jobs.to_validate.set()

    async def _try(self, job: Job) -> JobError | None:
        """Checks the datasets and moves the job; or says why there is no answer, which another try may have."""
        progress = _Progress(self._jobs, job, self._let_go, functools.partial(self._end, job.id))
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
            if not change.job.terminal:
                change.emit(checked)
            if change.job.state == VALIDATING:
                change.move(QUEUED, "VALIDATED", "waits for a free slot")

        with contextlib.suppress(NotFound):  # deleted meanwhile
            await self._jobs.decide(job.tenant, job.id, decide)

    async def _let_go(self, job: Job) -> None:
        """Queues the job while its check goes on."""

        def decide(change: Change) -> None:
            if change.job.state == VALIDATING:
                change.move(QUEUED, ALONGSIDE, "waits for a free slot; the check of its datasets goes on")

        self._alongside.add(job.id)
        await self._jobs.decide(job.tenant, job.id, decide)
        await self._checks.step_aside(job)

    async def _fail(self, job: Job, error: JobError) -> None:
        """Ends the job with this error. Waits while the disk is full or the database busy."""

        def decide(change: Change) -> None:
            if change.job.state in (VALIDATING, QUEUED):
                change.move(FAILED, error.reason, error.message, error=error)

        with contextlib.suppress(NotFound):  # deleted meanwhile
            while True:
                try:
                    await self._jobs.decide(job.tenant, job.id, decide)
                except (StorageFull, StoreBusy) as refused:
                    log.warning("validation waits", job_id=job.id, error=str(refused))
                    await asyncio.sleep(_FULL_SECONDS)
                else:
                    return


class _Progress:
    """Puts the newest progress of a check into its job's log, at most once a second and while the job waits. Lets the
    job go on when the check is a long one, and ends the check when the job is over."""

    def __init__(
        self, jobs: Jobs, job: Job, let_go: Callable[[Job], Awaitable[None]], end: Callable[[], object]
    ) -> None:
        self._jobs = jobs
        self._job = job
        self._let_go = let_go
        self._end = end
        self._newest: PhaseProgressed | None = None
        self._first = 0.0
        self._is_long = asyncio.Event()
        self._tasks = [
            asyncio.create_task(self._write(), name=f"progress {job.id}"),
            asyncio.create_task(self._watch(), name=f"patience {job.id}"),
        ]

    def told(self, news: WorkProgress) -> None:
        self._newest = news.progress
        now = time.monotonic()
        self._first = self._first or now
        done, left = news.progress.completed, news.progress.total - news.progress.completed
        if done and not news.in_error and (left > done or now - self._first > _PATIENCE_SECONDS):
            self._is_long.set()

    async def _write(self) -> None:
        while True:
            await asyncio.sleep(_PROGRESS_SECONDS)
            newest, self._newest = self._newest, None
            if newest is None:
                continue
            try:
                job = await self._jobs.decide(self._job.tenant, self._job.id, functools.partial(_tell, newest))
            except NotFound:
                self._end()
            except LuthierError:
                continue
            else:
                if job.state in (FAILED, CANCELLED):
                    self._end()

    async def _watch(self) -> None:
        while True:
            await self._is_long.wait()
            with contextlib.suppress(LuthierError):
                await self._let_go(self._job)
                return
            await asyncio.sleep(_AGAIN_SECONDS)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)


def _tell(progress: PhaseProgressed, change: Change) -> None:
    if change.job.state in (VALIDATING, QUEUED):
        change.emit(progress)


def _short(report: TokenReport) -> TokenReport:
    """The report as an event carries it. GetDataset has it whole."""
    short = TokenReport()
    short.CopyFrom(report)
    del short.findings[_FINDINGS_SHOWN:]
    return short
