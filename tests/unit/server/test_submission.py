"""A job is not made of what was deleted while it was drafted."""

from pathlib import Path

import pytest

from luthier.v1.job_pb2 import JobSpec
from luthier_server.errors import NotFound
from luthier_server.job import QUEUED
from luthier_server.store.database import Database, Transaction
from luthier_server.submission import Draft, new_job, store

JOB = "job_01ARZ3NDEKTSV4RRFFQ69G5FAV"
GONE = "01ARZ3NDEKTSV4RRFFQ69G5FA0"


@pytest.mark.parametrize(
    "draft",
    [
        Draft(JobSpec(), QUEUED, model_id=f"model_{GONE}"),
        Draft(JobSpec(), QUEUED, checkpoint_of=f"job_{GONE}"),
        Draft(JobSpec(), QUEUED, dataset_ids=[f"ds_{GONE}"]),
    ],
    ids=["model", "job of the checkpoint", "dataset"],
)
async def test_a_job_whose_model_job_or_dataset_was_deleted_meanwhile_is_none(tmp_path: Path, draft: Draft) -> None:
    database = await Database.open(tmp_path / "luthier.db")
    job = new_job(JOB, "default", JobSpec(), JobSpec(), 1)

    async def work(transaction: Transaction) -> None:
        await store(transaction, job, draft, [], "", "", 10)

    with pytest.raises(NotFound, match=GONE):
        await database.write(work)
    assert await database.read("SELECT id FROM jobs") == []
    await database.close()
