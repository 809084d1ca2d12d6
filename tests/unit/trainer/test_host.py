"""The trainer host: what it starts, what it refuses, what it outlives."""

import os
import signal
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from unit.trainer.attempts import (
    HostConnection,
    ask,
    is_locked,
    kinds,
    listens,
    lives,
    read_exit,
    read_spool,
    running_host,
    wait_for,
    write_attempt,
)

from luthier.trainer import attempt
from luthier.trainer.v1 import host_pb2, task_pb2


@pytest.fixture
def host(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    with running_host(tmp_path) as process:
        yield process


@pytest.fixture
def connection(host: subprocess.Popen[bytes], tmp_path: Path) -> Iterator[HostConnection]:
    client = HostConnection(tmp_path)
    yield client
    client.close()


def _refusal(connection: HostConnection, attempt_dir: str | Path) -> str:
    start = host_pb2.StartTrainer(attempt_dir=str(attempt_dir))
    answer = connection.call(host_pb2.HostRequest(start=start))
    assert not answer.trainers
    return answer.error


def test_a_started_trainer_holds_its_lock_and_its_spool_is_dense(connection: HostConnection, tmp_path: Path) -> None:
    attempt_dir = write_attempt(tmp_path, steps=20, step_seconds=0.02, every_steps=10)
    pid = connection.start(attempt_dir)
    wait_for(lambda: len(read_spool(attempt_dir)) >= 3)
    assert is_locked(attempt_dir)
    assert [trainer.pid for trainer in connection.list().trainers] == [pid]

    ended = read_exit(attempt_dir)
    assert (ended.code, ended.signal) == (0, 0)
    assert not is_locked(attempt_dir)
    reports = read_spool(attempt_dir)
    assert [report.sequence for report in reports] == list(range(1, len(reports) + 1))
    assert kinds(reports)[0] == "started" and reports[0].started.pid == pid
    assert kinds(reports)[-1] == "finished"
    assert [report.step_completed.step for report in reports if report.HasField("step_completed")] == list(range(1, 21))
    assert sorted(os.listdir(tmp_path / "jobs/job_01JTEST/checkpoints")) == ["000010-a1", "000020-a1"]
    assert (tmp_path / "models/model_01JTEST/luthier.json").exists()
    assert not connection.list().trainers


def test_a_killed_trainer_leaves_an_exit_with_its_signal_and_wakes_the_server(
    host: subprocess.Popen[bytes], connection: HostConnection, tmp_path: Path
) -> None:
    wake = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    wake.bind(str(tmp_path / "wake"))
    wake.settimeout(20)
    attempt_dir = write_attempt(tmp_path, steps=1000, step_seconds=60, wake_socket=str(tmp_path / "wake"))
    pid = connection.start(attempt_dir)
    wait_for(lambda: len(read_spool(attempt_dir)) == 3)
    for _ in range(3):
        assert wake.recv(100) == b"job_01JTEST"
    os.kill(pid, signal.SIGKILL)
    assert wake.recv(100) == b"job_01JTEST"  # from the host: the exit file is there by then
    ended = task_pb2.TrainerExit.FromString((attempt_dir / attempt.EXIT).read_bytes())
    assert (ended.code, ended.signal) == (0, signal.SIGKILL)
    assert kinds(read_spool(attempt_dir))[-1] == "plan_resolved"
    wake.close()


def test_a_stubborn_trainer_leads_its_own_group_and_ends_by_sigkill_alone(
    connection: HostConnection, tmp_path: Path
) -> None:
    attempt_dir = write_attempt(tmp_path, steps=1000, step_seconds=0.05, stubborn=True)
    pid = connection.start(attempt_dir)
    wait_for(lambda: "step_completed" in kinds(read_spool(attempt_dir)))
    ask(attempt_dir, task_pb2.CONTROL_ACTION_CANCEL)
    assert not connection.signal(attempt_dir, signal.SIGTERM).error
    before = len(read_spool(attempt_dir))
    wait_for(lambda: len(read_spool(attempt_dir)) > before + 2)
    assert os.getpgid(pid) == os.getsid(pid) == pid
    assert not connection.signal(attempt_dir, signal.SIGKILL).error
    assert read_exit(attempt_dir).signal == signal.SIGKILL
    assert connection.signal(attempt_dir, signal.SIGKILL).error == "no such trainer lives"


@pytest.mark.parametrize(
    ("action", "number"),
    [
        (task_pb2.CONTROL_ACTION_CANCEL, signal.SIGTERM),
        (task_pb2.CONTROL_ACTION_PAUSE, signal.SIGUSR1),
        (None, signal.SIGTERM),
    ],
)
def test_a_trainer_that_is_asked_to_leave_saves_a_checkpoint_first(
    connection: HostConnection, tmp_path: Path, action: task_pb2.ControlAction.ValueType | None, number: signal.Signals
) -> None:
    attempt_dir = write_attempt(tmp_path, steps=1000, step_seconds=0.05)
    connection.start(attempt_dir)
    wait_for(lambda: "step_completed" in kinds(read_spool(attempt_dir)))
    if action is not None:
        ask(attempt_dir, action)
    connection.signal(attempt_dir, number)
    assert read_exit(attempt_dir).code == 0
    *_, saved, stopped = read_spool(attempt_dir)
    step = stopped.stopped.step
    assert step >= 1
    assert saved.checkpoint_saved.directory == stopped.stopped.checkpoint == f"{step:06d}-a1"
    assert saved.checkpoint_saved.name == f"job_01JTEST:step-{step}"
    assert (tmp_path / "jobs/job_01JTEST/checkpoints" / stopped.stopped.checkpoint / "state.json").exists()


def test_a_trainer_lives_on_when_its_host_is_killed_and_the_next_host_can_start(tmp_path: Path) -> None:
    with running_host(tmp_path) as first:
        connection = HostConnection(tmp_path)
        attempt_dir = write_attempt(tmp_path, steps=1000, step_seconds=0.02)
        pid = connection.start(attempt_dir)
        wait_for(lambda: "step_completed" in kinds(read_spool(attempt_dir)))
        first.kill()
        first.wait()
        connection.close()
        with running_host(tmp_path):
            before = len(read_spool(attempt_dir))
            wait_for(lambda: len(read_spool(attempt_dir)) > before)
            assert is_locked(attempt_dir)
            second = HostConnection(tmp_path)
            assert not second.list().trainers
            other = write_attempt(tmp_path, job="job_OTHER")
            second.start(other)
            assert read_exit(other).code == 0
            second.close()
        ask(attempt_dir, task_pb2.CONTROL_ACTION_CANCEL)  # no host to signal it: the file alone does
        wait_for(lambda: not lives(pid))
        assert kinds(read_spool(attempt_dir))[-1] == "stopped"


def test_the_host_and_its_trainer_outlive_the_process_that_started_them(tmp_path: Path) -> None:
    attempt_dir = write_attempt(tmp_path, steps=1000, step_seconds=0.02)
    program = (
        "import subprocess, sys\n"
        "command = [sys.executable, '-m', 'luthier_trainer.host', '--no-warm', '--data-dir', sys.argv[1]]\n"
        "host = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)\n"
        "print(host.pid)\n"
    )
    starter = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, check=True)
    host_pid = int(starter.stdout)
    try:
        path = attempt.socket_path(tmp_path, "host")
        wait_for(path.exists)
        wait_for(lambda: listens(tmp_path))
        connection = HostConnection(tmp_path)
        pid = connection.start(attempt_dir)
        connection.close()
        before = len(read_spool(attempt_dir))
        wait_for(lambda: len(read_spool(attempt_dir)) > before + 3)
        again = HostConnection(tmp_path)
        assert [trainer.pid for trainer in again.list().trainers] == [pid]
        again.quit()
        again.signal(attempt_dir, signal.SIGTERM)
        again.close()
        wait_for(lambda: not lives(host_pid))
        assert not path.exists()
    finally:
        if lives(host_pid):
            os.kill(host_pid, signal.SIGTERM)


