"""A trainer's process: from a task file to a last report.

`python -m luthier_trainer.main ATTEMPT_DIR` runs an attempt cold, in its own process; the host runs it in a warm fork.
"""

import os
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path

from luthier.trainer import attempt
from luthier.trainer.v1 import report_pb2, task_pb2
from luthier.v1 import event_pb2
from luthier_trainer import durable, puppet, puppet_export, resume
from luthier_trainer.control import Control, FileControl
from luthier_trainer.errors import TrainingError
from luthier_trainer.heartbeat import Heartbeat
from luthier_trainer.logbook import Logbook
from luthier_trainer.report import Reporter, checkpoint_step
from luthier_trainer.spool import SpoolReporter
from luthier_trainer.stop import StopRequested

EXIT_ENDED = 0  # Finished or Stopped is the last report
EXIT_FAILED = 1  # Failed is the last report
EXIT_NO_SPACE = 74  # the last report did not fit on the disk
EXIT_NOT_MINE = 75  # nothing was reported: the attempt is another's, or over

_HEARTBEAT_SECONDS = 5.0
_OUT_OF_MEMORY_TEXTS = ("can't allocate memory", "not enough memory", "out of memory")

_LIBRARIES = {
    # OpenMP's idle threads sleep rather than spin. On two cores that other work shared, spinning made a job of 0.8 s
    # take 3 to 27 s (two threads, four steps).
    "OMP_WAIT_POLICY": "PASSIVE",
    # Code that is generated for a shape of a product is kept for the newest shapes alone, by oneDNN and by torch on
    # top. Hardly a micro-batch has the tokens of another, so that the 1,024 that each keeps by itself are never used
    # again: 28 million weights in bfloat16 had 530 MB of them after four steps. A layer has up to about 40.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "LRU_CACHE_CAPACITY": "64",
}


def set_up_libraries() -> None:
    """Says to the libraries below torch how to behave; to be called before torch is loaded, and a set variable wins."""
    for name, value in _LIBRARIES.items():
        os.environ.setdefault(name, value)


def run_attempt(attempt_dir: Path, secrets: Mapping[str, str]) -> int:
    """Runs the attempt in this process's main thread and returns its exit code. `secrets` become environment variables.

    The lock is held until the process ends, so that a free lock means that nothing of the attempt runs any more.
    """
    if attempt.try_lock(attempt_dir) is None or (attempt_dir / attempt.EXIT).exists():
        return EXIT_NOT_MINE
    task = task_pb2.TrainerTask.FromString((attempt_dir / attempt.TASK).read_bytes())
    os.environ.update(secrets)
    tempfile.tempdir = os.fspath(attempt_dir)  # an attempt leaves nothing elsewhere
    control = FileControl(attempt_dir)
    control.install()
    try:
        reporter = SpoolReporter(attempt_dir, task.wake_socket)
    except FileExistsError:
        return EXIT_NOT_MINE
    end = _run(task, attempt_dir, Logbook(reporter), control)
    try:
        reporter.report(end, durable=True)
    except TrainingError:
        traceback.print_exc()
        return EXIT_NO_SPACE
    reporter.close()
    return EXIT_FAILED if isinstance(end, report_pb2.Failed) else EXIT_ENDED


def _run(
    task: task_pb2.TrainerTask, attempt_dir: Path, reporter: Reporter, control: Control
) -> report_pb2.Finished | report_pb2.Stopped | report_pb2.Failed:
    """Trains, or works on datasets and leaves the answer in the attempt's directory."""
    if task.WhichOneof("work") is None:
        return _train(task, reporter, control)
    answer: task_pb2.DataAnswer | None = None
    end: report_pb2.Finished | report_pb2.Stopped | report_pb2.Failed
    try:
        reporter.report(_started(task), durable=True)
        with Heartbeat(reporter, task.heartbeat_seconds or _HEARTBEAT_SECONDS):
            from luthier_trainer import work

            work.fence(task)
            answer = work.perform(task, reporter, control)
        end = _answered(answer)
    except StopRequested:
        return report_pb2.Stopped()
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        end = _failed(error)
    if answer is None:
        answer = task_pb2.DataAnswer(error=end.error if isinstance(end, report_pb2.Failed) else None)
    try:
        attempt.replace_file(attempt_dir / attempt.ANSWER, answer.SerializeToString())
    except OSError as error:
        traceback.print_exc()
        return _failed(error)
    return end


def _answered(answer: task_pb2.DataAnswer) -> report_pb2.Finished | report_pb2.Failed:
    return report_pb2.Failed(error=answer.error) if answer.HasField("error") else report_pb2.Finished()


def _train(
    task: task_pb2.TrainerTask, reporter: Reporter, control: Control
) -> report_pb2.Finished | report_pb2.Stopped | report_pb2.Failed:
    """Reports the start and what it goes on from, trains or exports with a beating heart, and makes a last report out
    of whatever happens."""
    try:
        task, damaged = resume.choose(task)
        reporter.report(_started(task), durable=True)
        if damaged:
            reporter.report(event_pb2.LogEmitted(level=event_pb2.LOG_LEVEL_WARNING, message=damaged))
        with Heartbeat(reporter, task.heartbeat_seconds or _HEARTBEAT_SECONDS):
            is_export = task.spec.WhichOneof("task") == "export"
            if task.HasField("puppet") and is_export:
                return puppet_export.perform(task, reporter, control)
            if task.HasField("puppet"):
                return puppet.perform(task, reporter, control)
            if is_export:
                from luthier_trainer.export.perform import perform

                return perform(task, reporter, control)
            from luthier_trainer import sft

            return sft.train(task, reporter, control)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        return _failed(error)


def _started(task: task_pb2.TrainerTask) -> report_pb2.Started:
    checkpoint = Path(task.resume_from).name
    step = checkpoint_step(checkpoint) if checkpoint else 0
    return report_pb2.Started(pid=os.getpid(), resumed_from_step=step, checkpoint=checkpoint)


def _failed(error: BaseException) -> report_pb2.Failed:
    if isinstance(error, TrainingError):
        return error.to_failed()
    if durable.is_full(error):
        return durable.storage_full("a file").to_failed()
    text = " ".join(str(error).split())[:500]
    if _is_out_of_memory(error):
        return TrainingError(
            "OUT_OF_MEMORY",
            f"the device has too little memory for this job: {text or type(error).__name__}",
            "lower max_length or batch_size, choose bfloat16 or LoRA, or take a smaller base model",
        ).to_failed()
    return TrainingError(
        "INTERNAL", f"{type(error).__name__}: {text}", "the trainer's log has the traceback"
    ).to_failed()


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's, the device's (torch.OutOfMemoryError is a RuntimeError) or the CPU's."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _OUT_OF_MEMORY_TEXTS)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m luthier_trainer.main ATTEMPT_DIR")
    set_up_libraries()
    sys.exit(run_attempt(Path(sys.argv[1]), {}))
