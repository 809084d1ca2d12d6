"""luthierd: puts the parts together, serves until it is told to stop, and leaves in order."""

import asyncio
import contextlib
import fcntl
import glob
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import structlog
from google.protobuf import json_format

from luthier.trainer.attempt import replace_file, socket_path
from luthier.trainer.v1.task_pb2 import Puppet
from luthier.v1 import datasets_pb2, fine_tuning_pb2, models_pb2
from luthier_server import __version__, logs, settings
from luthier_server.attempts import Attempts
from luthier_server.datasets import Datasets
from luthier_server.errors import LuthierError
from luthier_server.executors.local import LocalExecutor, LocalSettings
from luthier_server.grpc.serve import AddressError, GrpcServer
from luthier_server.grpc.service import DatasetService, FineTuning, ModelService
from luthier_server.grpc.watch import Watch, WatchLimits
from luthier_server.hub import Hub
from luthier_server.ids import Ids
from luthier_server.jobs import Jobs, microseconds
from luthier_server.pages import Pages
from luthier_server.registry import Registry
from luthier_server.runner import Limits
from luthier_server.scheduler import Scheduler, SchedulerSettings
from luthier_server.secrets import Secrets
from luthier_server.settings import Settings, SettingsError
from luthier_server.store.database import Database
from luthier_server.store.events import Events
from luthier_server.store.jobs import Jobs as JobRows
from luthier_server.workers import Workers

log = structlog.get_logger()
_STOP_SECONDS = 5


class DataDirInUse(Exception):
    """Another server works on this data directory."""


