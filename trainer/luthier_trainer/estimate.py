"""What a job would take, told before it exists: tokens, steps, time, memory and disk.

Everything is computed by what trains: the tokenizer and the template count, `RowOrder` and `total_steps` give the
course, `flops` the operations, `memory` the bytes. No weights are loaded, unless a trial was asked for.
"""

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from luthier.trainer.v1.task_pb2 import TrainerTask
from luthier.v1 import estimate_pb2, job_pb2
from luthier_trainer import memory, outlay
from luthier_trainer.config import Settings, read_settings
from luthier_trainer.data.tokens.counted import Counted, count
from luthier_trainer.data.tokens.task import Tokens, tokens_for
from luthier_trainer.errors import TrainingError
from luthier_trainer.flops import Operations, operations
from luthier_trainer.forecast import Extent, Forecast, Outlook, Room, remedies
from luthier_trainer.gauges import peak_flops
from luthier_trainer.job import dtype_name
from luthier_trainer.plan import Compute, choose_compute, most_tokens
from luthier_trainer.report import Reporter
from luthier_trainer.stop import Check, StopRequested

log = logging.getLogger(__name__)

_GLANCE_ROWS, _GLANCE_SECONDS = 256, 0.5
"""Rows that are looked at for the memory alone, and the time for that and for advice: somebody creates a job."""
_REMEDY_SECONDS = 5.0


def estimate(task: TrainerTask, reporter: Reporter, check: Check) -> estimate_pb2.JobEstimate:
    """The estimate that `task.estimate` asks for. Raises TrainingError for what would fail the job before its first
    step, and what `check` raises."""
    settings = read_settings(task)
    tokens = tokens_for(task)
    check()
    compute = _compute(task, settings, tokens)
    outlook = Outlook(task.base_model, settings, compute)
    answer = estimate_pb2.JobEstimate(
        device=str(compute.device), dtype=dtype_name(compute.dtype), notes=list(compute.notes)
    )
    if task.estimate.memory_only:
        with _unless_unknown(answer):
            _foresee(task, settings, compute, outlook, tokens, None, answer, reporter, check)
        return answer
    training = count(task.training_dataset, tokens, Path(task.cache_dir), reporter, check)
    validation = None
    if task.HasField("validation_dataset"):
        validation = count(task.validation_dataset, tokens, Path(task.cache_dir), reporter, check)
    check()
    with _unless_unknown(answer):
        _foresee(task, settings, compute, outlook, tokens, training, answer, reporter, check)
    course = outlay.course(settings, training, validation)
    _tell_course(task, settings, course, training, answer)
    written = outlay.sizes(
        settings,
        outlook.trained,
        _tokenizer_bytes(tokens),
        course,
        training.cache_bytes + (validation.cache_bytes if validation is not None else 0),
    )
    _tell_disk(task, settings, written, answer)
    _tell_speed(task, settings, compute, outlook, course, written, answer, reporter, check)
    return answer


def _compute(task: TrainerTask, settings: Settings, tokens: Tokens) -> Compute:
    """As a job chooses it. Without units for bfloat16 a CPU needs no probe, which takes seconds with large models; for
    the memory alone, what takes less is assumed where there are some."""
    wanted = settings.dtype
    if not task.cuda_devices and wanted == job_pb2.DTYPE_UNSPECIFIED:
        if not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
            wanted = job_pb2.DTYPE_FLOAT32
        elif task.estimate.memory_only:
            wanted = job_pb2.DTYPE_BFLOAT16
    return choose_compute(task, wanted, tokens.config, None)


@contextlib.contextmanager
def _unless_unknown(answer: estimate_pb2.JobEstimate) -> Iterator[None]:
    """A model whose memory cannot be foretold is taken to fit, as a job takes it."""
    try:
        yield
    except (TrainingError, StopRequested, MemoryError, OSError):
        raise
    except Exception as error:  # its way depends on its tokens, or it has operations that no fake can do
        log.info("memory cannot be foretold: %s", error)
        answer.notes.append("what it takes of memory cannot be foretold for this model")
        answer.fits = True


def _foresee(
    task: TrainerTask,
    settings: Settings,
    compute: Compute,
    outlook: Outlook,
    tokens: Tokens,
    training: Counted | None,
    answer: estimate_pb2.JobEstimate,
    reporter: Reporter,
    check: Check,
) -> None:
    """Fills in memory, `fits` and `remedies`. Where not every row was counted, rows are taken to be as long as they may
    be; and if there is no room for that, as long as the longest that was seen, so that nothing is refused that might
    fit."""
    room = _room(task, settings, compute, answer)
    limit = tokens.options.max_length
    whole = training is not None and training.is_whole
    extent = _extent(training) if training is not None and whole else Extent(limit, room.most, limit)
    forecast = outlook.forecast(extent, room)
    if not forecast.fits and not whole:
        seen = training or count(
            task.training_dataset,
            tokens,
            Path(task.cache_dir),
            reporter,
            check,
            rows=_GLANCE_ROWS,
            seconds=_GLANCE_SECONDS,
        )
        extent = _extent(seen)
        forecast = outlook.forecast(extent, room)
        if forecast.fits and not seen.is_whole:
            answer.notes.append(
                f"rows of {limit} tokens would not fit; the longest of {len(seen.tokens)} rows that were looked at"
                f" has {seen.longest}"
            )
    _tell_memory(forecast, answer)
    answer.fits = forecast.fits
    if not forecast.fits:
        patience = _GLANCE_SECONDS if task.estimate.memory_only else _REMEDY_SECONDS
        answer.remedies.extend(remedies(task.base_model, settings, compute, extent, room, patience))


