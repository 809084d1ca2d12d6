"""A luthierd in a process of its own, on loopback and in a directory that goes away."""

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from luthier.trainer.attempt import socket_path
from luthier.trainer.v1.host_pb2 import HostRequest, HostResponse, ListTrainers
from luthier.v1 import datasets_pb2 as ds
from luthier.v1 import datasets_pb2_grpc, fine_tuning_pb2_grpc
from luthier.v1 import fine_tuning_pb2 as ft
from luthier.v1.job_pb2 import FineTuneTask, Hyperparameters, Job, JobSpec, JobState

_POLL = 0.002
_PART = 1024 * 1024


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """The condition's first truthy value, looked for every 2 ms. Raises TimeoutError."""
    deadline = time.perf_counter() + seconds
    while not (value := condition()):
        if time.perf_counter() > deadline:
            raise TimeoutError(f"{what} did not come within {seconds:.0f} s")
        time.sleep(_POLL)
    return value


class Daemon:
    """A luthierd that serves. `start_seconds`: from exec to SERVING."""

    def __init__(self, data_dir: Path, *flags: str) -> None:
        self.data_dir = data_dir
        command = [sys.executable, "-m", "luthier_server.main", "--listen", "127.0.0.1:0"]
        command += ["--data-dir", str(data_dir), "--log-level", "warning", "--stop-trainers", *flags]
        address = data_dir / "address"
        with open(data_dir / "luthierd.log", "ab") as log:
            begin = time.perf_counter()
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            until(lambda: address.exists() or self.process.poll() is not None, 60, "luthierd's address")
            if self.process.poll() is not None:
                raise RuntimeError(f"luthierd ended: {(data_dir / 'luthierd.log').read_text()[-500:]}")
            self.address = address.read_text()
            self.channel = grpc.insecure_channel(self.address)
            until(self._serves, 60, "SERVING")
            self.start_seconds = time.perf_counter() - begin
        except BaseException:
            self.process.kill()
            raise
        self.fine_tuning = fine_tuning_pb2_grpc.FineTuningStub(self.channel)
        self.datasets = datasets_pb2_grpc.DatasetsStub(self.channel)

    def _serves(self) -> bool:
        check = self.channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        try:
            answer = check(health_pb2.HealthCheckRequest(), timeout=5, wait_for_ready=True)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def upload(self, name: str, rows: int = 40, seed: int = 0) -> None:
        """A dataset of its own for each seed."""
        content = "".join(
            json.dumps({"prompt": f"number {seed} {row}", "completion": f"it is {row}"}) + "\n" for row in range(rows)
        )
        self.upload_file(name, content.encode())

    def upload_file(self, name: str, content: bytes) -> None:
        """A dataset of these bytes."""

        def parts() -> Iterator[ds.UploadDatasetRequest]:
            yield ds.UploadDatasetRequest(metadata=ds.DatasetMetadata(name=name))
            for start in range(0, len(content), _PART):
                yield ds.UploadDatasetRequest(chunk=content[start : start + _PART])

        self.datasets.UploadDataset(parts())

    def create(self, dataset: str, **hyperparameters: Any) -> Job:
        """A job on builtin/tiny."""
        return self.fine_tuning.CreateJob(ft.CreateJobRequest(spec=small(dataset, **hyperparameters))).job

    def get(self, job_id: str) -> Job:
        """The job now."""
        return self.fine_tuning.GetJob(ft.GetJobRequest(job_id=job_id)).job

    def wait(self, job_id: str, seconds: float = 60) -> Job:
        """The job at its end. Raises RuntimeError unless it succeeded."""
        for _ in self.fine_tuning.WatchJob(ft.WatchJobRequest(job_id=job_id), timeout=seconds):
            pass
        job = self.get(job_id)
        if job.state != JobState.JOB_STATE_SUCCEEDED:
            raise RuntimeError(f"the job ended {JobState.Name(job.state)}: {job.error.message}")
        return job

    def host(self) -> HostResponse:
        """What the trainer host says. Raises OSError when there is none."""
        body = HostRequest(list=ListTrainers()).SerializeToString()
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(str(socket_path(self.data_dir, "host")))
            connection.sendall(struct.pack("<I", len(body)) + body)
            with connection.makefile("rb") as answer:
                (length,) = struct.unpack("<I", answer.read(4))
                return HostResponse.FromString(answer.read(length))

    def close(self) -> None:
        """Ends the server, its trainer host and what that one started."""
        self.channel.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout=40)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        with contextlib.suppress(OSError, struct.error):
            host = self.host()
            for trainer in host.trainers:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(trainer.pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                os.kill(host.host_pid, signal.SIGTERM)


def process_cpu_seconds(pid: int) -> float:
    """Processor time of a process so far, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mib(pid: int) -> dict[str, float]:
    """Resident memory: `rss` all pages, `pss` with shared pages divided among who shares them, `uss` the process's
    own."""
    kib: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split(":")
        kib[name] = int(value.split()[0])
    own = kib["Private_Clean"] + kib["Private_Dirty"]
    return {"rss": kib["Rss"] / 1024, "pss": kib["Pss"] / 1024, "uss": own / 1024}


def small(dataset: str, **hyperparameters: Any) -> JobSpec:
    """The spec of a small job."""
    numbers = Hyperparameters(**({"max_steps": 2, "batch_size": 4} | hyperparameters))
    return JobSpec(fine_tune=FineTuneTask(base_model="builtin/tiny", training_dataset=dataset, hyperparameters=numbers))


def puppet(steps: int, step_seconds: float) -> tuple[str, ...]:
    """Flags of a luthierd whose trainers compute nothing: real host, lock, spool and reports, no torch."""
    return "--warm", "off", "--puppet", json.dumps({"steps": steps, "step_seconds": step_seconds})


@contextlib.contextmanager
def daemon(*flags: str) -> Iterator[Daemon]:
    """A luthierd with an empty data directory."""
    with tempfile.TemporaryDirectory(prefix="luthier-bench-", ignore_cleanup_errors=True) as folder:
        running = Daemon(Path(folder), *flags)
        try:
            yield running
        finally:
            running.close()
