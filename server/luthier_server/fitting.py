"""Whether a job has room on this machine, asked before it is created.

Most jobs have plenty: a bound that takes no look at the model's inside settles that at once. Where it does not, a child
of the trainer host predicts the memory from the model's configuration. What gives no answer in time (a cold host, a
model that is still on the hub) is no reason to refuse: the trainer will tell.
"""

import asyncio
import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from luthier.trainer.v1.report_pb2 import ModelReport
from luthier.trainer.v1.task_pb2 import DataAnswer, EstimateWork, TrainerTask
from luthier.v1.estimate_pb2 import JobEstimate
from luthier.v1.job_pb2 import FineTuneTask, LoraQuantization
from luthier_server.data_work import DataWork
from luthier_server.datasets import Datasets
from luthier_server.errors import FailedPrecondition, LuthierError
from luthier_server.secrets import Secrets
from luthier_server.tasks import Resolved, base_source, dataset_source

log = structlog.get_logger()
_CGROUP = Path("/sys/fs/cgroup/memory.max")
_SHARE = 0.92
"""Of the memory there is, that a job may plan with: the trainer's estimate compares with as much."""
_KEPT = 256
"""Answers that are remembered."""
_MOST_ASKED = 8
"""Questions at a time. One more gets no answer: nobody would wait for its turn."""
_USUAL_RANK = 256
"""An adapter that was made before has no more."""


@dataclass(frozen=True, slots=True)
class FittingSettings:
    """devices: CUDA indices; empty means CPU. memory_limit_bytes: 0 for what the device has. Seconds: that CreateJob
    waits for an answer, that a child may take, that an answer is remembered, and that none is."""

    cache_dir: Path
    cache_max_bytes: int = 0
    devices: Sequence[int] = ()
    threads: int = 0
    memory_limit_bytes: int = 0
    wait: float = 4
    seconds: float = 60
    remembered: float = 600
    unknown: float = 60


