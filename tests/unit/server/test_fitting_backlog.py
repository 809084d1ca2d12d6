"""Questions about memory that nobody answers do not pile up."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from luthier.trainer.v1.report_pb2 import ModelReport
from luthier.trainer.v1.task_pb2 import DataAnswer, TrainerTask
from luthier.v1.job_pb2 import FineTuneTask, Hyperparameters, JobSpec
from luthier_server.data_work import DataWork
from luthier_server.datasets import Datasets
from luthier_server.fitting import Fitting, FittingSettings
from luthier_server.secrets import Secrets
from luthier_server.store.datasets import Dataset
from luthier_server.tasks import Resolved


class Silent:
    """Work that never ends, without secrets, on datasets that lie nowhere."""

    async def run(self, task: TrainerTask, secrets: Mapping[str, str], **limits: Any) -> DataAnswer:
        await asyncio.Event().wait()
        raise AssertionError

    def for_task(self, task: FineTuneTask) -> Mapping[str, str]:
        return {}

    def blob(self, dataset: Dataset) -> Path:
        return Path("nowhere")


class Rows:
    id, name, version, sha256, row_count, reading = "ds_1", "rows", 1, "", 1, None


def job(max_length: int) -> Resolved:
    spec = JobSpec(fine_tune=FineTuneTask(hyperparameters=Hyperparameters(max_length=max_length)))
    return Resolved(spec, ModelReport(), cast(Dataset, Rows()), None)


async def test_of_many_different_jobs_few_are_asked_about_and_all_go_on() -> None:
    silent = Silent()
    fitting = Fitting(
        FittingSettings(Path("cache"), devices=(0,), wait=0.05),
        cast(Datasets, silent),
        cast(DataWork, silent),
        cast(Secrets, silent),
    )
    try:
        await asyncio.gather(*(fitting.require(job(length)) for length in range(1, 40)))
        assert sum(task.get_name() == "memory of a job" for task in asyncio.all_tasks()) == 8
    finally:
        await fitting.close()
