"""Two real steps of a job, to see how fast it goes and what memory it takes. Nothing is reported or kept."""

import resource
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from luthier.trainer.v1.task_pb2 import TrainerTask
from luthier.v1 import event_pb2
from luthier_trainer import sft
from luthier_trainer.config import Places, Settings
from luthier_trainer.divergence import Diverged
from luthier_trainer.job import Job, set_up
from luthier_trainer.report import Payload, Reporter
from luthier_trainer.stop import Check
from luthier_trainer.throughput import Throughput

_CONSIDERED = 32
"""Steps among which the typical one is found."""


@dataclass(frozen=True)
class Tried:
    """What the steps were: real tokens of one, and the second one's speed; peak_bytes: of the device, on a CPU of the
    whole process."""

    tokens: int
    tokens_per_second: float
    operations_per_second: float
    peak_bytes: int


class _Quiet:
    """Passes on how far the loading is, and nothing else."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter

    def report(self, payload: Payload, *, durable: bool = False) -> None:
        if isinstance(payload, event_pb2.PhaseProgressed):
            self._reporter.report(payload)


def attempt(task: TrainerTask, settings: Settings, reporter: Reporter, check: Check) -> Tried:
    """Sets the job up and makes two optimizer steps of typical size; the first one warms up. Raises as `set_up`, and
    what training raises for a lack of memory."""
    with tempfile.TemporaryDirectory() as folder:
        places = Places(
            checkpoints=Path(folder) / "checkpoints",
            model=Path(folder) / "model" / "model",
            cache=Path(task.cache_dir),
            resume_from=None,
        )
        places.model.parent.mkdir()
        places.checkpoints.mkdir()
        job = set_up(task, settings, places, _Quiet(reporter), check)
        if job.compute.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(job.compute.device)
        job.forward.model.train()
        step = _typical(job)
        before = 0
        for _ in range(2):
            job.counters.step = step
            job.throughput = Throughput()
            before = job.counters.trained_tokens
            try:
                sft.make_step(job, check)
            except Diverged:  # it ran all the same
                break
        return Tried(
            job.counters.trained_tokens - before,
            job.throughput.tokens_per_second,
            job.throughput.operations_per_second,
            _peak(job),
        )


def _typical(job: Job) -> int:
    """The step, of the first few, whose tokens are the median."""
    found = []
    for step in range(min(_CONSIDERED, job.order.steps_per_epoch)):
        rows = job.order.batch(step)
        found.append((sum(len(each.input_ids) for row in rows for each in job.rows.examples(int(row))), step))
    return sorted(found)[len(found) // 2][1]


def _peak(job: Job) -> int:
    if job.compute.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(job.compute.device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
