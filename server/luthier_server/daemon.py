"""The server, put together of its parts."""

import contextlib
import glob
from collections.abc import AsyncIterator, Sequence

from google.protobuf import json_format

from luthier.trainer.attempt import socket_path
from luthier.trainer.v1.task_pb2 import Puppet
from luthier.v1 import datasets_pb2, fine_tuning_pb2, models_pb2
from luthier_server.aliases import Aliases
from luthier_server.assignments import Assignments, AssignmentSettings
from luthier_server.attempts import Attempts
from luthier_server.cards import Cards
from luthier_server.checks import Checks
from luthier_server.data_work import DataWork, WorkLimits
from luthier_server.datasets import Datasets
from luthier_server.deletions import DEPENDENTS, Deletions
from luthier_server.derivations import Derivations
from luthier_server.estimates import Estimates, EstimateSettings
from luthier_server.executors.local import LocalExecutor, LocalSettings
from luthier_server.export_sources import ExportSources
from luthier_server.exports import Exports, dependents
from luthier_server.files import Files
from luthier_server.fitting import Fitting, FittingSettings
from luthier_server.grpc.certificate import Certificate
from luthier_server.grpc.datasets import DatasetService
from luthier_server.grpc.downloads import DownloadService
from luthier_server.grpc.exports import ExportService
from luthier_server.grpc.models import ModelParts, ModelService
from luthier_server.grpc.serve import GrpcServer
from luthier_server.grpc.service import FineTuning
from luthier_server.grpc.tokens import Tokens
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
from luthier_server.settings import Settings
from luthier_server.store.database import Database
from luthier_server.store.events import Events
from luthier_server.store.jobs import Jobs as JobRows
from luthier_server.store.models import Models as ModelRows
from luthier_server.upkeep import Upkeep, UpkeepSettings
from luthier_server.uploads import Uploads
from luthier_server.validation import Validation
from luthier_server.workers import Workers

# Every id that was handed out and is still known: also those of deleted jobs, and of models that are yet to be made.
_GIVEN_IDS = (
    "SELECT id FROM jobs UNION ALL SELECT job_id FROM tombstones UNION ALL SELECT job_id FROM models"
    " UNION ALL SELECT job_id FROM exports",
    "SELECT id FROM datasets UNION ALL SELECT dataset_id FROM job_datasets",
    "SELECT id FROM models UNION ALL SELECT model_id FROM attempts",
    "SELECT id FROM exports UNION ALL SELECT export_id FROM attempts",
)


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
async def assembled(chosen: Settings) -> AsyncIterator[Daemon]:
    """A server over the data directory of these settings, which is closed at the end."""
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
