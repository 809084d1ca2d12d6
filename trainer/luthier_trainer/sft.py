"""Supervised fine-tuning: the story of a job, from a task to a model, top to bottom."""

import dataclasses
import gc
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from luthier.trainer.v1.report_pb2 import Finished, Stopped
from luthier.trainer.v1.task_pb2 import TrainerTask
from luthier.v1 import event_pb2
from luthier_trainer import best, checkpoint, rate_finder, recheck
from luthier_trainer.config import read_places, read_settings
from luthier_trainer.control import Control
from luthier_trainer.divergence import Carried, Diverged, leave_out, leave_out_empty, roll_back
from luthier_trainer.evaluate import evaluate
from luthier_trainer.flatten import Example, scored_tokens
from luthier_trainer.gauges import readings
from luthier_trainer.job import Job, set_up
from luthier_trainer.licence import base_licence
from luthier_trainer.report import Reporter, checkpoint_saved
from luthier_trainer.room import with_room
from luthier_trainer.sample import answer
from luthier_trainer.save import base_revision, save_model
from luthier_trainer.schedule import decay_steps, learning_rate
from luthier_trainer.state import step_of, verified_state
from luthier_trainer.stop import Check, StopRequested, check_of
from luthier_trainer.streams import step_seed

_SMALLEST_BUDGET = 64
_OUT_OF_MEMORY_TEXTS = ("can't allocate memory", "not enough memory", "out of memory")


def train(task: TrainerTask, reporter: Reporter, control: Control) -> Finished | Stopped:
    """Trains what the task asks for and returns the attempt's last report.

    The checkpoint of `resume_from` was verified (`resume.choose`). The control is read between micro-batches: a stop
    leaves a checkpoint of the last whole step. An update that destroys the weights sets the job up a second time, from
    its newest checkpoint (`divergence`). Raises TrainingError for what a person can act on; anything else is a bug or
    the machine's trouble, such as memory.
    """
    settings, places = read_settings(task), read_places(task)
    check = check_of(control)
    carried: Carried | None = None
    while True:
        job: Job | None = None
        try:
            job = set_up(task, settings, places, reporter, check)
            if carried is None:
                best.take_up(job)
                _introduce(job)
                rate_finder.find(job, _accumulate, check)
            else:
                carried.hand_to(job)
            _train(job, check)
            job.complete_rows()
            best.take_the_best(job, _save_checkpoint)
            if job.counters.step > 0:
                _sample(job, check)
            check()
            return _finish(job)
        except StopRequested:
            if job is not None:
                return Stopped(step=job.counters.step, checkpoint=_save_checkpoint(job))
            resumed = places.resume_from
            return Stopped(step=step_of(resumed) if resumed else 0, checkpoint=resumed.name if resumed else "")
        except Diverged:
            assert job is not None
            carried = roll_back(job)
            places = dataclasses.replace(places, resume_from=_newest(job))
            del job
            gc.collect()  # modules with a forward of their own are cycles: two models would need room at once


def _newest(job: Job) -> Path | None:
    """The job's newest checkpoint, verified; None when it has none. Raises TrainingError CHECKPOINT_DAMAGED."""
    _, name = job.saved
    if not name:
        return None
    directory = job.places.checkpoints / name
    verified_state(directory)
    return directory


def _introduce(job: Job) -> None:
    """Reports how the job trains and, after a resume, whether it computes what it computed before."""
    job.reporter.report(job.plan(), durable=True)
    if job.resumed is not None:
        checked = recheck.recheck(job, job.resumed)
        if checked is not None:
            job.reporter.report(checked)


def _train(job: Job, check: Check) -> None:
    """Every step from the counters' on, with the evaluations, samples and checkpoints that are due between them."""
    counters = job.counters
    job.forward.model.train()
    every = job.settings.checkpoint_every or max(50, math.ceil(job.total_steps / 10))
    if counters.step == 0 and job.told < 0:
        _evaluate(job, check)
        _sample(job, check)
        job.told = 0
    while counters.step < job.total_steps:
        if _evaluation_is_due(job):  # only true here when a stop came before it
            _evaluate(job, check)
        if best.stops(job):
            _stop_early(job)
            break
        if _sample_is_due(job):
            _sample(job, check)
        make_step(job, check)
        if _evaluation_is_due(job):
            _evaluate(job, check)
        if counters.step % every == 0:
            _save_checkpoint(job)
    _evaluate(job, check)


def _tell_step(job: Job) -> None:
    """Reports the newest step, unless that was done."""
    if job.untold is None:
        return
    if job.operations and job.peak_flops:
        job.untold.metrics["mfu"] = job.throughput.operations_per_second / job.peak_flops
    job.untold.metrics.update(readings(job.compute.device))
    job.reporter.report(job.untold)
    job.untold = None