def _extent(rows: Counted) -> Extent:
    return Extent(max(rows.longest, 1), int(rows.tokens.max(initial=1)), int(rows.scored.max(initial=1)))


def _room(task: TrainerTask, settings: Settings, compute: Compute, answer: estimate_pb2.JobEstimate) -> Room:
    """What there is, also told in the answer."""
    total, free = memory.total_memory(compute.device)
    host_total, host_free = memory.total_memory(torch.device("cpu"))
    answer.host_memory.total_bytes, answer.host_memory.free_bytes = host_total, host_free
    limit = int(total * memory.SHARE)
    if task.memory_limit_bytes:
        total = limit = task.memory_limit_bytes
        free = min(free, limit)
    answer.device_memory.total_bytes, answer.device_memory.free_bytes = total, free
    return Room(limit, int(host_total * memory.SHARE), most_tokens(compute), settings.batch_size)


def _tell_memory(forecast: Forecast, answer: estimate_pb2.JobEstimate) -> None:
    answer.micro_batch_tokens = forecast.fit.budget_tokens
    answer.activation_checkpointing = forecast.fit.checkpointing
    answer.device_memory.needed_bytes = forecast.fit.predicted_bytes
    answer.host_memory.needed_bytes = forecast.host_bytes
    if forecast.fits and 0 < answer.device_memory.free_bytes < forecast.fit.predicted_bytes:
        answer.notes.append("less memory is free now: other processes use it, and the job would take smaller steps")


def _tell_course(
    task: TrainerTask,
    settings: Settings,
    course: outlay.Course,
    training: Counted,
    answer: estimate_pb2.JobEstimate,
) -> None:
    answer.training_rows, answer.validation_rows = course.training_rows, course.validation_rows
    answer.total_steps = course.total_steps
    answer.tokens_per_epoch = round(course.an_epoch.tokens)
    answer.trained_tokens_per_epoch = round(course.an_epoch.scored)
    answer.training_tokens = round(course.training.tokens)
    counted = len(training.tokens)
    answer.counted_rows = course.training_rows if training.is_whole else min(counted, course.training_rows)
    if not training.is_whole:
        where = "from all over the file" if training.is_spread else "from the beginning of the file"
        answer.notes.append(
            f"tokens are counted in {counted:,} of {training.rows:,} rows, {where}: a dataset that was checked or"
            " trained on with this model and these options is counted exactly"
        )
    if settings.judging.patience is not None:
        answer.notes.append("early stopping may end the job sooner: the numbers are for all of its steps")
    spec = task.spec.fine_tune
    if spec.resume_from:
        answer.notes.append("the job goes on from a checkpoint: the numbers are for all of its steps, from the first")
    if spec.hyperparameters.find_learning_rate:
        answer.notes.append("the range test that finds the learning rate comes on top")


def _tell_disk(task: TrainerTask, settings: Settings, written: outlay.Sizes, answer: estimate_pb2.JobEstimate) -> None:
    there = shutil.disk_usage(_existing(Path(task.cache_dir)))
    answer.disk.needed_bytes, answer.disk.total_bytes, answer.disk.free_bytes = written.disk, there.total, there.free
    missing = written.disk - there.free
    if missing <= 0:
        return
    answer.fits = False
    spare = (settings.checkpoint_keep - 1) * written.checkpoint
    if settings.checkpoint_keep > 1 and missing <= spare:
        answer.remedies.append("Set checkpoints.keep to 1.")
    answer.remedies.append(f"Free {missing / 2**30:,.2f} GiB on the disk of the data directory.")


def _tokenizer_bytes(tokens: Tokens) -> int:
    """What lies beside the weights in every checkpoint and model."""
    with tempfile.TemporaryDirectory() as folder:
        tokens.tokenizer.save_pretrained(folder)
        return sum(each.stat().st_size for each in Path(folder).rglob("*") if each.is_file())


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _tell_speed(
    task: TrainerTask,
    settings: Settings,
    compute: Compute,
    outlook: Outlook,
    course: outlay.Course,
    written: outlay.Sizes,
    answer: estimate_pb2.JobEstimate,
    reporter: Reporter,
    check: Check,
) -> None:
    """Fills in the speed and the seconds, unless the job cannot run or its operations are not known."""
    kind = compute.device.type
    each = operations(outlook.trained)
    rate = 0.0
    if task.estimate.probe and answer.fits:
        from luthier_trainer.trial import attempt

        tried = attempt(task, settings, reporter, check)
        answer.speed_basis = estimate_pb2.SPEED_BASIS_PROBE
        answer.tokens_per_second = tried.tokens_per_second
        memory = answer.device_memory if kind == "cuda" else answer.host_memory
        memory.needed_bytes = max(memory.needed_bytes, tried.peak_bytes)
        answer.notes.append(
            f"two steps of {tried.tokens:,} tokens took {tried.peak_bytes / 2**20:,.0f} MiB of memory at most"
        )
        rate = tried.operations_per_second
        if each is None and course.training.tokens:
            # A mixture of experts: its time goes with its tokens.
            each, rate = Operations(1.0, 0.0, 0.0), tried.tokens_per_second
    elif each is not None:
        share = task.estimate.known_mfu or outlay.USUAL_MFU[kind]
        rate = peak_flops(compute.device, compute.dtype) * share
        known = task.estimate.known_mfu > 0
        answer.speed_basis = estimate_pb2.SPEED_BASIS_HISTORY if known else estimate_pb2.SPEED_BASIS_FORMULA
        total = course.training.operations(each)
        answer.tokens_per_second = course.training.tokens * rate / total if total else 0.0
    if each is None or not rate:
        answer.notes.append("the speed of this model is not known without a probe")
        return
    answer.seconds = outlay.seconds(settings, outlook.trained, course, written, each, rate, kind)
