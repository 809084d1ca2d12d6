"""A real export of a real (tiny) model through a real luthierd: written, proven, downloaded and loaded."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemon import Daemon, dense, kinds, small
from unit.trainer.publishing import SECRET, s3_server

from luthier.v1 import models_pb2 as md
from luthier.v1.event_pb2 import JobEvent, Phase
from luthier.v1.export_task_pb2 import (
    AdapterExport,
    ExportDestination,
    ExportTask,
    GgufExport,
    MergedExport,
    WeightType,
)
from luthier.v1.job_pb2 import Checkpoints, Dtype, Hyperparameters, Job, JobState, Lora

ROWS = b"".join(b'{"prompt": "What follows %d?", "completion": "It is %d."}\n' % (n, n + 1) for n in range(40))


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that exports may be copied into."""
    return tmp_path_factory.mktemp("shelf")


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the operator's secrets."""
    return tmp_path_factory.mktemp("secrets")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, shelf: Path, secrets: Path) -> Iterator[Daemon]:
    flags = ["--threads", "1", "--export-root", str(shelf), "--secrets-dir", str(secrets)]
    daemon = Daemon(tmp_path_factory.mktemp("real"), flags).start()
    daemon.upload(ROWS)
    yield daemon
    daemon.close()


@pytest.fixture(scope="module")
def job_id(daemon: Daemon) -> str:
    numbers = Hyperparameters(max_steps=4, batch_size=8, learning_rate=1e-2, dtype=Dtype.DTYPE_FLOAT32)
    spec = small(hyperparameters=numbers, lora=Lora(rank=4), checkpoints=Checkpoints(every_steps=2))
    job = daemon.wait(daemon.create(spec).id)
    assert job.state == JobState.JOB_STATE_SUCCEEDED, job.error
    return job.id


def run(daemon: Daemon, task: ExportTask) -> tuple[str, list[JobEvent]]:
    """The id of an export that succeeded, and its job's events."""
    job = daemon.models.ExportModel(md.ExportModelRequest(export=task)).job
    events = list(daemon.watch(job.id))
    ended = daemon.get(job.id)
    assert ended.state == JobState.JOB_STATE_SUCCEEDED, ended.error
    return ended.export_id, events


def test_a_merged_model_is_proven_by_what_loads_it_and_lies_where_it_shall(
    daemon: Daemon, job_id: str, shelf: Path
) -> None:
    copy = shelf / "tiny"
    task = ExportTask(
        model=daemon.get(job_id).model_id,
        merged=MergedExport(weights=WeightType.WEIGHT_TYPE_F32),
        destination=ExportDestination(uri=copy.as_uri()),
    )
    export_id, events = run(daemon, task)
    assert dense(events)
    proven = [each.export_proven.proof for each in events if each.HasField("export_proven")]
    assert [each.passed for each in proven] == [True]
    phases = {each.phase_progressed.phase for each in events if each.HasField("phase_progressed")}
    assert phases >= {Phase.PHASE_EXPORTING, Phase.PHASE_PROVING, Phase.PHASE_PUBLISHING}
    export = daemon.models.GetExport(md.GetExportRequest(export_id=export_id)).export
    assert export.proof == proven[0]
    assert export.destination_uri == copy.as_uri()
    copied = {each.relative_to(copy).as_posix() for each in copy.rglob("*") if each.is_file()}
    assert copied >= {each.path for each in export.files} >= {"config.json", "README.md", "tokenizer.json"}
    assert (daemon.data_dir / "exports" / export_id / "README.md").read_text().startswith("---\n")


@pytest.mark.parametrize(
    "task", [ExportTask(adapter=AdapterExport()), ExportTask(gguf=GgufExport())], ids=["adapter", "gguf"]
)
def test_a_checkpoint_is_exported_like_a_model(daemon: Daemon, job_id: str, task: ExportTask) -> None:
    task.model = f"{job_id}:step-2"
    export_id, events = run(daemon, task)
    assert kinds(events)[-1] == "SUCCEEDED"
    export = daemon.models.GetExport(md.GetExportRequest(export_id=export_id)).export
    assert (export.model_id, export.proof.passed) == (task.model, True)


def test_a_copy_reaches_a_bucket_and_its_credentials_nothing_else(daemon: Daemon, job_id: str, secrets: Path) -> None:
    said: list[bytes] = []

    def copied(uri: str) -> Job:
        destination = ExportDestination(uri=uri, credentials_secret="store")
        task = ExportTask(model=daemon.get(job_id).model_id, adapter=AdapterExport(), destination=destination)
        job = daemon.models.ExportModel(md.ExportModelRequest(export=task)).job
        said.extend(event.SerializeToString() for event in daemon.watch(job.id))
        return daemon.get(job.id)

    with s3_server() as s3:
        (secrets / "store").write_text(s3.secret())
        missing = copied("s3://no-such-bucket/bot")
        job = copied("s3://models/team/bot")
        found = s3.below("team/bot")
    assert (missing.state, missing.error.reason) == (JobState.JOB_STATE_FAILED, "DESTINATION_FAILED")
    assert "no bucket" in missing.error.message
    assert job.state == JobState.JOB_STATE_SUCCEEDED, job.error
    export = daemon.models.GetExport(md.GetExportRequest(export_id=job.export_id)).export
    assert export.destination_uri == "s3://models/team/bot"
    kept = daemon.data_dir / "exports" / job.export_id
    assert json.loads(found["manifest.json"])["export"] == job.export_id
    assert {file.path: (kept / file.path).read_bytes() for file in export.files if file.path != "manifest.json"} == {
        path: data for path, data in found.items() if path != "manifest.json"
    }
    said += [each.read_bytes() for each in daemon.data_dir.rglob("*") if each.is_file()]
    said += [each.SerializeToString() for each in (missing, job, export)]
    assert not any(SECRET.encode() in each for each in said), "in an event, the database, a log or a file"
