"""luthierd: puts the parts together, serves until it is told to stop, and leaves in order."""

import asyncio
import contextlib
import fcntl
import glob
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import structlog
from google.protobuf import json_format

from luthier.trainer.attempt import replace_file, socket_path
from luthier.trainer.v1.task_pb2 import Puppet
from luthier.v1 import datasets_pb2, fine_tuning_pb2, models_pb2
from luthier_server import __version__, backup, doctor, failpoints, logs, settings
from luthier_server.aliases import Aliases
from luthier_server.assignments import Assignments, AssignmentSettings
from luthier_server.attempts import Attempts
from luthier_server.cards import Cards
from luthier_server.checks import Checks
from luthier_server.data_work import DataWork, WorkLimits
from luthier_server.datasets import Datasets
from luthier_server.deletions import DEPENDENTS, Deletions
from luthier_server.derivations import Derivations
from luthier_server.errors import LuthierError
from luthier_server.estimates import Estimates, EstimateSettings
from luthier_server.executors.local import LocalExecutor, LocalSettings
from luthier_server.export_sources import ExportSources
from luthier_server.exports import Exports, dependents
from luthier_server.files import Files
from luthier_server.fitting import Fitting, FittingSettings
from luthier_server.grpc.certificate import Certificate, CertificateError
from luthier_server.grpc.datasets import DatasetService
from luthier_server.grpc.downloads import DownloadService
from luthier_server.grpc.exports import ExportService
from luthier_server.grpc.models import ModelParts, ModelService
from luthier_server.grpc.serve import AddressError, GrpcServer
from luthier_server.grpc.service import FineTuning
from luthier_server.grpc.tokens import TokenFileError, Tokens
from luthier_server.grpc.watch import Watch, WatchLimits
from luthier_server.hub import Hub
from luthier_server.ids import Ids
from luthier_server.imports import Allowed, Imports
from luthier_server.jobs import Jobs, microseconds
from luthier_server.lanes import Lane
from luthier_server.lineage import Lineages
from luthier_server.pages import Pages
from luthier_server.references import References
from luthier_server.registrations import Registrations
from luthier_server.registry import Registry
from luthier_server.runner import Limits
from luthier_server.scheduler import Scheduler, SchedulerSettings
from luthier_server.secrets import Secrets
from luthier_server.settings import Settings, SettingsError
from luthier_server.store.database import Database
from luthier_server.store.events import Events
from luthier_server.store.jobs import Jobs as JobRows
from luthier_server.store.models import Models as ModelRows
from luthier_server.upkeep import Upkeep, UpkeepSettings
from luthier_server.uploads import Uploads
from luthier_server.validation import Validation
from luthier_server.workers import Workers

