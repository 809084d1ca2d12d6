"""A real luthierd in a process of its own, for tests: started, stopped, killed, started again on the same data."""

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from luthier.trainer.attempt import socket_path
from luthier.trainer.v1.host_pb2 import HostRequest, HostResponse, ListTrainers
from luthier.v1 import datasets_pb2 as ds
from luthier.v1 import datasets_pb2_grpc, fine_tuning_pb2_grpc, models_pb2_grpc
from luthier.v1 import fine_tuning_pb2 as ft
from luthier.v1.dataset_pb2 import Dataset
from luthier.v1.event_pb2 import JobEvent
from luthier.v1.job_pb2 import FineTuneTask, Job, JobSpec, JobState

ROWS = b"".join(b'{"prompt": "number %d", "completion": "is %d"}\n' % (n, n) for n in range(40))


def until(condition: Callable[[], Any], seconds: float = 20, what: str = "the condition") -> Any:
    """Returns the condition's first truthy value; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not come within {seconds} s"
        time.sleep(0.02)
    return value


@dataclass
class Daemon:
    """A luthierd on a data directory, with stubs for its services."""

    data_dir: Path
    flags: Sequence[str] = ()
    limit_file_kib: int = 0
    environment: dict[str, str] = field(default_factory=dict)
    credentials: grpc.ChannelCredentials | None = None
    channel_options: Sequence[tuple[str, Any]] = ()

    def start(self) -> "Daemon":
        """Starts it and waits until it serves."""
        (self.data_dir / "address").unlink(missing_ok=True)
        command = [sys.executable, "-m", "luthier_server.main", "--listen", "127.0.0.1:0"]
        command += ["--data-dir", str(self.data_dir), *self.flags]
        if self.limit_file_kib:
            command = ["bash", "-c", f'ulimit -f {self.limit_file_kib} && exec "$@"', "-", *command]
        self.data_dir.mkdir(parents=True, exist_ok=True)
        with open(self.data_dir / "luthierd.log", "ab") as output:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=os.environ | self.environment
            )
        address = self.data_dir / "address"
        until(lambda: address.exists() or self.process.poll() is not None, what="the address of luthierd")
        assert self.process.poll() is None, self.log()
        self.address = address.read_text()
        self.channel = (
            grpc.secure_channel(self.address, self.credentials, self.channel_options)
            if self.credentials is not None
            else grpc.insecure_channel(self.address)
        )
        grpc.channel_ready_future(self.channel).result(timeout=10)
        self.fine_tuning = fine_tuning_pb2_grpc.FineTuningStub(self.channel)
        self.datasets = datasets_pb2_grpc.DatasetsStub(self.channel)
        self.models = models_pb2_grpc.ModelsStub(self.channel)
        return self

    def log(self) -> str:
        """What it has printed."""
        return (self.data_dir / "luthierd.log").read_text()

    def stop(self) -> int:
        """SIGTERM; returns its exit code."""
        self.channel.close()
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=40)

    def kill(self) -> None:
        """SIGKILL."""
        self.channel.close()
        self.process.kill()
        self.process.wait()

    def host(self) -> HostResponse:
        """What the trainer host says of its trainers."""
        body = HostRequest(list=ListTrainers()).SerializeToString()
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(str(socket_path(self.data_dir, "host")))
            connection.sendall(struct.pack("<I", len(body)) + body)
            with connection.makefile("rb") as answer:
                (length,) = struct.unpack("<I", answer.read(4))
                return HostResponse.FromString(answer.read(length))

    def close(self) -> None:
        """Ends whatever is left of it, the trainer host and its trainers included."""
        if getattr(self, "process", None) is not None and self.process.poll() is None:
            self.stop()
        with contextlib.suppress(OSError, struct.error):
            host = self.host()
            for trainer in host.trainers:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(trainer.pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                os.kill(host.host_pid, signal.SIGTERM)

    def upload(self, content: bytes = ROWS, name: str = "rows", chunk: int = 65536) -> Dataset:
        """Uploads a file."""

        def parts() -> Iterator[ds.UploadDatasetRequest]:
            yield ds.UploadDatasetRequest(metadata=ds.DatasetMetadata(name=name))
            for start in range(0, len(content), chunk):
                yield ds.UploadDatasetRequest(chunk=content[start : start + chunk])

        return self.datasets.UploadDataset(parts()).dataset

    def create(self, spec: JobSpec | None = None, request_id: str = "") -> Job:
        """Creates a job, by default a small one on the dataset `rows`."""
        return self.fine_tuning.CreateJob(ft.CreateJobRequest(spec=spec or small(), request_id=request_id)).job

    def get(self, job_id: str) -> Job:
        """The job now."""
        return self.fine_tuning.GetJob(ft.GetJobRequest(job_id=job_id)).job

    def watch(self, job_id: str, after: int = 0) -> Iterator[JobEvent]:
        """The job's events until the end."""
        for response in self.fine_tuning.WatchJob(ft.WatchJobRequest(job_id=job_id, after_sequence=after), timeout=90):
            yield from response.events

    def wait_for_step(self, job_id: str, step: int) -> None:
        """Returns once the job has made that step."""
        until(lambda: self.get(job_id).progress.step >= step, 60, f"step {step}")

    def wait(self, job_id: str) -> Job:
        """The job at its end."""
        for _ in self.watch(job_id):
            pass
        return self.get(job_id)


def small(**task: Any) -> JobSpec:
    """A spec of few words; fields of the task by name."""
    return JobSpec(fine_tune=FineTuneTask(**({"base_model": "builtin/tiny", "training_dataset": "rows"} | task)))


def puppet(steps: int = 20, step_seconds: float = 0.02, **more: Any) -> list[str]:
    """Flags of a luthierd whose trainers compute nothing: real host, lock, spool, signals."""
    settings = {"steps": steps, "step_seconds": step_seconds} | more
    return ["--warm", "off", "--puppet", json.dumps(settings)]


def kinds(events: Iterable[JobEvent]) -> list[str]:
    """The payload of each event by name, states spelled out."""
    return [
        JobState.Name(event.state_changed.state).removeprefix("JOB_STATE_")
        if event.HasField("state_changed")
        else str(event.WhichOneof("payload"))
        for event in events
    ]


def dense(events: Sequence[JobEvent]) -> bool:
    """Whether the sequences are 1, 2, 3, ..."""
    return [event.sequence for event in events] == list(range(1, len(events) + 1))


def details(error: grpc.RpcError) -> dict[str, Any]:
    """The details of a status by the name of their type."""
    found: dict[str, Any] = {}
    trailers: Any = error.trailing_metadata() or ()
    for key, value in trailers:
        if key == "grpc-status-details-bin":
            for packed in status_pb2.Status.FromString(value).details:
                name = packed.type_url.rpartition(".")[2]
                message = getattr(error_details_pb2, name)()
                packed.Unpack(message)
                assert name not in found, f"two details of type {name}"
                found[name] = message
    return found


def reason(error: grpc.RpcError) -> str:
    """The stable reason of an error."""
    return str(details(error)["ErrorInfo"].reason)
