"""The puppet: a trainer without torch, for tests of everything around training.

It reports, saves checkpoints and obeys control like a real one, writes real directories, and computes nothing.
"""

import math
import signal
import time
from pathlib import Path

from luthier.trainer.v1 import report_pb2, task_pb2
from luthier.v1 import event_pb2
from luthier_trainer import durable
from luthier_trainer.control import Control
from luthier_trainer.errors import TrainingError
from luthier_trainer.report import Reporter, checkpoint_directory, checkpoint_saved, checkpoint_step

_TOKENS_PER_STEP = 1000
_NAP = 0.02


def perform(
    task: task_pb2.TrainerTask, reporter: Reporter, control: Control
) -> report_pb2.Finished | report_pb2.Stopped:
    """Goes through `task.puppet.steps` steps, from the checkpoint's on. Raises TrainingError PUPPET_FAILED after the
    step where it is told to."""
    puppet = task.puppet
    if puppet.stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    saved = Path(task.resume_from).name
    resumed = step = saved_step = checkpoint_step(saved) if saved else 0
    _announce(task, reporter)
    while step < puppet.steps:
        if not rest(puppet, control):
            if step > saved_step:
                saved = _save_checkpoint(task, step, reporter)
            return report_pb2.Stopped(step=step, checkpoint=saved)
        step += 1
        reporter.report(_step_completed(task, step, resumed))
        if puppet.padding_bytes:
            line = "." * puppet.padding_bytes
            reporter.report(event_pb2.LogEmitted(level=event_pb2.LOG_LEVEL_INFO, message=line))
        if step == puppet.fail_at_step:
            raise TrainingError("PUPPET_FAILED", f"the puppet was told to fail after step {step}")
        every = task.spec.fine_tune.checkpoints.every_steps
        if every and step % every == 0:
            saved, saved_step = _save_checkpoint(task, step, reporter), step
    return _save_model(task, step, reporter)


def _announce(task: task_pb2.TrainerTask, reporter: Reporter) -> None:
    rows = task.training_dataset.rows
    reporter.report(
        event_pb2.PhaseProgressed(phase=event_pb2.PHASE_TOKENIZING, completed=rows, total=rows, unit="rows")
    )
    reporter.report(
        event_pb2.PlanResolved(
            device="cpu",
            dtype="float32",
            attention="none",
            micro_batch_tokens=_TOKENS_PER_STEP,
            total_steps=task.puppet.steps,
            training_rows=rows,
            threads=1,
            notes=["a puppet trains nothing"],
        )
    )


def rest(puppet: task_pb2.Puppet, control: Control) -> bool:
    """Lets a step's time pass; False as soon as the puppet is asked to leave, if it listens."""
    end = time.monotonic() + puppet.step_seconds
    while True:
        if not puppet.stubborn and control.requested() != task_pb2.CONTROL_ACTION_UNSPECIFIED:
            return False
        left = end - time.monotonic()
        if left <= 0:
            return True
        time.sleep(min(left, _NAP))


def _loss(puppet: task_pb2.Puppet, step: int) -> float:
    return 0.5 + 2.5 * math.exp(-3 * step / puppet.steps) + 0.05 * math.sin(step)


def _step_completed(task: task_pb2.TrainerTask, step: int, resumed: int) -> event_pb2.StepCompleted:
    puppet = task.puppet
    return event_pb2.StepCompleted(
        step=step,
        total_steps=puppet.steps,
        epoch=step / puppet.steps,
        loss=_loss(puppet, step),
        learning_rate=1e-4 * (1 - step / puppet.steps),
        grad_norm=1.0,
        tokens_per_second=_TOKENS_PER_STEP / max(puppet.step_seconds, 1e-3),
        trained_tokens=step * _TOKENS_PER_STEP,
        computed_tokens=task.computed_tokens + (step - resumed) * _TOKENS_PER_STEP,
    )


def _save_checkpoint(task: task_pb2.TrainerTask, step: int, reporter: Reporter) -> str:
    """The directory's name below the job's checkpoints."""
    name = checkpoint_directory(step, task.attempt)
    directory = Path(task.checkpoints_dir) / name
    with durable.new_directory(directory) as aside:
        state = {"job_id": task.job_id, "step": step, "loss": _loss(task.puppet, step)}
        durable.write_json(aside / "state.json", state)
        durable.write_manifest(aside)
    size = durable.size(directory)
    reporter.report(checkpoint_saved(task.job_id, step, task.attempt, size), durable=True)
    return name


def _save_model(task: task_pb2.TrainerTask, step: int, reporter: Reporter) -> report_pb2.Finished:
    loss = _loss(task.puppet, step) if task.puppet.steps else 0.0
    card = {"model_id": task.model_id, "job_id": task.job_id, "step": step, "puppet": True}
    reporter.report(event_pb2.PhaseProgressed(phase=event_pb2.PHASE_SAVING, total=1, unit="files"))
    directory = Path(task.model_dir)
    with durable.new_directory(directory) as aside:
        durable.write_json(aside / "luthier.json", card)
    return report_pb2.Finished(step=step, size_bytes=durable.size(directory), metrics={"train_loss": loss})
