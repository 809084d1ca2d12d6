"""A pass of Luthier's engine: the real `sft.train` with a task as the server would make it."""

import hashlib
import shutil
from pathlib import Path

from benchmarks.engine import workload
from benchmarks.engine.clock import Watch
from benchmarks.engine.contestant import EXAMPLES_PER_STEP, Contestant
from benchmarks.engine.passes import Pass, Stopwatch
from benchmarks.engine.points import switched_off
from luthier.trainer.v1.report_pb2 import Finished
from luthier.trainer.v1.task_pb2 import BaseModelSource, DatasetSource, TrainerTask
from luthier.v1 import event_pb2, job_pb2
from luthier_trainer import sft
from luthier_trainer.control import NoControl
from luthier_trainer.main import set_up_libraries
from luthier_trainer.report import Payload

set_up_libraries()  # as the host does for its trainers; the libraries look at their first product

_DTYPES = {
    "auto": job_pb2.DTYPE_UNSPECIFIED,
    "float32": job_pb2.DTYPE_FLOAT32,
    "bfloat16": job_pb2.DTYPE_BFLOAT16,
}


class PlanClock:
    """A reporter that times from the plan, which ends the set-up, to the last step."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.tokens = 0
        self.losses: list[float] = []
        self.plan = event_pb2.PlanResolved()

    def report(self, payload: Payload, *, durable: bool = False) -> None:
        """Takes what happens in training."""
        if isinstance(payload, event_pb2.PlanResolved):
            self.plan.CopyFrom(payload)
            self.watch.start()
        elif isinstance(payload, event_pb2.StepCompleted):
            self.watch.lap()
            self.losses.append(payload.loss)
            self.tokens = payload.trained_tokens


def run(contestant: Contestant, model_dir: Path, rows: Path, count: int, work: Path) -> Pass:
    """One epoch over the rows, `count` of them."""
    out = work / "luthier"
    shutil.rmtree(out, ignore_errors=True)
    watch = Stopwatch()
    clock = PlanClock(watch)
    with switched_off(contestant.without):
        end = sft.train(task(model_dir, rows, count, out, dtype=_DTYPES[contestant.dtype]), clock, NoControl())
    assert isinstance(end, Finished), end
    return Pass(
        **watch.times,
        tokens=clock.tokens,
        scored=sum(each.scored for each in workload.sample(count)),
        steps=len(clock.losses),
        loss=sum(clock.losses) / len(clock.losses),
        dtype=clock.plan.dtype,
    )


def task(
    model_dir: Path,
    rows: Path,
    count: int,
    out: Path,
    *,
    dtype: job_pb2.Dtype.ValueType,
    batch_size: int = EXAMPLES_PER_STEP,
    max_length: int = workload.MAX_LENGTH,
    quantization: job_pb2.LoraQuantization.ValueType = job_pb2.LORA_QUANTIZATION_NONE,
) -> TrainerTask:
    """One epoch over the `count` rows of a file, as the server would ask for it."""
    tuned = job_pb2.FineTuneTask(
        base_model="benchmark",
        training_dataset="chats",
        sft=job_pb2.Sft(),
        lora=job_pb2.Lora(
            rank=workload.RANK,
            alpha=2.0 * workload.RANK,
            dropout=0.0,
            target_modules=["all-linear"],
            quantization=quantization,
        ),
        hyperparameters=job_pb2.Hyperparameters(
            batch_size=batch_size,
            learning_rate=2e-4,
            weight_decay=0.0,
            lr_scheduler=job_pb2.LR_SCHEDULER_COSINE,
            warmup_steps=0,
            max_grad_norm=1.0,
            epochs=1.0,
            max_length=max_length,
            seed=0,
            attn_implementation="auto",
            log_every=1,
            dtype=dtype,
            adam_beta1=0.9,
            adam_beta2=0.999,
            adam_epsilon=1e-8,
        ),
        checkpoints=job_pb2.Checkpoints(every_steps=1_000_000, keep=1),
    )
    return TrainerTask(
        job_id="job_benchmark",
        attempt=1,
        spec=job_pb2.JobSpec(fine_tune=tuned),
        base_model=BaseModelSource(location=str(model_dir)),
        training_dataset=DatasetSource(
            path=str(rows), name="chats@1", sha256=hashlib.sha256(rows.read_bytes()).hexdigest(), rows=count
        ),
        checkpoints_dir=str(out / "checkpoints"),
        model_dir=str(out / "model"),
        cache_dir=str(out.parent / "cache"),  # kept between passes: tokenising is set-up, and not timed
    )
