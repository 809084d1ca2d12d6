"""Exports are jobs of a lane of their own: created once, run beside training, adopted, cancelled without a trace."""

import os
import shutil
import sqlite3
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from daemon import Daemon, dense, details, kinds, puppet, reason, small, until

from luthier.trainer.v1.task_pb2 import TrainerTask
from luthier.v1 import fine_tuning_pb2 as ft
from luthier.v1 import models_pb2 as md
from luthier.v1.export_pb2 import Export
from luthier.v1.export_task_pb2 import (
    AdapterExport,
    ExportDestination,
    ExportTask,
    GgufExport,
    GgufType,
    MergedExport,
    WeightType,
)
from luthier.v1.job_pb2 import Checkpoints, Full, Hyperparameters, Job, JobSpec, JobState

Start = Callable[..., Daemon]
QUICK = puppet(steps=2, step_seconds=0.01)
SLOW = puppet(steps=10_000, step_seconds=0.05)
ONE_STEP = Hyperparameters(max_steps=1)
UNKNOWN = "model_01ARZ3NDEKTSV4RRFFQ69G5FAV"


def tuned(daemon: Daemon, **task: Any) -> str:
    """A finished model's id."""
    job = daemon.wait(daemon.create(small(**task)).id)
    assert job.state == JobState.JOB_STATE_SUCCEEDED, job.error
    return job.model_id


def export(daemon: Daemon, model: str, request_id: str = "", validate_only: bool = False, **task: Any) -> Job:
    fields: dict[str, Any] = {"model": model, "gguf": GgufExport()} | task
    request = md.ExportModelRequest(
        export=ExportTask(**fields),
        request_id=request_id,
        validate_only=validate_only,
    )
    return daemon.models.ExportModel(request).job


def exported(daemon: Daemon, model: str, **task: Any) -> Export:
    job = daemon.wait(export(daemon, model, **task).id)
    assert job.state == JobState.JOB_STATE_SUCCEEDED, job.error
    return daemon.models.GetExport(md.GetExportRequest(export_id=job.export_id)).export


def left(daemon: Daemon) -> list[str]:
    """What lies in the folder of exports."""
    return sorted(os.listdir(daemon.data_dir / "exports"))


def download(daemon: Daemon, name: str, path: str = "", offset: int = 0) -> tuple[list[str], dict[str, bytes]]:
    """The names in the manifest, and the bytes that came of each file."""
    request = md.DownloadModelRequest(model_id=name, from_path=path, from_offset=offset)
    names: list[str] = []
    files: dict[str, bytes] = {}
    for number, response in enumerate(daemon.models.DownloadModel(request, timeout=30)):
        assert response.HasField("manifest") == (number == 0)
        if response.HasField("manifest"):
            names = [each.path for each in response.manifest.files]
            continue
        chunk = response.chunk
        have = files.setdefault(chunk.path, b"")
        assert chunk.offset == len(have) + (offset if chunk.path == (path or names[0]) else 0)
        files[chunk.path] = have + chunk.data
    return names, files


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    roots = tmp_path_factory.mktemp("roots")
    (roots / "allowed").mkdir()
    flags = [*QUICK, "--export-root", str(roots / "allowed")]
    daemon = Daemon(tmp_path_factory.mktemp("exports"), flags, environment={"LUTHIER_SECRET_BUCKET": "key"}).start()
    daemon.upload()
    yield daemon
    daemon.close()


@pytest.fixture(scope="module")
def model(daemon: Daemon) -> str:
    return tuned(daemon)


def test_an_export_is_a_job_whose_events_end_in_what_it_made(daemon: Daemon, model: str) -> None:
    job = export(daemon, model)
    assert job.state == JobState.JOB_STATE_QUEUED
    assert job.spec.export.model == model
    events = list(daemon.watch(job.id))
    assert dense(events)
    assert kinds(events) == [
        *("QUEUED", "PREPARING", "attempt_started", "RUNNING"),
        *("phase_progressed", "phase_progressed", "export_proven", "SUCCEEDED"),
    ]
    ended = daemon.get(job.id)
    assert events[-1].state_changed.export_id == ended.export_id
    assert (ended.model_id, events[-1].state_changed.model_id) == ("", "")
    made = daemon.models.GetExport(md.GetExportRequest(export_id=ended.export_id)).export
    assert (made.model_id, made.job_id, made.proof.passed) == (model, job.id, True)
    assert {each.path for each in made.files} >= {"part-001.txt", "weights/model.bin", "manifest.json"}
    assert made.size_bytes == sum(each.size_bytes for each in made.files)
    listed = daemon.models.ListExports(md.ListExportsRequest(model_id=model)).exports
    assert made.id in [each.id for each in listed]
    assert not any(each.files for each in listed)


