"""Datasets made of datasets: a split, a sample, several in one."""

import json
from collections.abc import Sequence
from pathlib import Path

from google.protobuf import json_format

from luthier.v1.dataset_pb2 import DatasetLineage
from luthier.v1.datasets_pb2 import DatasetMetadata, DeriveDatasetRequest
from luthier_server import spec as specs
from luthier_server.datasets import Datasets, Origin, refuse_errors
from luthier_server.errors import InvalidArgument, Violation
from luthier_server.store.datasets import Dataset
from luthier_server.uploads import Received, Uploads
from luthier_server.workers import Workers

_LONGEST_NAME = 63


class Derivations:
    """Makes datasets of others. What comes out depends on the request alone, so asking twice gives the same ids."""

    def __init__(self, datasets: Datasets, uploads: Uploads, workers: Workers) -> None:
        self._datasets = datasets
        self._uploads = uploads
        self._workers = workers

    async def derive(self, tenant: str, request: DeriveDatasetRequest) -> list[Dataset]:
        """The new datasets, of a split training first. Raises NotFound, InvalidArgument, StorageFull."""
        operation = request.WhichOneof("operation")
        match operation:
            case "split":
                split = request.split
                parents = [await self._datasets.find(tenant, split.dataset)]
                names = [
                    split.training_name or _named(parents[0], "train"),
                    split.validation_name or _named(parents[0], "validation"),
                ]
                if names[0] == names[1]:
                    specs.refuse([Violation("split.validation_name", "must differ from training_name")])
                given = {"validation": split.validation, "seed": split.seed}
                parts: Sequence[str] = ("training", "validation")
            case "sample":
                sample = request.sample
                parents = [await self._datasets.find(tenant, sample.dataset)]
                names = [sample.name or _named(parents[0], "sample")]
                given = {"rows": sample.rows, "seed": sample.seed}
                parts = ("",)
            case _:
                parents = [await self._datasets.find(tenant, each) for each in request.concatenate.datasets]
                names = [request.concatenate.name]
                given = {}
                parts = ("",)
        order: dict[str, object] = {
            "operation": operation,
            "sources": [self._source(each) for each in parents],
            **given,
        }
        return await self._make(tenant, order, parents, names, parts, given)

    async def _make(
        self,
        tenant: str,
        order: dict[str, object],
        parents: Sequence[Dataset],
        names: Sequence[str],
        parts: Sequence[str],
        given: dict[str, float],
    ) -> list[Dataset]:
        async with self._uploads.scratch() as scratch:
            request, output = scratch / "request.json", scratch / "made"
            request.write_text(json.dumps(order))
            output.mkdir()
            report = await self._workers.derive(request, output)
            if report.problem:
                field = str(order["operation"])
                raise InvalidArgument(report.problem, [Violation(field, report.problem[:400])], reason="NOT_DERIVABLE")
            for file in report.files:
                refuse_errors(file.report)
            made = []
            for name, part, file in zip(names, parts, report.files, strict=True):
                parameters = {key: str(value) for key, value in given.items()}
                lineage = DatasetLineage(
                    operation=str(order["operation"]),
                    parents=[each.id for each in parents],
                    parameters=parameters | ({"part": part} if part else {}),
                )
                received = Received(output / Path(file.path).name, file.sha256, file.size_bytes)
                metadata = DatasetMetadata(name=name)
                kept = await self._datasets.store(tenant, metadata, received, file.report, Origin(lineage=lineage))
                made.append(kept.dataset)
        return made

    def _source(self, dataset: Dataset) -> dict[str, object]:
        return {"path": str(self._datasets.blob(dataset)), "reading": json_format.MessageToDict(dataset.reading)}


def _named(parent: Dataset, part: str) -> str:
    return f"{parent.name[: _LONGEST_NAME - 1 - len(part)]}-{part}"