log = structlog.get_logger()
_STOP_SECONDS = 5
# Every id that was handed out and is still known: also those of deleted jobs, and of models that are yet to be made.
_GIVEN_IDS = (
    "SELECT id FROM jobs UNION ALL SELECT job_id FROM tombstones UNION ALL SELECT job_id FROM models"
    " UNION ALL SELECT job_id FROM exports",
    "SELECT id FROM datasets UNION ALL SELECT dataset_id FROM job_datasets",
    "SELECT id FROM models UNION ALL SELECT model_id FROM attempts",
    "SELECT id FROM exports UNION ALL SELECT export_id FROM attempts",
)


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
async def _wake_ups(path: Path, *woken: Scheduler | DataWork) -> AsyncIterator[None]:
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
        for each in woken:
            each.wake()

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
        uploads = Uploads(data_dir / "blobs" / "incoming", max_bytes=chosen.max_dataset_bytes)
        uploads.prepare()
        datasets = Datasets(database, data_dir / "blobs", uploads, workers, Ids(last_ids[1]), clock=microseconds)
        secrets = Secrets(chosen.secrets_dir)
        model_ids = Ids(last_ids[2])
        self.deletions = Deletions(database, data_dir / "models", (*DEPENDENTS, dependents))
        references = References(database, data_dir / "models", data_dir / "jobs")
        registry = Registry(database, data_dir / "models", workers, chosen.model_root)
        self.executor = LocalExecutor(
            LocalSettings(
                data_dir,
                chosen.trainer_python,
                chosen.warmed,
                own_host=not chosen.external_host,
                end_host=chosen.stop_trainers,
            )
        )
        self.data_work = DataWork(self.executor, data_dir / "work", str(self.wake_socket))
        self.fitting = Fitting(
            FittingSettings(
                cache_dir=data_dir / "cache",
                cache_max_bytes=chosen.cache_bytes,
                devices=devices,
                threads=chosen.threads,
                memory_limit_bytes=chosen.device_memory_bytes,
            ),
            datasets,
            self.data_work,
            secrets,
        )
        self.jobs = Jobs(
            database,
            self.hub,
            datasets,
            registry,
            references,
            data_dir / "jobs",
            data_dir / "exports",
            job_ids=Ids(last_ids[0]),
            max_queued=chosen.max_queued,
            # A puppet has no tokenizer to check anything with.
            validates=not chosen.puppet,
            fitting=None if chosen.puppet else self.fitting,
        )
        checks = Checks(
            datasets,
            registry,
            references,
            JobRows(database),
            self.data_work,
            secrets,
            data_dir / "cache",
            cache_max_bytes=chosen.cache_bytes,
            limits=WorkLimits(),
        )
        self.validation = Validation(self.jobs, checks)
        sources = ExportSources(references, registry, self.jobs)
        self.exports = Exports(
            database, self.jobs, sources, datasets, secrets, data_dir / "exports", chosen.export_root
        )
        cards = Cards(database)
        assignments = Assignments(
            AssignmentSettings(
                data_dir=data_dir,
                devices=devices,
                threads=chosen.threads,
                wake_socket=str(self.wake_socket),
                puppet=json_format.Parse(chosen.puppet, Puppet()) if chosen.puppet else None,
                cache_max_bytes=chosen.cache_bytes,
                device_memory_bytes=chosen.device_memory_bytes,
                llama_cpp_dir=chosen.llama_cpp_dir,
                export_roots=chosen.export_root,
            ),
            self.jobs,
            datasets,
            registry,
            self.exports,
            sources,
            cards,
            secrets,
        )
        attempts = Attempts(
            database,
            self.hub,
            self.jobs,
            model_ids,
            Ids(last_ids[3]),
            retry_seconds=chosen.retry_seconds,
        )
        self.scheduler = Scheduler(
            SchedulerSettings(
                data_dir=data_dir,
                slots={Lane.DEVICE: chosen.slots or len(devices) or 1, Lane.CPU: chosen.cpu_slots},
                limits=Limits(
                    cancel_grace=chosen.cancel_grace, stop_grace=chosen.stop_grace, silence=chosen.stall_timeout
                ),
            ),
            self.jobs,
            attempts,
            assignments,
            self.executor,
        )
        self.upkeep = Upkeep(
            UpkeepSettings(data_dir, retention_days=chosen.retention_days, free_bytes=chosen.free_bytes),
            database,
            self.jobs,
            uploads,
        )
        limits = WatchLimits(
            heartbeat=chosen.heartbeat_seconds,
            slow_consumer=chosen.slow_consumer_seconds,
            watchers=chosen.max_watchers,
        )
        allowed = Allowed(
            hosts=chosen.import_host,
            networks=chosen.import_network,
            buckets=chosen.import_bucket,
            roots=chosen.import_root,
            max_bytes=chosen.max_dataset_bytes,
        )
        dataset_service = DatasetService(
            datasets,
            Imports(datasets, uploads, workers, secrets, allowed),
            Derivations(datasets, uploads, workers),
            checks,
        )
        estimates = Estimates(
            EstimateSettings(chosen.price_per_device_hour, chosen.currency),
            self.jobs,
            self.fitting,
            self.scheduler,
            ModelRows(database),
        )
        watch = Watch(self.jobs, self.hub, Pages(Events(database), history_id), limits)
        self.server = GrpcServer(
            {
                fine_tuning_pb2.DESCRIPTOR.services_by_name["FineTuning"]: (
                    FineTuning(self.jobs, estimates, watch, history_id),
                ),
                datasets_pb2.DESCRIPTOR.services_by_name["Datasets"]: (dataset_service,),
                models_pb2.DESCRIPTOR.services_by_name["Models"]: (
                    ModelService(
                        ModelParts(
                            registry,
                            references,
                            Registrations(database, references, data_dir / "models", model_ids, clock=microseconds),
                            Aliases(database, clock=microseconds),
                            self.deletions,
                            Lineages(database, references, self.exports.made_of),
                            cards,
                        )
                    ),
                    ExportService(self.exports, self.jobs, history_id),
                    DownloadService(references, self.exports, Files()),
                ),
            },
            tokens=Tokens(chosen.token_file) if chosen.token_file else None,
            certificate=Certificate(chosen.tls_cert, chosen.tls_key) if chosen.tls_cert and chosen.tls_key else None,
        )


