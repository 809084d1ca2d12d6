"""Work beside training that needs a tokenizer: previews of datasets, checks for a base model, estimates of jobs.

It runs in a process of its own, like an attempt, and loads a tokenizer and a configuration but never weights, unless
an estimate is to be tried. A task
with a job's id is the check of that job before it queues (VALIDATING): what supervised fine-tuning cannot use is its
error then. For anybody else the reports say it, and every kind of dataset has one.
"""

import os
import resource
import signal
from pathlib import Path
from types import FrameType
from typing import NoReturn

from luthier.trainer.v1 import task_pb2
from luthier.v1 import dataset_report_pb2, datasets_pb2, job_pb2
from luthier_trainer.control import Control
from luthier_trainer.data.doctor.findings import MAX_LISTED, Findings
from luthier_trainer.data.masks.sandbox import end_process_when_stuck
from luthier_trainer.errors import TrainingError
from luthier_trainer.preview import preview
from luthier_trainer.report import Reporter
from luthier_trainer.stop import Check, check_of

_MEMORY = 4 << 30
_PREVIEW_SECONDS = 15
_NICE = 5


def fence(task: task_pb2.TrainerTask) -> None:
    """Bounds what this process may take from now on: 4 GiB of memory beside what it has, unless it is to train or to
    ask a GPU, and for a preview _PREVIEW_SECONDS of processor time. For a process that does this task and nothing
    else."""
    if not (task.estimate.probe or task.cuda_devices):
        # RLIMIT_DATA and not RLIMIT_AS: tokenised rows are mapped files, which may be larger and cost nothing.
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[5])
        _lower(resource.RLIMIT_DATA, pages * resource.getpagesize() + _MEMORY)
    if task.WhichOneof("work") == "check" and task.job_id.startswith("job_"):
        os.nice(_NICE)  # it may go on while the job trains already
    end_process_when_stuck()
    if task.WhichOneof("work") == "preview":
        used = resource.getrusage(resource.RUSAGE_SELF)
        signal.signal(signal.SIGXCPU, _too_slow)
        _lower(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + _PREVIEW_SECONDS)


def _lower(limit: int, value: int) -> None:
    _, most = resource.getrlimit(limit)
    resource.setrlimit(limit, (value if most == resource.RLIM_INFINITY else min(value, most), most))


def _too_slow(_number: int, _frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGXCPU, signal.SIG_IGN)  # it comes again each second, and there is an answer to be written
    raise TrainingError(
        "PREVIEW_TOO_SLOW",
        f"The preview took more than {_PREVIEW_SECONDS} seconds of processor time.",
        "Ask for fewer rows, or for lines nearer to the start of the file.",
    )


def perform(task: task_pb2.TrainerTask, reporter: Reporter, control: Control) -> task_pb2.DataAnswer:
    """The answer to `task.work`; a TrainingError on the way is one too. Raises StopRequested, and what only a process
    can answer for: a lack of memory, a full disk, a bug."""
    check = check_of(control)
    try:
        if task.WhichOneof("work") == "preview":
            return task_pb2.DataAnswer(preview=preview(task, check))
        if task.WhichOneof("work") == "estimate":
            from luthier_trainer.estimate import estimate

            return task_pb2.DataAnswer(estimate=estimate(task, reporter, check))
        return task_pb2.DataAnswer(check=_reports(task, reporter, check))
    except TrainingError as error:
        return task_pb2.DataAnswer(error=job_pb2.JobError(reason=error.reason, message=error.message, hint=error.hint))


def _reports(task: task_pb2.TrainerTask, reporter: Reporter, check: Check) -> datasets_pb2.TokenReports:
    """Tokenises the datasets into the cache. Raises TrainingError, for a job also for what it cannot train."""
    from luthier_trainer.data.tokens import tokenised
    from luthier_trainer.data.tokens.leakage import leakage
    from luthier_trainer.data.tokens.parts import parts, require_scores
    from luthier_trainer.data.tokens.task import tokens_for

    tokens = tokens_for(task)

    def load(source: task_pb2.DatasetSource) -> tokenised.TokenisedRows:
        rows = tokenised.load(
            source,
            tokens.tokenizer,
            tokens.template,
            tokens.options,
            cache_dir=Path(task.cache_dir),
            cache_max_bytes=task.cache_max_bytes,
            reporter=reporter,
            check=check,
        )
        rows.report.dataset_id, rows.report.base_model = source.name, task.spec.fine_tune.base_model
        if task.job_id.startswith("job_"):
            tokenised.require_trainable(rows, reporter)
        return rows

    training, evaluated = parts(task, load(task.training_dataset), load)
    if task.job_id.startswith("job_"):
        require_scores(training, evaluated)
    reports = datasets_pb2.TokenReports(training=training.rows.report)
    if evaluated is not None:
        leaks = Findings()
        for line, problem in leakage(training, evaluated):
            leaks.add(line, problem)
        if task.HasField("validation_dataset"):
            reports.validation.CopyFrom(evaluated.rows.report)
            _add(reports.validation, leaks)
        else:
            _add(reports.training, leaks)
    return reports


def _add(report: dataset_report_pb2.TokenReport, more: Findings) -> None:
    """Puts more findings into their places: errors first, then by line."""
    added = more.listed()
    findings = sorted([*report.findings[: MAX_LISTED - len(added)], *added], key=_place)
    counts = sorted([*report.counts, *more.counts()], key=lambda each: each.level)
    del report.findings[:], report.counts[:]
    report.findings.extend(findings)
    report.counts.extend(counts)


def _place(finding: dataset_report_pb2.Finding) -> tuple[bool, int]:
    return finding.level != dataset_report_pb2.FINDING_LEVEL_ERROR, finding.line
