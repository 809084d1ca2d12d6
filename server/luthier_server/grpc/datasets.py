"""Datasets, a thin layer over `datasets`, `imports`, `derivations` and `checks`."""

from collections.abc import AsyncIterable, AsyncIterator

from luthier.v1 import datasets_pb2 as ds
from luthier.v1.dataset_report_pb2 import TokenReport
from luthier_server.checks import Checks
from luthier_server.datasets import Datasets, Kept
from luthier_server.derivations import Derivations
from luthier_server.errors import InvalidArgument, Violation
from luthier_server.grpc import paging
from luthier_server.grpc.boundary import Context
from luthier_server.grpc.convert import dataset_proto
from luthier_server.imports import Imports

TENANT = "default"
_MOST_CHUNK = 1024 * 1024
_MOST_FINDINGS = 50


class DatasetService:
    """luthier.v1.Datasets."""

    def __init__(self, datasets: Datasets, imports: Imports, derivations: Derivations, checks: Checks) -> None:
        self._datasets = datasets
        self._imports = imports
        self._derivations = derivations
        self._checks = checks

    async def UploadDataset(self, requests: AsyncIterable[ds.UploadDatasetRequest]) -> ds.UploadDatasetResponse:
        """Receives a file: metadata, then chunks."""
        iterator = aiter(requests)
        first = await anext(iterator, None)
        if first is None or first.WhichOneof("part") != "metadata":
            raise InvalidArgument(
                "the first message must hold the metadata", [Violation("metadata", "is needed in the first message")]
            )
        return _kept(await self._datasets.upload(TENANT, first.metadata, _chunks(iterator)))

    async def GetUpload(self, request: ds.GetUploadRequest) -> ds.GetUploadResponse:
        """Says how much of a file is here."""
        return ds.GetUploadResponse(received_bytes=await self._datasets.received(TENANT, request.sha256))

    async def ImportDataset(
        self, request: ds.ImportDatasetRequest, context: Context
    ) -> AsyncIterator[ds.ImportDatasetResponse]:
        """Fetches a dataset from elsewhere."""
        async for each in self._imports.fetch(TENANT, request):
            if isinstance(each, Kept):
                yield ds.ImportDatasetResponse(imported=_kept(each))
            else:
                yield ds.ImportDatasetResponse(progress=each)

    async def GetDataset(self, request: ds.GetDatasetRequest) -> ds.GetDatasetResponse:
        """Returns a dataset."""
        dataset = await self._datasets.find(TENANT, request.dataset)
        return ds.GetDatasetResponse(
            dataset=dataset_proto(dataset),
            report=await self._datasets.report(dataset),
            token_reports=[_short(each) for each in await self._datasets.token_reports(dataset)],
        )

    async def ListDatasets(self, request: ds.ListDatasetsRequest) -> ds.ListDatasetsResponse:
        """Lists datasets, newest first."""
        limit = paging.size(request)
        found = await self._datasets.page(
            TENANT,
            below=paging.below(request, request.page_token),
            limit=limit + 1,
            name=request.name,
            id_prefix=request.id_prefix,
        )
        return ds.ListDatasetsResponse(
            datasets=[dataset_proto(each) for each in found[:limit]],
            next_page_token=paging.token(request, found[limit - 1].id) if len(found) > limit else "",
        )

    async def DeleteDataset(self, request: ds.DeleteDatasetRequest) -> ds.DeleteDatasetResponse:
        """Deletes one version."""
        return ds.DeleteDatasetResponse(dataset=dataset_proto(await self._datasets.delete(TENANT, request.dataset)))

    async def PreviewDataset(self, request: ds.PreviewDatasetRequest) -> ds.PreviewDatasetResponse:
        """Shows rows as a model will see them."""
        return await self._checks.preview(TENANT, request)

    async def CheckDataset(
        self, request: ds.CheckDatasetRequest, context: Context
    ) -> AsyncIterator[ds.CheckDatasetResponse]:
        """Checks a dataset for a base model."""
        async for each in self._checks.check(TENANT, request):
            if isinstance(each, ds.TokenReports):
                yield ds.CheckDatasetResponse(reports=each)
            else:
                yield ds.CheckDatasetResponse(progress=each)

    async def DeriveDataset(self, request: ds.DeriveDatasetRequest) -> ds.DeriveDatasetResponse:
        """Makes new datasets of others."""
        made = await self._derivations.derive(TENANT, request)
        return ds.DeriveDatasetResponse(datasets=[dataset_proto(each) for each in made])


def _kept(kept: Kept) -> ds.UploadDatasetResponse:
    return ds.UploadDatasetResponse(dataset=dataset_proto(kept.dataset), created=kept.created, report=kept.report)


def _short(report: TokenReport) -> TokenReport:
    """A report with its first findings: many whole ones would be more than a client takes."""
    del report.findings[_MOST_FINDINGS:]
    return report


async def _chunks(requests: AsyncIterator[ds.UploadDatasetRequest]) -> AsyncIterator[bytes]:
    async for request in requests:
        if request.WhichOneof("part") != "chunk":
            raise InvalidArgument(
                "after the first message come chunks", [Violation("metadata", "is allowed in the first message only")]
            )
        if len(request.chunk) > _MOST_CHUNK:
            raise InvalidArgument(
                "a chunk is too large", [Violation("chunk", f"has {len(request.chunk)} bytes; {_MOST_CHUNK} at most")]
            )
        yield request.chunk