@contextlib.asynccontextmanager
async def _daemon(chosen: Settings) -> AsyncIterator[Daemon]:
    for folder in ("jobs", "models", "exports", "cache", "blobs"):
        (chosen.data_dir / folder).mkdir(exist_ok=True)
    database = await Database.open(chosen.data_dir / "luthier.db")
    try:
        [history] = await database.read("SELECT value FROM meta WHERE key = 'history_id'")
        last_ids = [
            (await database.read(f"SELECT coalesce(max(id), '') AS id FROM ({given})"))[0]["id"] for given in _GIVEN_IDS
        ]
        daemon = Daemon(chosen, database, history["value"], last_ids)
        try:
            yield daemon
        finally:
            await daemon.fitting.close()
            await daemon.executor.close()
    finally:
        await database.close()


async def _run(chosen: Settings) -> int:
    """Serves until it is told to stop: 0, or 1 when a part of the server ended by itself."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with _daemon(chosen) as daemon, _wake_ups(daemon.wake_socket, daemon.scheduler, daemon.data_work):
        await daemon.executor.prepare()
        await daemon.data_work.prepare()
        await daemon.scheduler.recover(await JobRows(daemon.database).open_attempts())
        await daemon.exports.sweep()
        await daemon.deletions.sweep()
        await failpoints.reach("before_serving")
        port = await daemon.server.start(chosen.listen)
        host = chosen.listen.rpartition(":")[0]
        address = chosen.listen if host == "unix" else f"{host}:{port}"
        replace_file(chosen.data_dir / "address", address.encode())
        log.info(
            "serving",
            address=address,
            data_dir=str(chosen.data_dir),
            version=__version__,
            tls=chosen.tls_cert is not None,
            tokens=chosen.token_file is not None,
        )
        scheduling = asyncio.create_task(daemon.scheduler.run(), name="scheduler")
        upkeep = asyncio.create_task(daemon.upkeep.run(), name="upkeep")
        validation = asyncio.create_task(daemon.validation.run(), name="validation")
        stopping = asyncio.create_task(stop.wait(), name="stop")
        await asyncio.wait((scheduling, upkeep, validation, stopping), return_when=asyncio.FIRST_COMPLETED)
        broken = [part for part in (scheduling, upkeep, validation) if part.done()]
        for part in broken:
            log.error("a part of the server ended", part=part.get_name(), error=repr(part.exception()))
        validation.cancel()
        await asyncio.wait([validation])
        await _leave(daemon, scheduling, stop_trainers=chosen.stop_trainers)
        upkeep.cancel()
        stopping.cancel()
    return 1 if broken else 0


async def _leave(daemon: Daemon, scheduling: "asyncio.Task[None]", *, stop_trainers: bool) -> None:
    """Refuse, end the watches, leave the trainers to the next server, stop serving; the database is closed after."""
    log.info("stopping")
    daemon.server.health.set(False)
    daemon.jobs.refuse_new()
    daemon.hub.drain()
    if stop_trainers and not scheduling.done():
        await daemon.scheduler.stop()
    await daemon.server.stop(_STOP_SECONDS)
    scheduling.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        await scheduling
    log.info("stopped")


def _health(arguments: Sequence[str]) -> int:
    """`luthierd health`: 0 when the server of these settings serves."""
    from luthier_server import probe

    return probe.health(settings.read(arguments, os.environ))


_UNUSABLE = (AddressError, CertificateError, TokenFileError)
_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "health": _health,
    "backup": backup.backup_command,
    "restore": backup.restore_command,
    "doctor": doctor.command,
}


def main() -> None:
    """The command luthierd."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["--version"]:
        sys.stdout.write(f"luthierd {__version__}\n")
        return
    try:
        if arguments and arguments[0] in _COMMANDS:
            raise SystemExit(_COMMANDS[arguments[0]](arguments[1:]))
        chosen = settings.read(arguments[1:] if arguments[:1] == ["serve"] else arguments, os.environ)
        logs.configure(chosen.log_level)
        with _own(chosen.data_dir):
            code = asyncio.run(_run(chosen))
        if code:
            raise SystemExit(code)
    except (SettingsError, backup.BackupError, DataDirInUse, *_UNUSABLE, LuthierError) as error:
        sys.stderr.write(f"luthierd: {error}\n")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
