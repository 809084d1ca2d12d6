"""Training as anybody trains with Luthier: a luthierd on this machine, two datasets, and a job of full fine-tuning on
raw text."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from luthier.v1 import job_pb2
from luthier.v1.checkpoint_pb2 import Checkpoint
from luthier.v1.event_pb2 import JobEvent
from luthier_client import Client, JobHandle

NAME = "builtin-tiny"
AVERAGED = 20
"""Steps whose mean loss is a point of the curve."""


@dataclass(frozen=True)
class Recipe:
    """The numbers of the job. `rate` is the peak; it is held after the warmup, and falls to nothing in a line over the
    last `decay` of all steps, so that a job may also be ended sooner or later than planned."""

    steps: int
    rows: int
    rate: float
    warmup: int
    decay: float
    length: int
    seed: int
    dtype: job_pb2.Dtype.ValueType = job_pb2.DTYPE_FLOAT32


@dataclass
class Curve:
    """What the jobs' events told: (step, mean loss of the AVERAGED steps up to it), (step, held-out loss), and sums."""

    losses: list[tuple[int, float]] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    tokens: int = 0
    plan: dict[str, str | int] = field(default_factory=dict)


@contextlib.contextmanager
def luthierd(work: Path) -> Iterator[str]:
    """A luthierd whose base models lie in `work`; yields its address. It stops with its trainers, which leave a
    checkpoint: the same call goes on. Raises RuntimeError when it does not start."""
    data = work / "luthierd"
    data.mkdir(parents=True, exist_ok=True)
    address = data / "address"
    address.unlink(missing_ok=True)
    command = [sys.executable, "-m", "luthier_server.main", "--listen", "127.0.0.1:0", "--stop-trainers"]
    command += ["--data-dir", str(data), "--model-root", str(work)]
    with open(data / "luthierd.log", "ab") as log:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    try:
        while not address.exists():
            if server.poll() is not None:
                raise RuntimeError(f"luthierd did not start: see {data / 'luthierd.log'}")
            time.sleep(0.05)
        yield address.read_text()
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


def train(client: Client, work: Path, recipe: Recipe, say: Callable[[str], None]) -> JobHandle:
    """Runs the job from `work/start` on `work/train.jsonl` to its end, or goes on with the one that is there: with
    its newest checkpoint when the recipe has another number of steps. Raises JobFailed, JobCancelled."""
    before = [job for job in client.list_jobs() if job.proto.spec.display_name == NAME]
    job = before[0] if before else None
    if job is None or job.proto.spec.fine_tune.hyperparameters.max_steps != recipe.steps:
        trained = client.upload_dataset(work / "train.jsonl", name=NAME)
        tested = client.upload_dataset(work / "heldout.jsonl", name=f"{NAME}-heldout")
        spec = job_pb2.JobSpec(
            display_name=NAME,
            fine_tune=job_pb2.FineTuneTask(
                base_model=str((work / "start").resolve()),
                training_dataset=trained.id,
                validation_dataset=tested.id,
                full=job_pb2.Full(),
                hyperparameters=job_pb2.Hyperparameters(
                    max_steps=recipe.steps,
                    batch_size=recipe.rows,
                    learning_rate=recipe.rate,
                    lr_scheduler=job_pb2.LR_SCHEDULER_WARMUP_STABLE_DECAY,
                    warmup_steps=recipe.warmup,
                    decay_ratio=recipe.decay,
                    weight_decay=0.1,
                    adam_beta1=0.9,
                    adam_beta2=0.95,
                    max_length=recipe.length,
                    seed=recipe.seed,
                    dtype=recipe.dtype,
                ),
                evaluation=job_pb2.Evaluation(every_steps=400),
                checkpoints=job_pb2.Checkpoints(every_steps=100, keep=2),
            ),
        )
        if job is not None:
            spec.fine_tune.resume_from = _end(job).name
            say(f"goes on from {spec.fine_tune.resume_from}")
        job = client.create_job(spec)
    say(f"{job.id}: {recipe.steps} steps")
    for event in job.watch(after=job.proto.last_sequence if before and job is before[0] else 0):
        if event.HasField("step_completed") and event.step_completed.step % AVERAGED == 0:
            step = event.step_completed
            say(f"step {step.step}/{step.total_steps} loss {step.loss:.3f} {step.tokens_per_second:.0f} tokens/s")
        elif event.HasField("evaluation_completed"):
            found = event.evaluation_completed
            say(f"step {found.step}: held-out loss {found.loss:.4f}, perplexity {found.perplexity:.1f}")
        elif event.HasField("log_emitted"):
            say(event.log_emitted.message)
    job.wait(check=True)
    return job


def _end(job: JobHandle) -> Checkpoint:
    """Stops the job, and returns its newest checkpoint."""
    if job.refresh().state not in (
        job_pb2.JOB_STATE_SUCCEEDED,
        job_pb2.JOB_STATE_FAILED,
        job_pb2.JOB_STATE_CANCELLED,
        job_pb2.JOB_STATE_PAUSED,
    ):
        job.pause()
        while job.refresh().state != job_pb2.JOB_STATE_PAUSED:
            time.sleep(0.2)
    return job.checkpoints()[0]


def _events(job: JobHandle) -> Iterator[JobEvent]:
    """What the job has told so far."""
    last = job.refresh().last_sequence
    for event in job.watch() if last else ():
        yield event
        if event.sequence >= last:
            return


def read_curve(client: Client) -> Curve:
    """The curve of all jobs, the later ones going on from the earlier ones."""
    steps: dict[int, tuple[float, int]] = {}
    evaluations: dict[int, float] = {}
    curve = Curve()
    for job in reversed([job for job in client.list_jobs() if job.proto.spec.display_name == NAME]):
        fresh = True
        for event in _events(job):
            if event.HasField("step_completed"):
                step = event.step_completed
                if fresh:  # what an earlier job did after the checkpoint does not count
                    steps = {each: value for each, value in steps.items() if each < step.step}
                    evaluations = {each: value for each, value in evaluations.items() if each < step.step}
                    fresh = False
                steps[step.step] = step.loss, step.trained_tokens
            elif event.HasField("evaluation_completed"):
                evaluations[event.evaluation_completed.step] = round(event.evaluation_completed.loss, 4)
            elif event.HasField("plan_resolved"):
                plan = event.plan_resolved
                curve.plan = {
                    "device": plan.device,
                    "dtype": plan.dtype,
                    "attention": plan.attention,
                    "threads": plan.threads,
                    "training_rows": plan.training_rows,
                    "trained_parameters": plan.trained_parameters,
                }
    last = max(steps)
    for end in [*range(AVERAGED, last, AVERAGED), last]:
        losses = [steps[step][0] for step in range(max(1, end - AVERAGED + 1), end + 1) if step in steps]
        curve.losses.append((end, round(sum(losses) / len(losses), 4)))
    curve.evaluations = sorted(evaluations.items())
    curve.tokens = steps[last][1]
    return curve
