"""What a job would take, told before it is created: by a child of the trainer host, with what only the server knows."""

import asyncio
import os
from dataclasses import dataclass

from luthier.trainer.v1.task_pb2 import EstimateWork, TrainerTask
from luthier.v1.estimate_pb2 import JobEstimate
from luthier.v1.job_pb2 import JobSpec
from luthier_server.checks import raise_error
from luthier_server.fitting import Fitting
from luthier_server.jobs import Jobs
from luthier_server.scheduler import Scheduler
from luthier_server.store.models import Models
from luthier_server.tasks import Resolved


@dataclass(frozen=True, slots=True)
class EstimateSettings:
    """price: of a device-hour, 0 for none. Seconds: that an estimate may take, and one with a probe."""

    price: float = 0
    currency: str = "USD"
    seconds: float = 120
    probe_seconds: float = 900


class Estimates:
    """Estimates jobs that do not exist."""

    def __init__(
        self, settings: EstimateSettings, jobs: Jobs, fitting: Fitting, scheduler: Scheduler, models: Models
    ) -> None:
        self._settings = settings
        self._jobs = jobs
        self._fitting = fitting
        self._scheduler = scheduler
        self._models = models
        self._asked = asyncio.Semaphore(max(1, (os.cpu_count() or 1) // 2))

    async def estimate(self, tenant: str, spec: JobSpec, probe: bool) -> tuple[JobSpec, JobEstimate]:
        """The spec with every default, and what it would take. A probe holds a slot for as long as it takes; whoever
        gives up waiting ends it.

        Raises InvalidArgument as `Jobs.create`, and for what would fail the job before its first step;
        FailedPrecondition NO_FREE_SLOT for a probe while every slot is in use or a job waits for one; WorkFailed,
        Unavailable.
        """
        job = await self._jobs.resolve(tenant, spec)
        task = self._fitting.task(job)
        task.estimate.CopyFrom(EstimateWork(probe=probe, known_mfu=await self._known_mfu(tenant, job)))
        estimate = await (self._probed(task) if probe else self._computed(task))
        if self._settings.price and estimate.seconds:
            estimate.cost = self._settings.price * estimate.seconds / 3600
            estimate.currency = self._settings.currency
        estimate.notes.extend(job.reasons)
        return job.spec, estimate

    async def _computed(self, task: TrainerTask) -> JobEstimate:
        async with self._asked:
            answer = await self._fitting.ask(task, seconds=self._settings.seconds)
        raise_error(answer, "spec.fine_tune.")
        return answer.estimate

    async def _probed(self, task: TrainerTask) -> JobEstimate:
        async with self._scheduler.reserved() as devices:
            del task.cuda_devices[:]
            task.cuda_devices.extend(devices)
            answer = await self._fitting.ask(task, seconds=self._settings.probe_seconds)
        raise_error(answer, "spec.fine_tune.")
        return answer.estimate

    async def _known_mfu(self, tenant: str, job: Resolved) -> float:
        task = job.spec.fine_tune
        return await self._models.newest_mfu(tenant, task.base_model, task.WhichOneof("adaptation") or "lora")