def test_a_directory_outside_jobs_is_refused(connection: HostConnection, tmp_path: Path) -> None:
    outside = write_attempt(tmp_path / "elsewhere")
    inside = write_attempt(tmp_path)
    (inside.parent / "attempt-2").symlink_to(outside)
    for name in (
        outside,
        inside.parent / "attempt-2",
        inside / "..",
        inside / "../../../elsewhere/jobs",
        "",
        "/",
        "\0",
    ):
        assert _refusal(connection, name), name
    assert read_spool(outside) == []
    connection.start(inside.parent / "../job_01JTEST/attempt-1")  # the same place by another name is no crime
    assert read_exit(inside).code == 0


def test_an_attempt_has_one_life(connection: HostConnection, tmp_path: Path) -> None:
    attempt_dir = write_attempt(tmp_path, steps=1000, step_seconds=60)
    pid = connection.start(attempt_dir)
    assert connection.start(attempt_dir) == pid  # asked again, as a server does whose answer was lost
    wait_for(lambda: len(read_spool(attempt_dir)) == 3)
    connection.signal(attempt_dir, signal.SIGKILL)
    read_exit(attempt_dir)
    assert _refusal(connection, attempt_dir) == "the attempt is over"
    assert len(read_spool(attempt_dir)) == 3