class Fitting:
    """Judges jobs by their memory, and makes the tasks of estimates."""

    def __init__(self, settings: FittingSettings, datasets: Datasets, work: DataWork, secrets: Secrets) -> None:
        self._settings = settings
        self._datasets = datasets
        self._work = work
        self._secrets = secrets
        self._known: dict[str, tuple[float, JobEstimate | None]] = {}
        self._asking: dict[str, asyncio.Task[JobEstimate | None]] = {}
        self._asked = asyncio.Semaphore(max(1, (os.cpu_count() or 1) // 2))
        # Of a GPU the server cannot ask; a child's answer tells.
        self._total = settings.memory_limit_bytes or (0 if settings.devices else physical_memory())

    def task(self, job: Resolved) -> TrainerTask:
        """The task of an estimate, but for what is asked."""
        wanted = job.spec.fine_tune
        task = TrainerTask(
            spec=job.spec,
            base_model=base_source(job.base, wanted.base_model, wanted.base_model_revision),
            training_dataset=dataset_source(self._datasets, job.training),
            cache_dir=str(self._settings.cache_dir),
            cache_max_bytes=self._settings.cache_max_bytes,
            threads=self._settings.threads,
            cuda_devices=self._settings.devices[:1],
            memory_limit_bytes=self._settings.memory_limit_bytes,
        )
        if job.validation is not None:
            task.validation_dataset.CopyFrom(dataset_source(self._datasets, job.validation))
        return task

    async def ask(self, task: TrainerTask, *, seconds: float) -> DataAnswer:
        """What a child says to the task of an estimate. Raises as `DataWork.run`."""
        answer = await self._work.run(task, self._secrets.for_task(task.spec.fine_tune), seconds=seconds)
        if answer.estimate.device_memory.total_bytes:
            self._total = answer.estimate.device_memory.total_bytes
        return answer

    async def require(self, job: Resolved) -> None:
        """Raises FailedPrecondition DOES_NOT_FIT, with what would make it fit, for a job that has no room."""
        if self._total and surely_needs_less(job.base, job.spec.fine_tune) <= self._total:
            return
        estimate = await self._predicted(job)
        if estimate is not None and not estimate.fits:
            # A limit that the operator set is planned with as it is.
            raise does_not_fit(estimate, device_share=1 if self._settings.memory_limit_bytes else _SHARE)

    async def close(self) -> None:
        """Ends what nobody waits for any more."""
        for asking in (left := list(self._asking.values())):
            asking.cancel()
        if left:
            await asyncio.wait(left)

    async def _predicted(self, job: Resolved) -> JobEstimate | None:
        """What a child says of the memory; None when it says nothing in time."""
        task = self.task(job)
        task.estimate.CopyFrom(EstimateWork(memory_only=True))
        # The files of the hub's cache, if they are there: nobody waits for a network here.
        task.base_model.is_hub = False
        key = _key(task)
        until, known = self._known.get(key, (0.0, None))
        if until > time.monotonic():
            return known
        asking = self._asking.get(key)
        if asking is None:
            if len(self._asking) >= _MOST_ASKED:
                log.info("memory is not known", error="too many questions")
                return None
            asking = self._asking[key] = asyncio.create_task(self._find_out(key, task), name="memory of a job")
        try:
            async with asyncio.timeout(self._settings.wait):
                # Goes on when nobody waits any more: the next job like this one gets its answer.
                return await asyncio.shield(asking)
        except TimeoutError:
            log.info("memory is not known in time")
            return None

    async def _find_out(self, key: str, task: TrainerTask) -> JobEstimate | None:
        """Asks a child, and remembers what it says."""
        found: JobEstimate | None = None
        try:
            async with self._asked:
                answer = await self.ask(task, seconds=self._settings.seconds)
            if answer.HasField("estimate"):
                found = answer.estimate
            else:
                log.info("memory is not known", reason=answer.error.reason, error=answer.error.message)
        except LuthierError as error:
            log.info("memory is not known", error=error.message)
        finally:
            del self._asking[key]
        while len(self._known) >= _KEPT:
            del self._known[next(iter(self._known))]
        kept = self._settings.unknown if found is None else self._settings.remembered
        self._known[key] = (time.monotonic() + kept, found)
        return found


def does_not_fit(estimate: JobEstimate, device_share: float = _SHARE) -> FailedPrecondition:
    """The refusal of a job that has no room. device_share: of the device's memory, that a job may plan with."""
    memory, share = estimate.device_memory, device_share
    where = "memory" if estimate.device == "cpu" else f"memory on {estimate.device}"
    if memory.needed_bytes <= int(memory.total_bytes * share):
        memory, where, share = estimate.host_memory, "memory of the host", _SHARE
    available = int(memory.total_bytes * share)
    there_are = f"there are {size(available)}"
    if share < 1:
        there_are = f"may plan with {size(available)}, {share:.0%} of the {size(memory.total_bytes)} there are"
    return FailedPrecondition(
        f"the job needs about {size(memory.needed_bytes)} of {where}, and {there_are}",
        subject="memory",
        reason="DOES_NOT_FIT",
        metadata={
            "needed_bytes": str(memory.needed_bytes),
            "available_bytes": str(available),
            "hint": " Or: ".join(estimate.remedies) or "take a smaller base model",
        },
    )


def surely_needs_less(base: ModelReport, task: FineTuneTask) -> float:
    """Bytes that a job needs less than, whatever its rows are; infinite when too little is known of its base.

    Each weight takes 4 bytes, and one that is trained 24 with its copy, gradient and moments. A layer's modules are at
    most 8 times as wide as its hidden states, and keep no more than twelve times their width for a token's backward
    pass; the logits of a chunk are counted as if the vocabulary had all weights of the model. 3 GiB are for the process
    and its workspace.
    """
    if not (base.parameters and base.hidden_size and base.module_names):
        return float("inf")
    # An adapter that is continued keeps its own rank.
    rank = max(task.lora.rank, _USUAL_RANK if base.adapter_dir else 0)
    modules, width = len(base.module_names), base.hidden_size
    weights = 4.0 * base.parameters
    if task.WhichOneof("adaptation") == "full" or task.lora.modules_to_save:
        weights += 24.0 * base.parameters
    else:
        weights += 24.0 * modules * rank * 16 * width
        if task.lora.quantization not in (
            LoraQuantization.LORA_QUANTIZATION_NONE,
            LoraQuantization.LORA_QUANTIZATION_UNSPECIFIED,
        ):
            weights += 4.0 * base.parameters
    length = task.hyperparameters.max_length
    activations = 4.0 * 12 * modules * width * length
    attention = 4.0 * length * length * 2 * max(1, width // 64)
    logits = 3 * 4.0 * 1024 * base.parameters / width
    return weights + activations + attention + logits + 3 * 2**30


def physical_memory() -> int:
    """Bytes of memory that this machine, or the container, has."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(total, int(_CGROUP.read_text()))
    except (OSError, ValueError):  # no such group, or "max"
        return total


def size(count: int) -> str:
    """Bytes for people."""
    amount = float(count)
    for unit in ("bytes", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.4g} {unit}"
        amount /= 1024
    return f"{amount:,.1f} GiB"


def _key(task: TrainerTask) -> str:
    """What the answer depends on."""
    relevant = TrainerTask()
    relevant.CopyFrom(task)
    spec, numbers = relevant.spec, relevant.spec.fine_tune.hyperparameters
    for field in ("display_name", "labels"):
        spec.ClearField(field)
    for name in ("learning_rate", "seed", "epochs", "max_steps", "log_every", "warmup_ratio", "warmup_steps"):
        numbers.ClearField(name)
    return hashlib.sha256(relevant.SerializeToString(deterministic=True)).hexdigest()