def test_every_default_of_an_export_stands_in_its_resolved_spec(daemon: Daemon, model: str) -> None:
    dataset = daemon.datasets.GetDataset(_dataset("rows")).dataset.id
    task = export(daemon, model, validate_only=True).resolved_spec.export
    assert (task.model, task.proof_dataset, task.proof_rows) == (model, dataset, 16)
    assert task.gguf.type == GgufType.GGUF_TYPE_F16
    merged = export(daemon, model, validate_only=True, gguf=None, merged=MergedExport()).resolved_spec.export.merged
    assert (merged.weights, merged.max_shard_bytes) == (WeightType.WEIGHT_TYPE_BF16, 5_000_000_000)
    held_out = daemon.upload(b'{"prompt": "a", "completion": "b"}\n' * 4, name="held-out").id
    evaluated = tuned(daemon, validation_dataset=held_out)
    assert export(daemon, evaluated, validate_only=True).resolved_spec.export.proof_dataset == held_out


def _dataset(name: str) -> Any:
    from luthier.v1.datasets_pb2 import GetDatasetRequest

    return GetDatasetRequest(dataset=name)


def test_a_checkpoint_is_exported_over_the_commit_of_its_base_that_its_job_was_trained_on(daemon: Daemon) -> None:
    job = daemon.wait(daemon.create(small(base_model="somebody/model", checkpoints=Checkpoints(every_steps=1))).id)
    commit = "0123456789abcdef0123456789abcdef01234567"
    with sqlite3.connect(daemon.data_dir / "luthier.db") as database:  # as a trainer that knows a hub reports it
        database.execute("UPDATE models SET base_model_revision = ? WHERE id = ?", (commit, job.model_id))
    exporting = daemon.wait(export(daemon, f"{job.id}:step-1").id)
    task = (daemon.data_dir / "jobs" / exporting.id / "attempt-1" / "task.binpb").read_bytes()
    source = TrainerTask.FromString(task).base_model
    assert (source.is_hub, source.location, source.revision) == (True, "somebody/model", commit)


def test_a_request_makes_one_export_however_often_it_is_sent(daemon: Daemon, model: str) -> None:
    request_id = str(uuid.uuid4())
    first = export(daemon, model, request_id)
    assert export(daemon, model, request_id).id == first.id
    with pytest.raises(grpc.RpcError) as other:
        export(daemon, model, request_id, proof_rows=3)
    assert reason(other.value) == "REQUEST_ID_REUSED"
    with pytest.raises(grpc.RpcError) as training:
        daemon.create(request_id=request_id)
    assert reason(training.value) == "REQUEST_ID_REUSED"
    daemon.wait(first.id)


@pytest.mark.parametrize(
    ("task", "field", "text"),
    [
        ({"model": UNKNOWN}, "export.model", "there is no model"),
        ({"model": "job_01ARZ3NDEKTSV4RRFFQ69G5FAV:step-2"}, "export.model", "there is no job"),
        ({"proof_dataset": "nothing"}, "export.proof_dataset", "there is no dataset"),
        ({"gguf": GgufExport(adapter_only=True, type=GgufType.GGUF_TYPE_Q8_0)}, "export.gguf.type", "leave it unset"),
        ({"destination": ExportDestination(uri="ftp://x/y")}, "export.destination.uri", "must start with"),
        ({"destination": ExportDestination(uri="file:///etc/x")}, "export.destination.uri", "operator allows"),
        (
            {"destination": ExportDestination(uri="s3://models/p", credentials_secret="nobody")},
            "export.destination.credentials_secret",
            "LUTHIER_SECRET_NOBODY",
        ),
    ],
)
def test_an_export_that_cannot_be_is_refused_by_the_field_that_is_wrong(
    daemon: Daemon, model: str, task: dict[str, Any], field: str, text: str
) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        export(daemon, **({"model": model} | task))
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    (violation,) = details(refused.value)["BadRequest"].field_violations
    assert violation.field == field
    assert text in violation.description


def test_every_wrong_field_is_named_at_once(daemon: Daemon, model: str) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        export(daemon, UNKNOWN, proof_dataset="nothing", destination=ExportDestination(uri="x://y"))
    fields = [each.field for each in details(refused.value)["BadRequest"].field_violations]
    assert fields == ["export.model", "export.proof_dataset", "export.destination.uri"]
    assert reason(refused.value) == "MODEL_NOT_FOUND"


