"""Backup, restore, doctor and migration on a real data directory."""

import contextlib
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from daemon import Daemon, dense, kinds, puppet, reason, small

from luthier.v1 import fine_tuning_pb2 as ft
from luthier.v1 import models_pb2 as md
from luthier.v1.export_task_pb2 import ExportTask, GgufExport
from luthier.v1.job_pb2 import Checkpoints, JobState

Start = Callable[..., Daemon]


def an_export(model: str) -> ExportTask:
    return ExportTask(model=model, gguf=GgufExport())


def luthierd(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "luthier_server.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_backup_taken_while_a_job_trains_restores_to_a_server_that_goes_on(daemons: Start, tmp_path: Path) -> None:
    daemon = daemons(*puppet(steps=100, step_seconds=0.05))
    daemon.upload()
    done = daemon.wait(daemon.create(small(hyperparameters={"max_steps": 3})).id)
    job = daemon.create(small(checkpoints=Checkpoints(every_steps=5)))
    daemon.wait_for_step(job.id, 8)
    exporting = daemon.models.ExportModel(md.ExportModelRequest(export=an_export(f"{job.id}:step-5"))).job
    before = list(daemon.watch(done.id))
    copied = luthierd("backup", str(tmp_path / "backup"), "--data-dir", str(daemon.data_dir))
    assert copied.returncode == 0, copied.stderr
    assert "1 datasets, 1 models" in copied.stdout
    daemon.fine_tuning.CancelJob(ft.CancelJobRequest(job_id=job.id))

    again = luthierd("backup", str(tmp_path / "backup"), "--data-dir", str(daemon.data_dir))
    assert (again.returncode, "exists already" in again.stderr) == (2, True)
    into_full = luthierd("restore", str(tmp_path / "backup"), "--data-dir", str(daemon.data_dir))
    assert (into_full.returncode, "not empty" in into_full.stderr) == (2, True)
    assert luthierd("restore", str(tmp_path / "backup"), "--data-dir", str(tmp_path / "new")).returncode == 0
    restored = daemons(*daemon.flags, data="new")
    assert list(restored.watch(done.id)) == before
    events = list(restored.watch(job.id))
    assert dense(events)
    assert kinds(events)[-1] == "SUCCEEDED"
    assert [e.attempt_started.reason for e in events if e.HasField("attempt_started")][1] == "SERVER_RESTARTED"
    assert restored.wait(exporting.id).state == JobState.JOB_STATE_SUCCEEDED
    old = daemon.get(done.id).history_id
    with pytest.raises(grpc.RpcError) as foreign:
        list(restored.fine_tuning.WatchJob(ft.WatchJobRequest(job_id=done.id, after_sequence=1, history_id=old)))
    assert reason(foreign.value) == "FOREIGN_HISTORY"


def test_the_doctor_finds_a_sound_server_sound_and_names_what_was_damaged(daemons: Start) -> None:
    daemon = daemons()
    dataset = daemon.upload()
    job = daemon.wait(daemon.create().id)
    exporting = daemon.models.ExportModel(md.ExportModelRequest(export=an_export(job.model_id))).job
    export_id = daemon.wait(exporting.id).export_id
    sound = luthierd("doctor", "--data-dir", str(daemon.data_dir), "--deep")
    assert (sound.returncode, "BAD" in sound.stdout) == (0, False), sound.stdout
    assert "luthierd works on this data directory" in sound.stdout
    assert "torch" in sound.stdout
    daemon.stop()
    blob = daemon.data_dir / "blobs" / dataset.sha256
    blob.write_bytes(b"x" * dataset.size_bytes)
    (daemon.data_dir / "models" / job.model_id).rename(daemon.data_dir / "models" / "elsewhere")
    (daemon.data_dir / "exports" / export_id / "part-001.txt").write_text("short")
    with contextlib.closing(sqlite3.connect(daemon.data_dir / "luthier.db")) as database, database:
        database.execute("DELETE FROM events WHERE sequence = 3")
    ill = luthierd("doctor", "--data-dir", str(daemon.data_dir), "--deep")
    assert ill.returncode == 1
    damage = ("rows@1 is missing or damaged", f"{export_id}: part-001.txt is missing or damaged")
    for words in (*damage, f"the files of {job.model_id} are gone", "is not dense"):
        assert words in ill.stdout
    (daemon.data_dir / "luthier.db").write_bytes(os.urandom(4096))
    for left in ("luthier.db-wal", "luthier.db-shm"):
        (daemon.data_dir / left).unlink(missing_ok=True)
    random = luthierd("doctor", "--data-dir", str(daemon.data_dir))
    assert (random.returncode, "restore a backup" in random.stdout) == (1, True)


def test_an_older_database_is_backed_up_and_brought_forward(daemons: Start, tmp_path: Path) -> None:
    import luthier_server.store

    first = Path(luthier_server.store.__file__).parent / "migrations" / "0001_initial.sql"
    (tmp_path / "data").mkdir()
    with contextlib.closing(sqlite3.connect(tmp_path / "data" / "luthier.db")) as old, old:
        old.executescript(first.read_text() + "PRAGMA user_version=1;")
        old.execute(
            "INSERT INTO jobs (id, state, spec, resolved_spec, request_sha256, create_time)"
            " VALUES ('job_01ARZ3NDEKTSV4RRFFQ69G5FAV', ?, '{}', '{}', '', 1)",
            (JobState.JOB_STATE_CANCELLED,),
        )
    daemon = daemons()
    assert daemon.get("job_01ARZ3NDEKTSV4RRFFQ69G5FAV").state == JobState.JOB_STATE_CANCELLED
    with contextlib.closing(sqlite3.connect(tmp_path / "data" / "luthier.db.schema-1")) as backup:
        assert backup.execute("PRAGMA user_version").fetchone()[0] == 1
