"""Gives the free slots of each lane to the jobs that wait for it, first come first served, and owns the runner of every
attempt."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from luthier.trainer.v1.task_pb2 import ControlAction
from luthier_server import failpoints
from luthier_server.assignments import Assignments
from luthier_server.attempts import Attempts, Ending
from luthier_server.errors import FailedPrecondition, InvalidArgument, LuthierError, NotFound, StorageFull, StoreBusy
from luthier_server.executors.base import Executor
from luthier_server.job import CANCELLING, PAUSING, Job
from luthier_server.jobs import Jobs
from luthier_server.lanes import Lane, Slots
from luthier_server.runner import Limits, Runner
from luthier_server.store.jobs import Attempt

log = structlog.get_logger()
_RETRY_SECONDS = 1.0
_ACTIONS = {
    CANCELLING: ControlAction.CONTROL_ACTION_CANCEL,
    PAUSING: ControlAction.CONTROL_ACTION_PAUSE,
}


@dataclass(frozen=True, slots=True)
class SchedulerSettings:
    """What the scheduler needs to know. slots: how many jobs of each lane run at once."""

    data_dir: Path
    slots: Mapping[Lane, int]
    limits: Limits = field(default_factory=Limits)


class Scheduler:
    """Runs queued jobs. `run` is its life; `stop` asks every trainer to leave."""

    def __init__(
        self,
        settings: SchedulerSettings,
        jobs: Jobs,
        attempts: Attempts,
        assignments: Assignments,
        executor: Executor,
    ) -> None:
        self._settings = settings
        self._jobs = jobs
        self._attempts = attempts
        self._assignments = assignments
        self._executor = executor
        self._runners: dict[str, Runner] = {}
        self._slots = {lane: Slots(settings.slots[lane]) for lane in Lane}
        self._adopted: list[Runner] = []
        self._stopping = False

    def wake(self) -> None:
        """Some trainer has reported."""
        for runner in self._runners.values():
            runner.wake()

    async def recover(self, attempts: list[Attempt]) -> None:
        """Settles every attempt whose trainer has gone, and takes over those that live.

        A trainer outlives its server: what it reported meanwhile is read now, and its slot stays busy.
        """
        alive = await self._executor.alive()
        async with asyncio.TaskGroup() as group:
            for attempt in attempts:
                group.create_task(self._recover(attempt, alive))

    async def _recover(self, attempt: Attempt, alive: Collection[str]) -> None:
        runner = Runner(self._attempts, self._executor, attempt, self._directory(attempt), self._settings.limits)
        if not runner.directory.is_dir():
            restarted = Ending("SERVER_RESTARTED", "goes on from its newest checkpoint", requeue=True)
            await self._attempts.settle(attempt, restarted)
        elif str(runner.directory) in alive or runner.locked():
            log.info("adopting a trainer", job_id=attempt.job_id, attempt=attempt.number)
            self._runners[attempt.job_id] = runner
            self._slots[Lane(attempt.lane)].hold(attempt.slot)
            self._adopted.append(runner)
        else:
            runner.mark_gone()
            await runner.follow()

    async def run(self) -> None:
        """Fills slots until it is cancelled."""
        async with asyncio.TaskGroup() as group:
            for runner in self._adopted:
                group.create_task(self._follow(runner), name=f"attempt {runner.attempt.job_id}")
            while True:
                self._jobs.changed.clear()
                try:
                    await self._control()
                    for lane in Lane:
                        await self._fill(lane, group)
                    pause = await self._attempts.next_retry()
                except (StorageFull, StoreBusy) as error:
                    # Waiting jobs wait on; the next look may find room.
                    log.warning("no job can start", error=str(error))
                    pause = _RETRY_SECONDS
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._jobs.changed.wait()

    async def _fill(self, lane: Lane, group: asyncio.TaskGroup) -> None:
        slots = self._slots[lane]
        while slots.are_free and not self._stopping and (job_id := await self._attempts.next_queued(lane)):
            if not slots.are_free:  # a probe has taken it meanwhile
                return
            slot = slots.take()
            begun = None
            try:
                begun = await self._attempts.begin(job_id, slot)
            finally:
                if begun is None:
                    slots.give_back(slot)
            if begun is not None:
                group.create_task(self._attempt(*begun), name=f"attempt {job_id}")

    @contextlib.asynccontextmanager
    async def reserved(self) -> AsyncIterator[Sequence[int]]:
        """Holds a slot of the device lane, in which no job is started meanwhile: its CUDA devices, none on a CPU.
        Raises FailedPrecondition when every slot is in use, or a job waits for one."""
        slots = self._slots[Lane.DEVICE]
        waiting = await self._attempts.next_queued(Lane.DEVICE)
        if waiting or not slots.are_free or self._stopping:
            raise FailedPrecondition(
                "every slot is in use or waited for: try again when a job has ended, or ask for an estimate without"
                " a probe",
                subject="slots",
                reason="NO_FREE_SLOT",
            )
        slot = slots.take()
        try:
            yield self._assignments.devices(Lane.DEVICE, slot)
        finally:
            slots.give_back(slot)
            self._jobs.changed.set()

    async def stop(self) -> None:
        """Starts nothing more, asks every trainer to save a checkpoint, and returns when all have left."""
        self._stopping = True
        asked: set[Runner] = set()
        while self._runners:
            for runner in set(self._runners.values()) - asked:  # later ones too: an attempt may have begun just before
                asked.add(runner)
                await runner.ask(ControlAction.CONTROL_ACTION_PREEMPT)
            self._jobs.changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    await self._jobs.changed.wait()

    async def _control(self) -> None:
        for job_id, runner in list(self._runners.items()):
            job = await self._jobs.get("default", job_id)
            if job.state in _ACTIONS:
                await runner.ask(_ACTIONS[job.state])

    async def _attempt(self, job: Job, attempt: Attempt) -> None:
        await failpoints.reach("after_begin_before_runner")
        runner = Runner(self._attempts, self._executor, attempt, self._directory(attempt), self._settings.limits)
        self._runners[job.id] = runner
        self._jobs.changed.set()  # a cancel may have come since the attempt began
        try:
            try:
                task, secrets = await self._assignments.assign(job, attempt)
            except (LuthierError, OSError) as error:
                gone = isinstance(error, NotFound | InvalidArgument)
                hint = "bring back what the message names, and create the job anew"
                await self._attempts.settle(attempt, Ending("INPUT_LOST", str(error), hint=hint, curable=not gone))
            else:
                await runner.run(task, secrets)
        except Exception:
            # The attempt stays open: the next start of the server settles it.
            log.exception("runner failed", job_id=job.id, attempt=attempt.number)
        finally:
            self._release(attempt)

    async def _follow(self, runner: Runner) -> None:
        """Drives a trainer that an earlier server started."""
        attempt = runner.attempt
        try:
            await runner.follow()
        except Exception:
            log.exception("runner failed", job_id=attempt.job_id, attempt=attempt.number)
        finally:
            self._release(attempt)

    def _release(self, attempt: Attempt) -> None:
        del self._runners[attempt.job_id]
        self._slots[Lane(attempt.lane)].give_back(attempt.slot)
        self._jobs.changed.set()

    def _directory(self, attempt: Attempt) -> Path:
        return self._settings.data_dir / "jobs" / attempt.job_id / f"attempt-{attempt.number}"