def _stop_early(job: Job) -> None:
    """Tells that training ends before its last step, and where."""
    _tell_step(job)
    standing = job.counters.standing
    message = (
        f"stopped early at step {job.counters.step} of {job.total_steps}: {standing.unimproved} evaluations without"
        f" improvement, the best at step {standing.best_step}"
    )
    job.reporter.report(event_pb2.LogEmitted(level=event_pb2.LOG_LEVEL_INFO, message=message))


def make_step(job: Job, check: Check) -> None:
    """One optimizer step: forward and backward over its micro-batches, then clip and update. Raises Diverged."""
    counters, settings = job.counters, job.settings
    if counters.step + 1 in job.left_out:
        leave_out(job, "the update")
        return
    rows = job.order.batch(counters.step)
    if not job.rows.scores(rows):
        leave_out_empty(job)
        return
    job.throughput.start()
    examples = [example for index in rows for example in job.rows.examples(int(index))]
    losses, tokens = _accumulate(job, examples, check)
    rate = learning_rate(
        job.peak_rate,
        settings.scheduler,
        counters.step,
        warmup=job.warmup,
        total_steps=job.total_steps,
        decay=decay_steps(job.total_steps, settings.decay_ratio),
        floor=settings.min_rate_ratio,
    )
    norms = job.optimizer.step(rate, losses)
    # The one time that a step waits for the device.
    loss, norm, finite = torch.stack([losses, norms.double(), job.optimizer.is_finite().double()]).tolist()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        leave_out(job, "the gradient" if math.isfinite(loss) else "the loss")
        return
    if not finite:
        raise Diverged
    counters.step += 1
    counters.trained_tokens += tokens
    counters.loss_total += loss
    counters.last_loss = loss
    counters.seconds += job.throughput.stop(tokens, job.operations.of_examples(examples) if job.operations else 0.0)
    if counters.step <= job.told:
        return
    job.told = counters.step
    job.untold = event_pb2.StepCompleted(
        step=counters.step,
        total_steps=job.total_steps,
        epoch=job.epoch,
        loss=loss,
        learning_rate=rate,
        grad_norm=norm,
        tokens_per_second=job.throughput.tokens_per_second,
        trained_tokens=counters.trained_tokens,
        computed_tokens=counters.computed_tokens,
    )
    if counters.step % settings.log_every == 0 or counters.step in (1, job.total_steps):
        _tell_step(job)


