"""The best evaluation of a job: what it decides about the end of training, and about the weights that come out.

Everything is a function of the counters, which are part of each checkpoint, so a resume decides the same. The best
checkpoint is saved right after its evaluation; until then a continuation makes the step and the evaluation again.
"""

from collections.abc import Callable
from pathlib import Path

from luthier.v1 import event_pb2
from luthier_trainer import durable
from luthier_trainer.errors import TrainingError
from luthier_trainer.job import Job
from luthier_trainer.report import checkpoint_directory
from luthier_trainer.standing import Standing
from luthier_trainer.weights import read_weights


def judge(job: Job, result: event_pb2.EvaluationCompleted) -> bool:
    """Takes the evaluation of the newest step into account. Returns whether it is the best so far."""
    judging, standing = job.settings.judging, job.counters.standing
    value = result.token_accuracy if judging.by_accuracy else -result.loss
    metrics = {"eval_loss": result.loss, "eval_token_accuracy": result.token_accuracy}
    is_best = standing.add(result.step, value, metrics, judging.min_delta)
    if is_best and job.settings.keep_best:
        saved, name = job.saved
        standing.best_checkpoint = name if saved == result.step else checkpoint_directory(result.step, job.task.attempt)
    return is_best


def stops(job: Job) -> bool:
    """Whether evaluations have stopped improving for as long as patience lasts."""
    patience = job.settings.judging.patience
    return patience is not None and job.counters.standing.unimproved >= patience


def take_up(job: Job) -> None:
    """Finds the best checkpoint again after a resume. Of one that is gone, as in another job that took up only this
    checkpoint, the evaluation is forgotten: the best of those to come is kept. What patience counts stays."""
    standing = job.counters.standing
    if not job.settings.keep_best or standing.best_step < 0:
        return
    if standing.best_step == job.saved[0]:
        standing.best_checkpoint = job.saved[1]  # perhaps under another name
        return
    if standing.best_checkpoint and _directory(job).is_dir():
        return
    _say(
        job,
        event_pb2.LOG_LEVEL_WARNING,
        f"the best checkpoint, of step {standing.best_step}, is not there: the best from here on is kept",
    )
    job.counters.standing = Standing(improved_value=standing.improved_value, unimproved=standing.unimproved)


def take_the_best(job: Job, save: Callable[[Job], object]) -> None:
    """Takes up the weights of the best checkpoint, when that is to be and it is not the last step's. The last step is
    saved before: a stop after this finds its checkpoint made."""
    standing = job.counters.standing
    if not standing.best_checkpoint or standing.best_step == job.counters.step:
        return
    try:
        durable.verify_manifest(_directory(job))
    except TrainingError as error:
        _say(job, event_pb2.LOG_LEVEL_WARNING, f"{error.message} The model is that of the last step.")
        return
    save(job)
    read_weights(job.trained, job.masters, _directory(job))
    job.holds = standing.best_step
    _say(job, event_pb2.LOG_LEVEL_INFO, f"the model is that of step {standing.best_step}, whose evaluation is the best")


def metrics(job: Job) -> dict[str, float]:
    """What the end of a job says of its best evaluation; `eval_` is always that of the weights that come out."""
    standing = job.counters.standing
    found: dict[str, float] = {}
    if standing.best_step >= 0:
        found["best_step"] = float(standing.best_step)
        found |= {f"best_{name}": value for name, value in standing.best_metrics.items()}
    if job.holds is not None:
        found |= {f"last_{name}": job.counters.evaluation[name] for name in standing.best_metrics}
        found |= standing.best_metrics
    if stops(job) and job.counters.step < job.total_steps:
        found["stopped_early"] = 1.0
    return found


def _directory(job: Job) -> Path:
    return job.places.checkpoints / job.counters.standing.best_checkpoint


def _say(job: Job, level: event_pb2.LogLevel.ValueType, message: str) -> None:
    job.reporter.report(event_pb2.LogEmitted(level=level, message=message))
