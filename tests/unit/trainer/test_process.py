"""A trainer's process: what it reports whatever happens, and what it heeds."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from unit.trainer.attempts import ask, kinds, read_spool, wait_for, write_attempt

from luthier.trainer import attempt
from luthier.trainer.v1 import report_pb2, task_pb2
from luthier_trainer import main, puppet
from luthier_trainer.control import FileControl, NoControl
from luthier_trainer.errors import TrainingError
from luthier_trainer.heartbeat import Heartbeat
from luthier_trainer.report import Payload


def _run(attempt_dir: Path) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "luthier_trainer.main", str(attempt_dir)]
    return subprocess.run(command, capture_output=True, timeout=60)


class _Reports:
    """Keeps reports in memory."""

    def __init__(self) -> None:
        self.payloads: list[Payload] = []

    def report(self, payload: Payload, *, durable: bool = False) -> None:
        self.payloads.append(payload)


def test_a_second_trainer_of_an_attempt_leaves_without_a_record(tmp_path: Path) -> None:
    attempt_dir = write_attempt(tmp_path, steps=1000, step_seconds=60)
    first = subprocess.Popen([sys.executable, "-m", "luthier_trainer.main", str(attempt_dir)])
    try:
        wait_for(lambda: len(read_spool(attempt_dir)) == 3)
        spool = (attempt_dir / attempt.SPOOL).read_bytes()
        assert _run(attempt_dir).returncode == main.EXIT_NOT_MINE
        assert (attempt_dir / attempt.SPOOL).read_bytes() == spool
    finally:
        first.kill()
        first.wait()
    assert _run(attempt_dir).returncode == main.EXIT_NOT_MINE  # its lock is free, but an attempt has one life
    assert (attempt_dir / attempt.SPOOL).read_bytes() == spool


def test_an_attempt_that_was_given_up_before_it_began_never_begins(tmp_path: Path) -> None:
    attempt_dir = write_attempt(tmp_path)
    attempt.replace_file(attempt_dir / attempt.EXIT, task_pb2.TrainerExit(signal=9).SerializeToString())
    assert _run(attempt_dir).returncode == main.EXIT_NOT_MINE
    assert not (attempt_dir / attempt.SPOOL).exists()


def test_a_failure_is_the_last_report_and_tells_its_reason(tmp_path: Path) -> None:
    attempt_dir = write_attempt(tmp_path, steps=5, fail_at_step=2)
    ran = _run(attempt_dir)
    assert ran.returncode == main.EXIT_FAILED
    reports = read_spool(attempt_dir)
    assert kinds(reports)[-3:] == ["step_completed", "step_completed", "failed"]
    assert reports[-1].failed.error.reason == "PUPPET_FAILED"
    assert b"PUPPET_FAILED" in ran.stderr


def test_a_resumed_puppet_goes_on_after_its_checkpoint_and_counts_what_was_computed(tmp_path: Path) -> None:
    first = write_attempt(tmp_path, steps=6, fail_at_step=5, every_steps=2)
    assert _run(first).returncode == main.EXIT_FAILED
    checkpoints = tmp_path / "jobs/job_01JTEST/checkpoints"
    assert sorted(os.listdir(checkpoints)) == ["000002-a1", "000004-a1"]
    resume_from = str(checkpoints / "000004-a1")
    second = write_attempt(tmp_path, 2, steps=6, every_steps=2, resume_from=resume_from, computed_tokens=5000)
    assert _run(second).returncode == main.EXIT_ENDED
    reports = read_spool(second)
    assert reports[0].started.resumed_from_step == 4
    assert reports[0].started.checkpoint == "000004-a1"
    steps = [report.step_completed for report in reports if report.HasField("step_completed")]
    assert [(step.step, step.trained_tokens, step.computed_tokens) for step in steps] == [
        (5, 5000, 6000),
        (6, 6000, 7000),
    ]
    assert sorted(os.listdir(checkpoints)) == ["000002-a1", "000004-a1", "000006-a2"]
    assert reports[-1].finished.step == 6


def test_any_other_exception_becomes_a_report_with_the_traceback_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    errors: list[tuple[BaseException, str, str]] = [
        (ZeroDivisionError("a\n b"), "INTERNAL", "ZeroDivisionError: a b"),
        (SystemExit(3), "INTERNAL", "SystemExit: 3"),
        (MemoryError(), "OUT_OF_MEMORY", "MemoryError"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "OUT_OF_MEMORY", "2 GiB"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "OUT_OF_MEMORY", "allocate"),
    ]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        for number, (error, reason, text) in enumerate(errors, start=1):
            attempt_dir = write_attempt(tmp_path, number)

            def fail(*_: object, error: BaseException = error) -> None:
                raise error

            monkeypatch.setattr(puppet, "perform", fail)
            assert main.run_attempt(attempt_dir, {}) == main.EXIT_FAILED
            failed = read_spool(attempt_dir)[-1].failed
            assert failed.error.reason == reason
            assert text in failed.error.message
            assert failed.error.hint
            assert type(error).__name__ in capfd.readouterr().err
    finally:
        for handled, handler in handlers.items():
            signal.signal(handled, handler)


def test_a_secret_stands_in_the_trainers_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    seen: list[str] = []

    def look(*_: object) -> report_pb2.Finished:
        seen.append(os.environ["HF_TOKEN"])
        return report_pb2.Finished()

    monkeypatch.setattr(puppet, "perform", look)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        assert main.run_attempt(write_attempt(tmp_path), {"HF_TOKEN": "hf_very_secret"}) == main.EXIT_ENDED
    finally:
        for handled, handler in handlers.items():
            signal.signal(handled, handler)
    assert seen == ["hf_very_secret"]


def test_nothing_is_reported_after_the_last_report_however_fast_the_heart_beats(tmp_path: Path) -> None:
    attempt_dir = write_attempt(tmp_path, steps=10, step_seconds=0.02, heartbeat_seconds=0.001)
    assert _run(attempt_dir).returncode == main.EXIT_ENDED
    names = kinds(read_spool(attempt_dir))
    assert names.count("heartbeat") >= 10
    assert names[0] == "started" and names[-1] == "finished"


def test_the_heart_beats_while_the_main_thread_is_busy() -> None:
    reports = _Reports()
    threads = threading.active_count()
    with Heartbeat(reports, 0.01):
        time.sleep(0.2)
    beats = len(reports.payloads)
    assert 5 <= beats <= 21
    assert threading.active_count() == threads
    time.sleep(0.05)
    assert len(reports.payloads) == beats


def test_control_is_read_by_interval_and_at_once_after_a_signal(tmp_path: Path) -> None:
    control = FileControl(tmp_path, interval=3600)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    control.install()
    try:
        assert control.requested() == task_pb2.CONTROL_ACTION_UNSPECIFIED
        ask(tmp_path, task_pb2.CONTROL_ACTION_PAUSE)
        assert control.requested() == task_pb2.CONTROL_ACTION_UNSPECIFIED
        os.kill(os.getpid(), signal.SIGUSR1)
        assert control.requested() == task_pb2.CONTROL_ACTION_PAUSE
        ask(tmp_path, task_pb2.CONTROL_ACTION_CANCEL)
        os.kill(os.getpid(), signal.SIGTERM)
        assert control.requested() == task_pb2.CONTROL_ACTION_CANCEL
    finally:
        for handled, handler in handlers.items():
            signal.signal(handled, handler)
    polled = FileControl(tmp_path, interval=0.05)
    (tmp_path / attempt.CONTROL).unlink()
    assert polled.requested() == task_pb2.CONTROL_ACTION_UNSPECIFIED
    ask(tmp_path, task_pb2.CONTROL_ACTION_PREEMPT)
    wait_for(lambda: polled.requested() == task_pb2.CONTROL_ACTION_PREEMPT, seconds=2)


def test_sigterm_without_a_control_file_means_preempt(tmp_path: Path) -> None:
    control = FileControl(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    control.install()
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert control.requested() == task_pb2.CONTROL_ACTION_UNSPECIFIED
        os.kill(os.getpid(), signal.SIGTERM)
        assert control.requested() == task_pb2.CONTROL_ACTION_PREEMPT
    finally:
        for handled, handler in handlers.items():
            signal.signal(handled, handler)


def test_a_puppet_that_is_stopped_before_its_first_step_leaves_no_checkpoint(tmp_path: Path) -> None:
    attempt_dir = write_attempt(tmp_path, steps=10, step_seconds=60)
    ask(attempt_dir, task_pb2.CONTROL_ACTION_CANCEL)
    assert _run(attempt_dir).returncode == main.EXIT_ENDED
    last = read_spool(attempt_dir)[-1].stopped
    assert (last.step, last.checkpoint) == (0, "")


def test_a_puppet_runs_in_the_callers_process_too(tmp_path: Path) -> None:
    attempt_dir = write_attempt(tmp_path, steps=4)
    task = task_pb2.TrainerTask.FromString((attempt_dir / attempt.TASK).read_bytes())
    reports = _Reports()
    finished = puppet.perform(task, reports, NoControl())
    assert isinstance(finished, report_pb2.Finished)
    assert finished.size_bytes == sum(path.stat().st_size for path in Path(task.model_dir).iterdir())
    losses = [payload.loss for payload in reports.payloads if hasattr(payload, "loss")]
    assert losses[0] > losses[-1] > 0


def test_a_training_error_survives_a_pickle() -> None:
    error = TrainingError("LOSS_NOT_FINITE", "the loss is not a number", "lower the learning rate", True)
    copy = pickle.loads(pickle.dumps(error))
    assert copy.to_failed() == error.to_failed()
    assert str(copy) == str(error)


def test_the_trainers_process_loads_no_torch_for_a_puppet_or_the_host() -> None:
    program = (
        "import sys, luthier_trainer, luthier_trainer.main, luthier_trainer.host;"
        "sys.exit(bool({'torch', 'numpy', 'transformers', 'grpc'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
