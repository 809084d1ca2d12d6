"""Where a task's model and rows come from, as its trainer is told."""

from dataclasses import dataclass

from luthier.trainer.v1.report_pb2 import ModelReport
from luthier.trainer.v1.task_pb2 import BaseModelSource, DatasetSource
from luthier.v1.job_pb2 import JobSpec
from luthier_server.datasets import Datasets
from luthier_server.store.datasets import Dataset


@dataclass(frozen=True, slots=True)
class Resolved:
    """A job that may be created: its spec with every default, and what that names. reasons: why rules decided numbers
    as they did."""

    spec: JobSpec
    base: ModelReport
    training: Dataset
    validation: Dataset | None
    reasons: tuple[str, ...] = ()

    @property
    def dataset_ids(self) -> list[str]:
        """The datasets that the job holds."""
        return [each.id for each in (self.training, self.validation) if each is not None]


def dataset_source(datasets: Datasets, dataset: Dataset) -> DatasetSource:
    """The rows of a dataset."""
    return DatasetSource(
        path=str(datasets.blob(dataset)),
        id=dataset.id,
        name=f"{dataset.name}@{dataset.version}",
        sha256=dataset.sha256,
        rows=dataset.row_count,
        reading=dataset.reading,
    )


def base_source(base: ModelReport, base_model: str, revision: str) -> BaseModelSource:
    """The base model that `base_model` names, of which the registry knows `base`."""
    return BaseModelSource(
        location=base.base_location or base.directory or base_model,
        is_hub=base.is_hub,
        revision=revision,
        adapter_dir=base.adapter_dir,
    )
