"""Files of models and their rows, when the server dies between the two."""

import asyncio
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from luthier.v1.job_pb2 import JobError, JobSpec, JobState, Progress
from luthier_server import failpoints
from luthier_server.deletions import Deletions
from luthier_server.errors import FailedPrecondition
from luthier_server.ids import Ids
from luthier_server.job import Job
from luthier_server.references import References
from luthier_server.registrations import Registrations
from luthier_server.store import jobs as job_rows
from luthier_server.store import models as rows
from luthier_server.store.database import Database
from luthier_server.store.jobs import Checkpoint
from luthier_server.store.models import Model, Models

JOB = "job_01ARZ3NDEKTSV4RRFFQ69G5FAV"
MODEL = "model_01ARZ3NDEKTSV4RRFFQ69G5FAV"
CHECKPOINT = f"{JOB}:step-2"


async def prepare(data: Path) -> None:
    """A store with a model and a job that has a checkpoint, each with its files."""
    directory = data / "jobs" / JOB / "checkpoints" / "000002-a1"
    files = {"adapter_model.safetensors": b"weights", "optimizer.safetensors": b"moments", "state.json": b"{}"}
    for folder in (directory, data / "models" / MODEL):
        folder.mkdir(parents=True)
    (data / "models" / MODEL / "model.safetensors").write_bytes(b"weights")
    for name, content in files.items():
        (directory / name).write_bytes(content)
    noted = {name: {"sha256": hashlib.sha256(content).hexdigest()} for name, content in files.items()}
    (directory / "manifest.json").write_text(json.dumps({"files": noted}))
    spec = JobSpec()
    spec.fine_tune.base_model = "builtin/tiny"
    state = JobState.JOB_STATE_SUCCEEDED
    job = Job(JOB, "default", state, spec, spec, JobError(), Progress(), 1, 0, 0, MODEL, 1, 1, 1)
    database = await Database.open(data / "luthier.db")
    await database.write(lambda transaction: job_rows.insert(transaction, job, "", ""))
    saved = Checkpoint(JOB, 2, 1, directory.name, 1, 1)
    await database.write(lambda transaction: job_rows.insert_checkpoints(transaction, "default", [saved]))
    model = Model(MODEL, "default", "n", JOB, "builtin/tiny", "lora", 4, 1, {}, 1, "", "")
    await database.write(lambda transaction: rows.insert(transaction, model))
    await database.close()


def registrations(database: Database, data: Path) -> Registrations:
    references = References(database, data / "models", data / "jobs")
    return Registrations(database, references, data / "models", Ids(), clock=lambda: 1)


async def register(data: Path) -> str:
    """Registers the checkpoint; returns the model's id."""
    database = await Database.open(data / "luthier.db")
    try:
        return (await registrations(database, data).register("default", CHECKPOINT, "early")).model_id
    finally:
        await database.close()


async def delete(data: Path) -> None:
    """Deletes the model."""
    database = await Database.open(data / "luthier.db")
    try:
        await Deletions(database, data / "models").delete("default", MODEL)
    finally:
        await database.close()


async def swept(data: Path) -> tuple[int, set[str], list[str]]:
    """Sweeps: how much, what is left on disk, and which models there are."""
    database = await Database.open(data / "luthier.db")
    try:
        count = await Deletions(database, data / "models").sweep()
        models = await Models(database).page("default", below="", limit=9, id_prefix="", name="", tags={})
        return count, {each.name for each in (data / "models").iterdir()}, [each.id for each in models]
    finally:
        await database.close()


def dies(work: str, data: Path, place: str) -> None:
    """Has another process do the work, which dies at that place of its first write."""
    program = f"import asyncio, pathlib, test_model_files as t; asyncio.run(t.{work}(pathlib.Path({str(data)!r})))"
    variables = os.environ | {"LUTHIER_FAILPOINTS": f"{place}=exit"}
    done = subprocess.run([sys.executable, "-c", program], env=variables, cwd=Path(__file__).parent, timeout=60)
    assert done.returncode == failpoints.EXIT_CODE


def test_a_server_that_dies_after_a_models_row_is_gone_leaves_files_that_the_next_start_sweeps(tmp_path: Path) -> None:
    asyncio.run(prepare(tmp_path))
    dies("delete", tmp_path, "after_commit_before_publish")
    assert (tmp_path / "models" / MODEL).is_dir()
    assert asyncio.run(swept(tmp_path)) == (1, set(), [])


def test_a_server_that_dies_before_a_models_row_is_gone_leaves_the_model_whole(tmp_path: Path) -> None:
    asyncio.run(prepare(tmp_path))
    dies("delete", tmp_path, "before_commit")
    assert asyncio.run(swept(tmp_path)) == (0, {MODEL}, [MODEL])
    assert (tmp_path / "models" / MODEL / "model.safetensors").read_bytes() == b"weights"


def test_a_server_that_dies_before_a_checkpoint_is_a_model_leaves_nothing_that_looks_like_one(tmp_path: Path) -> None:
    asyncio.run(prepare(tmp_path))
    dies("register", tmp_path, "before_commit")
    assert len(list((tmp_path / "models").iterdir())) == 2
    assert asyncio.run(swept(tmp_path)) == (1, {MODEL}, [MODEL])
    model_id = asyncio.run(register(tmp_path))
    assert asyncio.run(register(tmp_path)) == model_id
    made = tmp_path / "models" / model_id
    assert {each.name for each in made.iterdir()} == {"adapter_model.safetensors", "luthier.json"}
    assert asyncio.run(swept(tmp_path)) == (0, {MODEL, model_id}, [model_id, MODEL])


@pytest.mark.parametrize(
    "damage",
    [
        {"adapter_model.safetensors": b"changed"},
        {"adapter_model.safetensors": None},
        {"manifest.json": b'{"files": {"../../../../luthier.db": {"sha256": ""}}}'},
        {"manifest.json": b"[]"},
        {"manifest.json": None},
        {"state.json": b"no json"},
    ],
)
def test_a_damaged_checkpoint_becomes_no_model_and_leaves_nothing(
    tmp_path: Path, damage: dict[str, bytes | None]
) -> None:
    asyncio.run(prepare(tmp_path))
    for name, content in damage.items():
        file = tmp_path / "jobs" / JOB / "checkpoints" / "000002-a1" / name
        file.unlink()
        if content is not None:
            file.write_bytes(content)
    with pytest.raises(FailedPrecondition) as refused:
        asyncio.run(register(tmp_path))
    assert refused.value.reason == "CHECKPOINT_DAMAGED"
    assert asyncio.run(swept(tmp_path)) == (0, {MODEL}, [MODEL])