def test_a_model_that_was_tuned_whole_has_no_adapter_to_export(daemon: Daemon) -> None:
    whole = tuned(daemon, full=Full())
    for task, field in (
        ({"gguf": None, "adapter": AdapterExport()}, "export.adapter"),
        ({"gguf": GgufExport(adapter_only=True)}, "export.gguf.adapter_only"),
    ):
        with pytest.raises(grpc.RpcError) as refused:
            export(daemon, whole, **task)
        assert [each.field for each in details(refused.value)["BadRequest"].field_violations] == [field]
    assert exported(daemon, whole).model_id == whole


def test_exports_are_not_created_or_estimated_as_training_is(daemon: Daemon, model: str) -> None:
    spec = JobSpec(export=ExportTask(model=model, adapter=AdapterExport()))
    for call in (
        lambda: daemon.create(spec),
        lambda: daemon.fine_tuning.EstimateJob(ft.EstimateJobRequest(spec=spec)),
    ):
        with pytest.raises(grpc.RpcError) as refused:
            call()
        (violation,) = details(refused.value)["BadRequest"].field_violations
        assert violation.field == "spec.export"
        assert "ExportModel" in violation.description


def test_a_proof_that_fails_fails_the_job_and_leaves_nothing(daemon: Daemon, model: str) -> None:
    before = left(daemon)
    job = export(daemon, model, proof_rows=13)
    events = list(daemon.watch(job.id))
    assert kinds(events)[-2:] == ["export_proven", "FAILED"]
    ended = daemon.get(job.id)
    assert (ended.error.reason, ended.export_id) == ("EXPORT_NOT_EQUAL", "")
    until(lambda: left(daemon) == before, what="an empty folder")


def test_a_download_that_goes_on_in_the_middle_of_a_file_gives_the_same_bytes(daemon: Daemon, model: str) -> None:
    made = exported(daemon, model)
    names, whole = download(daemon, made.id)
    assert names == [each.path for each in made.files]
    assert {name: len(data) for name, data in whole.items()} == {each.path: each.size_bytes for each in made.files}
    path, offset = "weights/model.bin", 300_001
    again, rest = download(daemon, made.id, path, offset)
    assert again == names
    assert list(rest) == names[names.index(path) :]
    assert rest[path] == whole[path][offset:]
    end = len(whole[path])
    assert path not in download(daemon, made.id, path, end)[1]
    _, of_model = download(daemon, model, "luthier.json", 5)
    assert of_model["luthier.json"] == download(daemon, model)[1]["luthier.json"][5:]
    for wrong, field in (((path, end + 1), "from_offset"), (("../model.bin", 0), "from_path"), (("x", 0), "from_path")):
        with pytest.raises(grpc.RpcError) as refused:
            download(daemon, made.id, *wrong)
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert [each.field for each in details(refused.value)["BadRequest"].field_violations] == [field]


def test_a_file_of_an_export_that_is_gone_ends_its_download_with_words(daemon: Daemon, model: str) -> None:
    made = exported(daemon, model)
    (daemon.data_dir / "exports" / made.id / "part-001.txt").unlink()
    with pytest.raises(grpc.RpcError) as gone:
        download(daemon, made.id)
    assert reason(gone.value) == "FILE_NOT_FOUND"


def test_a_deleted_export_is_gone_and_its_job_and_model_stay(daemon: Daemon, model: str) -> None:
    made = exported(daemon, model)
    daemon.models.DeleteExport(md.DeleteExportRequest(export_id=made.id))
    assert made.id not in left(daemon)
    for call in (
        lambda: daemon.models.GetExport(md.GetExportRequest(export_id=made.id)),
        lambda: daemon.models.DeleteExport(md.DeleteExportRequest(export_id=made.id)),
        lambda: download(daemon, made.id),
    ):
        with pytest.raises(grpc.RpcError) as gone:
            call()
        assert reason(gone.value) == "EXPORT_NOT_FOUND"
    assert daemon.get(made.job_id).state == JobState.JOB_STATE_SUCCEEDED
    daemon.models.GetModel(md.GetModelRequest(model_id=model))


