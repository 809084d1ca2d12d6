"""Gives free slots to waiting jobs, first come first served, and owns the runner of every attempt."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from luthier.trainer.v1.task_pb2 import ControlAction, Puppet, TrainerTask
from luthier_server.attempts import Attempts, Ending
from luthier_server.datasets import Datasets
from luthier_server.errors import FailedPrecondition, InvalidArgument, LuthierError, NotFound, StorageFull, StoreBusy
from luthier_server.executors.base import Executor
from luthier_server.job import CANCELLING, PAUSING, Job
from luthier_server.jobs import Jobs
from luthier_server.registry import Registry
from luthier_server.runner import Limits, Runner
from luthier_server.secrets import Secrets
from luthier_server.store.jobs import Attempt
from luthier_server.tasks import base_source, dataset_source

log = structlog.get_logger()
_RETRY_SECONDS = 1.0
_ACTIONS = {
    CANCELLING: ControlAction.CONTROL_ACTION_CANCEL,
    PAUSING: ControlAction.CONTROL_ACTION_PAUSE,
}


@dataclass(frozen=True, slots=True)
class SchedulerSettings:
    """What the scheduler needs to know. devices: CUDA indices, one slot each; empty means CPU."""

    data_dir: Path
    slots: int
    devices: tuple[int, ...] = ()
    threads: int = 0
    heartbeat_seconds: float = 5
    wake_socket: str = ""
    limits: Limits = field(default_factory=Limits)
    puppet: Puppet | None = None
    cache_max_bytes: int = 0
    device_memory_bytes: int = 0


class Scheduler:
    """Runs queued jobs. `run` is its life; `stop` asks every trainer to leave."""

    def __init__(
        self,
        settings: SchedulerSettings,
        jobs: Jobs,
        attempts: Attempts,
        datasets: Datasets,
        registry: Registry,
        executor: Executor,
        secrets: Secrets,
    ) -> None:
        self._settings = settings
        self._jobs = jobs
        self._attempts = attempts
        self._datasets = datasets
        self._registry = registry
        self._executor = executor
        self._secrets = secrets
        self._runners: dict[str, Runner] = {}
        self._free = list(range(settings.slots))
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
            if attempt.slot in self._free:
                self._free.remove(attempt.slot)
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
                    await self._fill(group)
                    pause = await self._attempts.next_retry()
                except (StorageFull, StoreBusy) as error:
                    # Waiting jobs wait on; the next look may find room.
                    log.warning("no job can start", error=str(error))
                    pause = _RETRY_SECONDS
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._jobs.changed.wait(), pause)

    async def _fill(self, group: asyncio.TaskGroup) -> None:
        while self._free and not self._stopping and (job_id := await self._attempts.next_queued()):
            if not self._free:  # a probe has taken it meanwhile
                return
            slot = self._free.pop(0)
            begun = None
            try:
                begun = await self._attempts.begin(job_id, slot)
            finally:
                if begun is None:
                    self._give_back(slot)
            if begun is not None:
                group.create_task(self._attempt(slot, *begun), name=f"attempt {job_id}")

    @contextlib.asynccontextmanager
    async def reserved(self) -> AsyncIterator[Sequence[int]]:
        """Holds a slot, in which no job is started meanwhile: its CUDA devices, none on a CPU. Raises
        FailedPrecondition when every slot is in use, or a job waits for one."""
        waiting = await self._attempts.next_queued()
        if waiting or not self._free or self._stopping:
            raise FailedPrecondition(
                "every slot is in use or waited for: try again when a job has ended, or ask for an estimate without"
                " a probe",
                subject="slots",
                reason="NO_FREE_SLOT",
            )
        slot = self._free.pop(0)
        try:
            yield self._settings.devices[slot : slot + 1]
        finally:
            self._give_back(slot)
            self._jobs.changed.set()

    async def stop(self) -> None:
        """Starts nothing more, asks every trainer to save a checkpoint, and returns when all have left."""
        self._stopping = True
        for runner in list(self._runners.values()):
            await runner.ask(ControlAction.CONTROL_ACTION_PREEMPT)
        while self._runners:
            self._jobs.changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._jobs.changed.wait(), 0.5)

    async def _control(self) -> None:
        for job_id, runner in list(self._runners.items()):
            job = await self._jobs.get("default", job_id)
            if job.state in _ACTIONS:
                await runner.ask(_ACTIONS[job.state])

    async def _attempt(self, slot: int, job: Job, attempt: Attempt) -> None:
        runner = Runner(self._attempts, self._executor, attempt, self._directory(attempt), self._settings.limits)
        self._runners[job.id] = runner
        self._jobs.changed.set()  # a cancel may have come since the attempt began
        try:
            try:
                task = await self._task(slot, job, attempt)
                secrets = self._secrets.for_task(job.resolved_spec.fine_tune)
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
            self._release(job.id, slot)

    async def _follow(self, runner: Runner) -> None:
        """Drives a trainer that an earlier server started."""
        attempt = runner.attempt
        try:
            await runner.follow()
        except Exception:
            log.exception("runner failed", job_id=attempt.job_id, attempt=attempt.number)
        finally:
            self._release(attempt.job_id, attempt.slot)

    def _release(self, job_id: str, slot: int) -> None:
        del self._runners[job_id]
        self._give_back(slot)
        self._jobs.changed.set()

    def _give_back(self, slot: int) -> None:
        if slot < self._settings.slots and slot not in self._free:
            self._free.append(slot)
            self._free.sort()

    def _directory(self, attempt: Attempt) -> Path:
        return self._settings.data_dir / "jobs" / attempt.job_id / f"attempt-{attempt.number}"

    async def _task(self, slot: int, job: Job, attempt: Attempt) -> TrainerTask:
        settings = self._settings
        spec = job.resolved_spec.fine_tune
        base = await self._registry.base(job.tenant, spec.base_model)
        checkpoints = settings.data_dir / "jobs" / job.id / "checkpoints"
        checkpoints.mkdir(parents=True, exist_ok=True)
        task = TrainerTask(
            job_id=job.id,
            attempt=attempt.number,
            spec=job.resolved_spec,
            base_model=base_source(base, spec.base_model, spec.base_model_revision),
            training_dataset=dataset_source(
                self._datasets, await self._datasets.find(job.tenant, spec.training_dataset)
            ),
            checkpoints_dir=str(checkpoints),
            model_dir=str(self._registry.directory(attempt.model_id)),
            cache_dir=str(settings.data_dir / "cache"),
            cache_max_bytes=settings.cache_max_bytes,
            resume_from=str(checkpoints / attempt.resume_from) if attempt.resume_from else "",
            resume_fallbacks=[
                str(checkpoints / each.directory) for each in (await self._jobs.resume_points(job.tenant, job.id))[1:]
            ],
            threads=settings.threads,
            cuda_devices=settings.devices[slot : slot + 1],
            wake_socket=settings.wake_socket,
            heartbeat_seconds=settings.heartbeat_seconds,
            model_id=attempt.model_id,
            computed_tokens=job.progress.computed_tokens,
            memory_limit_bytes=settings.device_memory_bytes,
        )
        if spec.validation_dataset:
            task.validation_dataset.CopyFrom(
                dataset_source(self._datasets, await self._datasets.find(job.tenant, spec.validation_dataset))
            )
        if settings.puppet is not None:
            task.puppet.CopyFrom(settings.puppet)
            if spec.hyperparameters.max_steps:
                task.puppet.steps = spec.hyperparameters.max_steps
        return task
