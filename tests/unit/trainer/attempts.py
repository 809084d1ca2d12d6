"""Attempts on disk and a real trainer host, for the tests of the trainer's processes."""

import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from luthier.trainer import attempt
from luthier.trainer.v1 import host_pb2, report_pb2, task_pb2

JOB = "job_01JTEST"


def write_attempt(
    data_dir: Path,
    number: int = 1,
    *,
    job: str = JOB,
    steps: int = 3,
    step_seconds: float = 0.0,
    fail_at_step: int = 0,
    stubborn: bool = False,
    every_steps: int = 0,
    resume_from: str = "",
    wake_socket: str = "",
    computed_tokens: int = 0,
    heartbeat_seconds: float = 5.0,
) -> Path:
    """The directory of a puppet's attempt, ready to start."""
    job_dir = data_dir / "jobs" / job
    task = task_pb2.TrainerTask(
        job_id=job,
        attempt=number,
        checkpoints_dir=str(job_dir / "checkpoints"),
        model_dir=str(data_dir / "models" / "model_01JTEST"),
        cache_dir=str(data_dir / "cache"),
        model_id="model_01JTEST",
        resume_from=resume_from,
        wake_socket=wake_socket,
        heartbeat_seconds=heartbeat_seconds,
        computed_tokens=computed_tokens,
        puppet=task_pb2.Puppet(steps=steps, step_seconds=step_seconds, fail_at_step=fail_at_step, stubborn=stubborn),
    )
    if every_steps:
        task.spec.fine_tune.checkpoints.every_steps = every_steps
    attempt_dir = job_dir / f"attempt-{number}"
    attempt_dir.mkdir(parents=True)
    (attempt_dir / attempt.TASK).write_bytes(task.SerializeToString())
    return attempt_dir


def ask(attempt_dir: Path, action: task_pb2.ControlAction.ValueType) -> None:
    """Writes the control file, as the server does."""
    control = task_pb2.TrainerControl(action=action)
    attempt.replace_file(attempt_dir / attempt.CONTROL, control.SerializeToString())


def read_spool(attempt_dir: Path) -> list[report_pb2.TrainerReport]:
    path = attempt_dir / attempt.SPOOL
    data = path.read_bytes() if path.exists() else b""
    return [report_pb2.TrainerReport.FromString(payload) for payload, _ in attempt.frames(data)]


def kinds(reports: list[report_pb2.TrainerReport]) -> list[str]:
    return [str(report.WhichOneof("payload")) for report in reports]


def read_exit(attempt_dir: Path) -> task_pb2.TrainerExit:
    """Waits for the exit file."""
    path = attempt_dir / attempt.EXIT
    wait_for(path.exists)
    return task_pb2.TrainerExit.FromString(path.read_bytes())


def wait_for(happened: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"{happened} did not become true within {seconds} s"
        time.sleep(0.005)


def is_locked(attempt_dir: Path) -> bool:
    fd = attempt.try_lock(attempt_dir)
    if fd is None:
        return True
    os.close(fd)
    return False


def lives(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class HostConnection:
    """A client of the host that speaks its protocol over one connection."""

    def __init__(self, data_dir: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(60)
        try:
            self.socket.connect(str(attempt.socket_path(data_dir, "host")))
        except OSError:
            self.socket.close()
            raise

    def call(self, request: host_pb2.HostRequest) -> host_pb2.HostResponse:
        self.send(request)
        return self.receive()

    def send(self, request: host_pb2.HostRequest) -> None:
        payload = request.SerializeToString()
        self.socket.sendall(struct.pack("<I", len(payload)) + payload)

    def receive(self) -> host_pb2.HostResponse:
        (length,) = struct.unpack("<I", self._read(4))
        return host_pb2.HostResponse.FromString(self._read(length))

    def start(self, attempt_dir: Path, **secrets: str) -> int:
        """The new trainer's process."""
        start = host_pb2.StartTrainer(attempt_dir=str(attempt_dir), secrets=secrets)
        answer = self.call(host_pb2.HostRequest(start=start))
        assert not answer.error, answer.error
        return answer.trainers[0].pid

    def signal(self, attempt_dir: Path, number: int) -> host_pb2.HostResponse:
        request = host_pb2.SignalTrainer(attempt_dir=str(attempt_dir), signal=number)
        return self.call(host_pb2.HostRequest(signal=request))

    def list(self) -> host_pb2.HostResponse:
        return self.call(host_pb2.HostRequest(list=host_pb2.ListTrainers()))

    def quit(self) -> host_pb2.HostResponse:
        return self.call(host_pb2.HostRequest(quit=host_pb2.QuitHost()))

    def close(self) -> None:
        self.socket.close()

    def _read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.socket.recv(count - len(data))
            if not piece:
                raise EOFError("the host closed the connection")
            data += piece
        return data


@contextmanager
def running_host(data_dir: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """A host process that listens; ended, with its trainers, on leaving."""
    host = subprocess.Popen(
        [sys.executable, "-m", "luthier_trainer.host", "--data-dir", str(data_dir), *(options or ("--no-warm",))],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for(lambda: listens(data_dir))
        yield host
    finally:
        if host.poll() is None:
            host.terminate()
        host.wait(timeout=40)


def listens(data_dir: Path) -> bool:
    try:
        HostConnection(data_dir).close()
    except OSError:
        return False
    return True
