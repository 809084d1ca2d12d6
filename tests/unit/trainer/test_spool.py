"""The spool: dense, whole, synced when it must be, and never torn by a full disk."""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from unit.trainer.attempts import kinds, read_spool

from luthier.trainer import attempt
from luthier.trainer.v1 import report_pb2
from luthier.v1 import event_pb2, job_pb2
from luthier_trainer.report import Payload, checkpoint_directory, checkpoint_step, trainer_report
from luthier_trainer.spool import SpoolReporter


def test_every_payload_of_the_contract_can_be_reported() -> None:
    fields = report_pb2.TrainerReport.DESCRIPTOR.oneofs_by_name["payload"].fields
    modules = {"luthier.v1": event_pb2, "luthier.trainer.v1": report_pb2}
    for field in fields:
        assert field.message_type is not None
        package, _, name = field.message_type.full_name.rpartition(".")
        payload: Payload = getattr(modules[package], name)()
        record = trainer_report(payload, 7)
        assert record.WhichOneof("payload") == field.name
        assert record.sequence == 7
        assert abs(record.time.ToNanoseconds() / 1e9 - time.time()) < 5


def test_a_message_that_is_no_payload_is_refused() -> None:
    with pytest.raises(KeyError):
        trainer_report(job_pb2.JobError(), 1)  # type: ignore[arg-type]


def test_reports_of_two_threads_stay_whole_and_dense(tmp_path: Path) -> None:
    reporter = SpoolReporter(tmp_path, "")

    def beat() -> None:
        for _ in range(200):
            reporter.report(report_pb2.Heartbeat())

    threads = [threading.Thread(target=beat) for _ in range(4)]
    for thread in threads:
        thread.start()
    for step in range(200):
        reporter.report(event_pb2.LogEmitted(message="x" * step))
    for thread in threads:
        thread.join()
    reporter.close()
    reports = read_spool(tmp_path)
    assert [report.sequence for report in reports] == list(range(1, 1001))
    assert [len(r.log_emitted.message) for r in reports if r.HasField("log_emitted")] == list(range(200))


def test_a_torn_record_at_the_end_is_not_read(tmp_path: Path) -> None:
    reporter = SpoolReporter(tmp_path, "")
    for _ in range(3):
        reporter.report(event_pb2.LogEmitted(message="whole"))
    reporter.close()
    whole = (tmp_path / attempt.SPOOL).read_bytes()
    *_, (_, end) = attempt.frames(whole)
    assert end == len(whole)
    torn = attempt.frame(report_pb2.TrainerReport(sequence=4).SerializeToString())
    for cut in range(len(torn)):
        assert len(list(attempt.frames(whole + torn[:cut]))) == 3
    assert len(list(attempt.frames(whole + torn))) == 4
    assert len(list(attempt.frames(whole + torn[:-1] + bytes([torn[-1] ^ 1])))) == 3


def test_a_spool_that_was_begun_is_not_continued(tmp_path: Path) -> None:
    reporter = SpoolReporter(tmp_path, "")
    reporter.report(report_pb2.Heartbeat())
    reporter.close()
    with pytest.raises(FileExistsError):
        SpoolReporter(tmp_path, "")


def test_durable_reports_are_synced_and_others_at_most_every_200_ms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    really = os.fdatasync

    def count(fd: int) -> None:
        synced.append(fd)
        really(fd)

    monkeypatch.setattr(os, "fdatasync", count)
    reporter = SpoolReporter(tmp_path, "")
    reporter.report(report_pb2.Started(), durable=True)
    assert len(synced) == 1
    start = time.monotonic()
    for _ in range(50):
        reporter.report(report_pb2.Heartbeat())
    assert len(synced) <= 1 + (time.monotonic() - start) // 0.2 + 1
    time.sleep(0.21)
    before = len(synced)
    reporter.report(report_pb2.Heartbeat())
    assert len(synced) == before + 1
    reporter.report(report_pb2.Stopped(), durable=True)
    assert len(synced) == before + 2
    reporter.close()


def test_a_full_disk_leaves_no_torn_tail_and_a_shorter_last_report_still_fits(tmp_path: Path) -> None:
    program = """
import resource, sys
from pathlib import Path
from luthier.v1 import event_pb2
from luthier_trainer.errors import TrainingError
from luthier_trainer.spool import SpoolReporter

resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
reporter = SpoolReporter(Path(sys.argv[1]), "")
try:
    for _ in range(20):
        reporter.report(event_pb2.LogEmitted(message="x" * 1500))
except TrainingError as error:
    assert error.reason == "STORAGE_FULL" and error.retryable
    reporter.report(error.to_failed(), durable=True)
    sys.exit(3)
"""
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)], timeout=60).returncode == 3
    reports = read_spool(tmp_path)
    assert kinds(reports) == ["log_emitted"] * 6 + ["failed"]
    assert [report.sequence for report in reports] == list(range(1, 8))
    spool = (tmp_path / attempt.SPOOL).read_bytes()
    *_, (_, end) = attempt.frames(spool)
    assert end == len(spool)


def test_a_wake_socket_that_is_gone_or_full_holds_nothing_up(tmp_path: Path) -> None:
    path = tmp_path / "wake"
    wake = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    wake.bind(str(path))
    wake.settimeout(5)
    attempt_dir = tmp_path / "job_1" / "attempt-1"
    attempt_dir.mkdir(parents=True)
    reporter = SpoolReporter(attempt_dir, str(path))
    reporter.report(report_pb2.Heartbeat())
    assert wake.recv(100) == b"job_1"
    for _ in range(2000):  # nobody reads: far more than the socket's queue holds
        reporter.report(report_pb2.Heartbeat())
    wake.close()
    reporter.report(report_pb2.Heartbeat())
    path.unlink()
    reporter.report(report_pb2.Heartbeat())
    reporter.close()
    assert len(read_spool(attempt_dir)) == 2003


def test_a_checkpoints_directory_tells_its_step_and_nothing_else_does() -> None:
    assert checkpoint_directory(200, 1) == "000200-a1"
    assert checkpoint_step("000200-a1") == 200
    assert checkpoint_step(checkpoint_directory(12_345_678, 12)) == 12_345_678
    for name in ("", "200", "000200", "000200-a", "../000200-a1", "000200-a1/", "٠٠٠٢٠٠-a1"):
        with pytest.raises(ValueError, match="no checkpoint"):
            checkpoint_step(name)