def _accumulate(job: Job, examples: Sequence[Example], check: Check) -> tuple[torch.Tensor, int]:
    """The gradient of the mean loss per scored token of all examples, left in the masters. Returns (the loss in 64
    bits, still on the device, and the real tokens).

    When memory runs out the step starts over in micro-batches of half the tokens, which changes nothing in its result.
    """
    while True:
        try:
            return _accumulate_once(job, examples, check)
        except (RuntimeError, MemoryError) as error:
            if not _can_halve(job, examples, error):
                raise
        job.batches = dataclasses.replace(job.batches, budget=job.batches.budget // 2)
        if job.compute.device.type == "cuda":
            torch.cuda.empty_cache()
        message = f"out of memory: micro-batches have {job.batches.budget} tokens from now on"
        job.reporter.report(event_pb2.LogEmitted(level=event_pb2.LOG_LEVEL_WARNING, message=message))


def _accumulate_once(job: Job, examples: Sequence[Example], check: Check) -> tuple[torch.Tensor, int]:
    job.masters.zero_gradients()
    stream = step_seed(job.settings.seed, job.counters.step)
    torch.manual_seed(stream)
    share = 1.0 / scored_tokens(examples)
    loss = torch.zeros((), dtype=torch.float64, device=job.compute.device)
    tokens = done = 0
    for batch in job.batches.of(examples):
        check()
        if len(batch.targets):
            with job.neftune.noise(batch.lengths, first=done, seed=stream):
                part = job.forward.loss_sum(batch) * share
            part.backward()  # type: ignore[no-untyped-call]
            loss += part.detach()
        tokens += batch.tokens
        done += len(batch.lengths)
        job.counters.computed_tokens += batch.tokens
    return loss, tokens


def _can_halve(job: Job, examples: Sequence[Example], error: RuntimeError | MemoryError) -> bool:
    """Whether the error is a lack of memory that smaller micro-batches could cure."""
    if isinstance(error, RuntimeError) and not any(text in str(error).lower() for text in _OUT_OF_MEMORY_TEXTS):
        return False
    several = any(len(batch.lengths) > 1 for batch in job.batches.of(examples))
    return several and job.batches.budget // 2 >= _SMALLEST_BUDGET


def _evaluation_is_due(job: Job) -> bool:
    step, settings = job.counters.step, job.settings
    if job.evaluated is None or step == 0 or step <= job.counters.evaluated_step:
        return False
    every = settings.evaluate_every_steps or (settings.evaluate_every_epochs or 1) * job.order.steps_per_epoch
    return step % every == 0


def _evaluate(job: Job, check: Check) -> None:
    """Evaluates the model as it is, unless that was done."""
    counters = job.counters
    if job.evaluated is None or counters.evaluated_step >= counters.step:
        return
    rows, indices = job.evaluated.rows, job.evaluated.indices
    job.reporter.report(event_pb2.PhaseProgressed(phase=event_pb2.PHASE_EVALUATING, total=len(indices), unit="rows"))
    result = evaluate(job.forward, job.batches, rows, indices, check, step=counters.step, epoch=job.epoch)
    if counters.evaluated_step < 0:
        counters.evaluation["base_eval_loss"] = result.loss
    counters.evaluation["eval_loss"] = result.loss
    counters.evaluation["eval_token_accuracy"] = result.token_accuracy
    counters.evaluated_step = counters.step
    result.best = counters.step > 0 and best.judge(job, result)
    job.reporter.report(result)
    if result.best and job.settings.keep_best:
        _save_checkpoint(job)


def _sample_is_due(job: Job) -> bool:
    counters = job.counters
    evaluated = counters.evaluated_step == counters.step > max(counters.sampled_step, 0)
    return job.settings.sample_each_evaluation and evaluated


def _sample(job: Job, check: Check) -> None:
    """Answers the sample prompts with the model as it is."""
    prompts = job.settings.sample_prompts
    if not prompts:
        return
    job.reporter.report(event_pb2.PhaseProgressed(phase=event_pb2.PHASE_SAMPLING, total=len(prompts), unit="prompts"))
    samples = answer(
        job.forward.model,
        job.tokenizer,
        prompts,
        job.sample_ids,
        max_tokens=job.settings.sample_max_tokens,
        attention=job.generation_attention,
        check=check,
    )
    step = job.counters.step if job.holds is None else job.holds
    job.reporter.report(event_pb2.SamplesGenerated(step=step, samples=samples))
    job.counters.sampled_step = job.counters.step


def _save_checkpoint(job: Job) -> str:
    """Saves the last whole step, unless that was done, and returns the checkpoint's name. Step 0 needs none."""
    step, name = job.saved
    if step == job.counters.step:
        return name
    attempt, folder = job.task.attempt, job.places.checkpoints
    state = recheck.noted(job)
    name, size = with_room(
        job,
        lambda: checkpoint.save(folder, attempt, state, job.trained, job.masters, job.optimizer, job.tokenizer),
    )
    job.saved = (job.counters.step, name)
    job.reporter.report(checkpoint_saved(job.task.job_id, job.counters.step, attempt, size), durable=True)
    checkpoint.prune(job.places.checkpoints, job.settings.checkpoint_keep)
    return name


def _finish(job: Job) -> Finished:
    """Writes the model and sums up."""
    counters = job.counters
    job.reporter.report(event_pb2.PhaseProgressed(phase=event_pb2.PHASE_SAVING, total=1, unit="models"))
    metrics = {
        "train_loss": counters.loss_total / max(counters.step - len(counters.skipped) - counters.empty, 1),
        "final_loss": counters.last_loss,
        "epochs": job.epoch,
        "trained_tokens": float(counters.trained_tokens),
        "training_seconds": counters.seconds,
        "peak_memory_bytes": float(job.gauge.peak()),
        **counters.evaluation,
        **best.metrics(job),
    }
    if counters.step == len(counters.skipped) + counters.empty:  # no step made a loss
        del metrics["train_loss"], metrics["final_loss"]
    if job.operations and job.peak_flops and job.throughput.operations_per_second:
        metrics["mfu"] = job.throughput.operations_per_second / job.peak_flops
    if counters.skipped:
        metrics["skipped_steps"] = float(len(counters.skipped))
    if counters.empty:
        metrics["empty_steps"] = float(counters.empty)
    licence = base_licence(job.task.base_model, job.trained.revision)
    size = with_room(job, lambda: save_model(job, metrics, licence))
    return Finished(
        step=counters.step if job.holds is None else job.holds,
        size_bytes=size,
        metrics=metrics,
        base_licence=licence,
        base_revision=base_revision(job),
    )