@contextlib.contextmanager
def _own(data_dir: Path) -> Iterator[None]:
    """Holds the data directory against a second server."""
    data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(data_dir / "luthierd.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataDirInUse(f"another luthierd works on {data_dir}: stop it, or choose another --data-dir") from None
        yield


@contextlib.asynccontextmanager
async def _wake_ups(path: Path, scheduler: Scheduler) -> AsyncIterator[None]:
    """Hears the datagrams with which trainers say that their spool has grown. All of them mean: look."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    listener.bind(str(path))
    os.chmod(path, 0o600)
    loop = asyncio.get_running_loop()

    def heard() -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                listener.recv(64)
        scheduler.wake()

    loop.add_reader(listener, heard)
    try:
        yield
    finally:
        loop.remove_reader(listener)
        listener.close()
        path.unlink(missing_ok=True)


def _devices() -> tuple[int, ...]:
    """CUDA devices of this machine, found without loading CUDA."""
    return tuple(range(len(glob.glob("/dev/nvidia[0-9]*"))))


class Daemon:
    """A server that is put together and not yet started."""

    def __init__(self, chosen: Settings, database: Database, history_id: str, last_ids: Sequence[str]) -> None:
        data_dir = chosen.data_dir
        devices = _devices()
        self.database = database
        self.hub = Hub()
        self.wake_socket = socket_path(data_dir, "wake")
        workers = Workers(chosen.trainer_python)
        datasets = Datasets(
            database,
            data_dir / "blobs",
            workers,
            Ids(last_ids[1]),
            max_bytes=chosen.max_dataset_bytes,
            clock=microseconds,
        )
        datasets.prepare()
        registry = Registry(database, data_dir / "models", workers, chosen.model_root)
        self.jobs = Jobs(
            database,
            self.hub,
            datasets,
            registry,
            data_dir / "jobs",
            job_ids=Ids(last_ids[0]),
            max_queued=chosen.max_queued,
        )
        self.executor = LocalExecutor(
            LocalSettings(data_dir, chosen.trainer_python, chosen.warmed, own_host=not chosen.external_host)
        )
        self.scheduler = Scheduler(
            SchedulerSettings(
                data_dir=data_dir,
                slots=chosen.slots or len(devices) or 1,
                devices=devices,
                threads=chosen.threads,
                wake_socket=str(self.wake_socket),
                limits=Limits(
                    cancel_grace=chosen.cancel_grace, stop_grace=chosen.stop_grace, silence=chosen.stall_timeout
                ),
                puppet=json_format.Parse(chosen.puppet, Puppet()) if chosen.puppet else None,
            ),
            self.jobs,
            Attempts(database, self.hub, self.jobs, Ids(last_ids[2])),
            datasets,
            registry,
            self.executor,
            Secrets(chosen.secrets_dir),
        )
        limits = WatchLimits(
            heartbeat=chosen.heartbeat_seconds,
            slow_consumer=chosen.slow_consumer_seconds,
            watchers=chosen.max_watchers,
        )
        watch = Watch(self.jobs, self.hub, Pages(Events(database), history_id), limits)
        self.server = GrpcServer(
            {
                fine_tuning_pb2.DESCRIPTOR.services_by_name["FineTuning"]: FineTuning(self.jobs, watch, history_id),
                datasets_pb2.DESCRIPTOR.services_by_name["Datasets"]: DatasetService(datasets),
                models_pb2.DESCRIPTOR.services_by_name["Models"]: ModelService(registry, self.jobs),
            }
        )


@contextlib.asynccontextmanager
async def _daemon(chosen: Settings) -> AsyncIterator[Daemon]:
    for folder in ("jobs", "models", "cache", "blobs"):
        (chosen.data_dir / folder).mkdir(exist_ok=True)
    database = await Database.open(chosen.data_dir / "luthier.db")
    try:
        [history] = await database.read("SELECT value FROM meta WHERE key = 'history_id'")
        last_ids = [
            (await database.read(f"SELECT coalesce(max(id), '') AS id FROM {table}"))[0]["id"]
            for table in ("jobs", "datasets", "models")
        ]
        daemon = Daemon(chosen, database, history["value"], last_ids)
        try:
            yield daemon
        finally:
            await daemon.executor.close()
    finally:
        await database.close()


async def _run(chosen: Settings) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with _daemon(chosen) as daemon, _wake_ups(daemon.wake_socket, daemon.scheduler):
        await daemon.executor.prepare()
        await daemon.scheduler.recover(await JobRows(daemon.database).open_attempts())
        port = await daemon.server.start(chosen.listen)
        host = chosen.listen.rpartition(":")[0]
        address = chosen.listen if host == "unix" else f"{host}:{port}"
        replace_file(chosen.data_dir / "address", address.encode())
        log.info("serving", address=address, data_dir=str(chosen.data_dir), version=__version__)
        scheduling = asyncio.create_task(daemon.scheduler.run(), name="scheduler")
        stopping = asyncio.create_task(stop.wait(), name="stop")
        await asyncio.wait((scheduling, stopping), return_when=asyncio.FIRST_COMPLETED)
        if scheduling.done():
            log.error("the scheduler ended", error=repr(scheduling.exception()))
        await _leave(daemon, scheduling)
        stopping.cancel()


async def _leave(daemon: Daemon, scheduling: "asyncio.Task[None]") -> None:
    """Refuse, end the watches, stop the trainers, stop serving; the database is flushed and closed after."""
    log.info("stopping")
    daemon.server.health.set(False)
    daemon.jobs.refuse_new()
    daemon.hub.drain()
    if not scheduling.done():
        await daemon.scheduler.stop()
    await daemon.server.stop(_STOP_SECONDS)
    scheduling.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        await scheduling
    log.info("stopped")


def _health(arguments: Sequence[str]) -> int:
    """`luthierd health`: 0 when the server of these settings serves."""
    import grpc
    from grpc_health.v1 import health_pb2

    address = settings.read(arguments, os.environ).listen
    with grpc.insecure_channel(address) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        try:
            answer = check(health_pb2.HealthCheckRequest(), timeout=3)
        except grpc.RpcError as error:
            sys.stderr.write(f"{address}: {error.code().name}\n")
            return 1
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    sys.stdout.write(f"{address}: {status}\n")
    return 0 if answer.status == health_pb2.HealthCheckResponse.SERVING else 1


def main() -> None:
    """The command luthierd."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["--version"]:
        sys.stdout.write(f"luthierd {__version__}\n")
        return
    try:
        if arguments[:1] == ["health"]:
            raise SystemExit(_health(arguments[1:]))
        chosen = settings.read(arguments[1:] if arguments[:1] == ["serve"] else arguments, os.environ)
        logs.configure(chosen.log_level)
        with _own(chosen.data_dir):
            asyncio.run(_run(chosen))
    except (SettingsError, DataDirInUse, AddressError, LuthierError) as error:
        sys.stderr.write(f"luthierd: {error}\n")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