def test_a_model_is_exported_by_name_and_kept_as_long_as_its_exports(daemon: Daemon) -> None:
    model = tuned(daemon, model_name="exported")
    made = exported(daemon, "exported@1")
    assert made.model_id == model
    assert "exported@1" not in (daemon.data_dir / "exports" / made.id / "part-001.txt").read_text()
    assert [each.id for each in daemon.models.ListExports(md.ListExportsRequest(model_id="exported")).exports] == [
        made.id
    ]
    lineage = daemon.models.GetModelLineage(md.GetModelLineageRequest(model_id=model))
    assert (model, made.id, "export") in [(each.from_id, each.to_id, each.relation) for each in lineage.edges]
    with pytest.raises(grpc.RpcError) as needed:
        daemon.models.DeleteModel(md.DeleteModelRequest(model_id=model))
    assert [each.subject for each in details(needed.value)["PreconditionFailure"].violations] == [made.id]
    daemon.models.DeleteExport(md.DeleteExportRequest(export_id=made.id))
    daemon.models.DeleteModel(md.DeleteModelRequest(model_id=model))


def test_an_export_outlives_its_job(daemon: Daemon, model: str) -> None:
    made = exported(daemon, model)
    daemon.fine_tuning.DeleteJob(ft.DeleteJobRequest(job_id=made.job_id))
    assert daemon.models.GetExport(md.GetExportRequest(export_id=made.id)).export == made
    download(daemon, made.id)


def runs(daemon: Daemon, job: Job) -> None:
    """Returns once a job is RUNNING."""
    until(lambda: daemon.get(job.id).state == JobState.JOB_STATE_RUNNING, 60, "the job's start")


def cancel(daemon: Daemon, job: Job) -> None:
    daemon.fine_tuning.CancelJob(ft.CancelJobRequest(job_id=job.id))
    assert daemon.wait(job.id).state == JobState.JOB_STATE_CANCELLED


def test_a_checkpoint_that_is_pruned_meanwhile_is_exported_all_the_same(daemons: Start) -> None:
    daemon = daemons(*SLOW)
    daemon.upload()
    job = daemon.create(small(checkpoints=Checkpoints(every_steps=5)))
    daemon.wait_for_step(job.id, 6)
    first, second = (export(daemon, f"{job.id}:step-5") for _ in range(2))
    shutil.rmtree(daemon.data_dir / "jobs" / job.id / "checkpoints" / "000005-a1")
    linked = daemon.data_dir / "jobs" / second.id / "source"
    assert (linked / "state.json").is_file()
    with pytest.raises(grpc.RpcError) as gone:
        export(daemon, f"{job.id}:step-5")
    assert reason(gone.value) == "CHECKPOINT_NOT_FOUND"
    cancel(daemon, job)
    with pytest.raises(grpc.RpcError) as needed:
        daemon.fine_tuning.DeleteJob(ft.DeleteJobRequest(job_id=job.id))
    assert reason(needed.value) == "JOB_IN_USE"
    runs(daemon, first)
    cancel(daemon, first)
    runs(daemon, second)
    cancel(daemon, second)
    until(lambda: not linked.exists(), what="the link's end")
    daemon.fine_tuning.DeleteJob(ft.DeleteJobRequest(job_id=job.id))


def test_an_export_runs_while_every_device_is_busy_and_training_while_every_export_slot_is(daemons: Start) -> None:
    daemon = daemons(*SLOW)
    daemon.upload()
    model = tuned(daemon, hyperparameters=ONE_STEP)
    training, queued = daemon.create(), daemon.create()
    runs(daemon, training)
    exporting, behind = export(daemon, model), export(daemon, model)
    runs(daemon, exporting)
    assert len(daemon.host().trainers) == 2
    places = [daemon.get(each.id).queue_position for each in (training, queued, exporting, behind)]
    assert places == [0, 1, 0, 1]
    cancel(daemon, training)
    runs(daemon, queued)
    assert daemon.get(behind.id).state == JobState.JOB_STATE_QUEUED


def test_a_restarted_server_adopts_an_export_with_its_slot_and_sweeps_what_nobody_needs(daemons: Start) -> None:
    daemon = daemons(*SLOW)
    daemon.upload()
    job = export(daemon, tuned(daemon, hyperparameters=ONE_STEP))
    runs(daemon, job)
    (trainer,) = daemon.host().trainers
    (aside,) = left(daemon)
    daemon.kill()
    for name in ("export_01ARZ3NDEKTSV4RRFFQ69G5FAV", ".tmp-export_01ARZ3NDEKTSV4RRFFQ69G5FAV"):
        (daemon.data_dir / "exports" / name).mkdir()
    (daemon.data_dir / "exports" / "lost+found").mkdir()
    daemon.start()
    assert left(daemon) == [aside, "lost+found"], "what nobody needs is swept, and nothing else"
    training, behind = daemon.create(), export(daemon, job.spec.export.model)
    runs(daemon, training)
    assert daemon.get(behind.id).state == JobState.JOB_STATE_QUEUED, "its slot is not given twice"
    assert trainer in daemon.host().trainers
    cancel(daemon, job)
    events = list(daemon.watch(job.id))
    assert dense(events)
    assert [each.attempt_started.pid for each in events if each.HasField("attempt_started")] == [trainer.pid]
    runs(daemon, behind)