def test_a_trainer_that_finds_its_lock_held_says_nothing_and_no_exit_is_written(
    connection: HostConnection, tmp_path: Path
) -> None:
    attempt_dir = write_attempt(tmp_path)
    fd = attempt.try_lock(attempt_dir)
    assert fd is not None
    connection.start(attempt_dir)
    wait_for(lambda: not connection.list().trainers)
    os.close(fd)
    assert not (attempt_dir / attempt.SPOOL).exists()
    assert not (attempt_dir / attempt.EXIT).exists()


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack("<I", 1 << 20 | 1),
        struct.pack("<I", 0),
        struct.pack("<I", 4) + b"\xff\xff\xff\xff",
        struct.pack("<I", 2) + b"\xf8\x07",  # a well-formed message of unknown fields only
    ],
)
def test_a_client_that_sends_garbage_is_dropped_and_disturbs_nobody(
    connection: HostConnection, tmp_path: Path, garbage: bytes
) -> None:
    bad = HostConnection(tmp_path)
    half = HostConnection(tmp_path)
    half.socket.sendall(b"\x05\x00")
    bad.socket.sendall(garbage)
    assert bad.socket.recv(1) == b""
    bad.close()
    assert connection.list().host_pid
    half.socket.sendall(b"\x00\x00")
    half.close()
    assert connection.list().host_pid


def test_a_secret_reaches_no_file_and_an_odd_name_is_refused(connection: HostConnection, tmp_path: Path) -> None:
    attempt_dir = write_attempt(tmp_path, steps=1000, step_seconds=60)
    connection.start(attempt_dir, HF_TOKEN="hf_very_secret")
    wait_for(lambda: len(read_spool(attempt_dir)) == 3)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert b"hf_very_secret" not in path.read_bytes(), path
    other = write_attempt(tmp_path, job="job_OTHER")
    start = host_pb2.StartTrainer(attempt_dir=str(other), secrets={"a=b": "x"})
    assert "no name of a secret" in connection.call(host_pb2.HostRequest(start=start)).error


def test_the_socket_is_the_users_alone_and_a_second_host_leaves_at_once(
    host: subprocess.Popen[bytes], connection: HostConnection, tmp_path: Path
) -> None:
    path = attempt.socket_path(tmp_path, "host")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    second = subprocess.run(
        [sys.executable, "-m", "luthier_trainer.host", "--no-warm", "--data-dir", str(tmp_path)],
        capture_output=True,
        timeout=30,
    )
    assert second.returncode == 0
    assert b"runs on" in second.stderr
    assert connection.list().host_pid == host.pid


def test_the_host_leaves_when_idle_and_orphaned_and_not_before(tmp_path: Path) -> None:
    with running_host(tmp_path, "--no-warm", "--idle-exit", "0.2") as host:
        connection = HostConnection(tmp_path)
        with pytest.raises(subprocess.TimeoutExpired):
            host.wait(timeout=1.5)
        attempt_dir = write_attempt(tmp_path, steps=12, step_seconds=0.1)
        connection.start(attempt_dir)
        connection.close()
        assert host.wait(timeout=20) == 0
        assert kinds(read_spool(attempt_dir))[-1] == "finished"


def test_a_host_that_is_terminated_lets_its_trainers_save_and_writes_their_exits(tmp_path: Path) -> None:
    with running_host(tmp_path) as host:
        connection = HostConnection(tmp_path)
        attempts = [write_attempt(tmp_path, job=f"job_{i}", steps=1000, step_seconds=0.05) for i in range(3)]
        for attempt_dir in attempts:
            connection.start(attempt_dir)
        for attempt_dir in attempts:
            wait_for(lambda: "step_completed" in kinds(read_spool(attempt_dir)))  # noqa: B023
        host.terminate()
        assert host.wait(timeout=20) == 0
        connection.close()
    for attempt_dir in attempts:
        assert task_pb2.TrainerExit.FromString((attempt_dir / attempt.EXIT).read_bytes()).code == 0
        assert kinds(read_spool(attempt_dir))[-2:] == ["checkpoint_saved", "stopped"]


def test_a_start_is_refused_after_a_quit(connection: HostConnection, tmp_path: Path) -> None:
    running = write_attempt(tmp_path, steps=1000, step_seconds=0.05)
    connection.start(running)
    connection.quit()
    assert _refusal(connection, write_attempt(tmp_path, job="job_OTHER")) == "the host is leaving"
    connection.signal(running, signal.SIGTERM)
    assert read_exit(running).code == 0


@pytest.mark.slow
def test_a_host_that_still_warms_lists_and_lets_a_start_wait_unless_its_client_leaves(tmp_path: Path) -> None:
    given_up, waited_for = write_attempt(tmp_path), write_attempt(tmp_path, 2)
    with running_host(tmp_path, "--warm"):
        gone, waiting, listing = (HostConnection(tmp_path) for _ in range(3))
        for client, attempt_dir in ((gone, given_up), (waiting, waited_for)):
            client.send(host_pb2.HostRequest(start=host_pb2.StartTrainer(attempt_dir=str(attempt_dir))))
        gone.close()
        early = listing.list()
        assert not early.warm and not early.trainers
        answer = waiting.receive()
        assert answer.warm and not answer.error
        assert read_exit(waited_for).code == 0
        waiting.close()
        listing.close()
    assert read_spool(given_up) == []