def test_a_cancelled_export_leaves_nothing_and_a_paused_one_starts_over(daemons: Start) -> None:
    daemon = daemons(*SLOW)
    daemon.upload()
    job = export(daemon, tuned(daemon, hyperparameters=ONE_STEP))
    runs(daemon, job)
    (aside,) = left(daemon)
    daemon.fine_tuning.PauseJob(ft.PauseJobRequest(job_id=job.id))
    until(lambda: daemon.get(job.id).state == JobState.JOB_STATE_PAUSED, what="rest")
    assert left(daemon) == []
    daemon.fine_tuning.ResumeJob(ft.ResumeJobRequest(job_id=job.id))
    runs(daemon, job)
    assert left(daemon) == [aside], "its attempts make the same export"
    cancel(daemon, job)
    until(lambda: left(daemon) == [], what="an empty folder")
    done = [each for each in daemon.watch(job.id) if each.HasField("phase_progressed")]
    assert next(each.phase_progressed.completed for each in done if each.attempt == 2) == 0
    assert (daemon.get(job.id).attempt, daemon.get(job.id).export_id) == (2, "")


def test_a_trainer_that_fails_leaves_no_export(daemons: Start) -> None:
    daemon = daemons(*puppet(steps=5, step_seconds=0.01, fail_at_step=3))
    daemon.upload()
    job = daemon.wait(export(daemon, tuned(daemon, hyperparameters=ONE_STEP)).id)
    assert (job.state, job.error.reason) == (JobState.JOB_STATE_FAILED, "PUPPET_FAILED")
    until(lambda: not left(daemon), what="an empty folder")


def test_the_secret_of_a_destination_is_written_nowhere(daemons: Start, tmp_path: Path) -> None:
    secret = uuid.uuid4().hex
    daemon = daemons(*QUICK, environment={"LUTHIER_SECRET_BUCKET": secret})
    daemon.upload()
    destination = ExportDestination(uri="s3://models/here", credentials_secret="bucket")
    exported(daemon, tuned(daemon), destination=destination)
    daemon.stop()
    for path in daemon.data_dir.rglob("*"):
        if path.is_file() and not path.is_socket():
            assert secret.encode() not in path.read_bytes(), path


def test_the_base_of_a_checkpoint_stays_while_that_is_exported_and_without_it_nothing_is(daemons: Start) -> None:
    daemon = daemons(*SLOW)
    daemon.upload()
    base = tuned(daemon, hyperparameters=ONE_STEP)
    tiny = Path(__file__).parents[2] / "trainer" / "luthier_trainer" / "builtin" / "tiny"
    shutil.copytree(tiny, daemon.data_dir / "models" / base, dirs_exist_ok=True)
    job = daemon.create(small(base_model=base, checkpoints=Checkpoints(every_steps=2)))
    daemon.wait_for_step(job.id, 3)
    cancel(daemon, job)
    checkpoint = f"{job.id}:step-2"
    exporting = export(daemon, checkpoint)
    with pytest.raises(grpc.RpcError) as needed:
        daemon.models.DeleteModel(md.DeleteModelRequest(model_id=base))
    violations = details(needed.value)["PreconditionFailure"].violations
    assert [(each.type, each.subject) for each in violations] == [("JOB", exporting.id)]
    cancel(daemon, exporting)
    daemon.models.DeleteModel(md.DeleteModelRequest(model_id=base))
    with pytest.raises(grpc.RpcError) as gone:
        export(daemon, checkpoint)
    assert reason(gone.value) == "MODEL_NOT_FOUND"
    assert [each.field for each in details(gone.value)["BadRequest"].field_violations] == ["export.model"]
    with pytest.raises(grpc.RpcError) as alone:
        daemon.models.RegisterModel(md.RegisterModelRequest(model_id=checkpoint, name="orphan"))
    assert reason(alone.value) == "MODEL_NOT_FOUND"
    assert os.listdir(daemon.data_dir / "models") == []
