"""The methods of luthier.v1.Models that are about exports, a thin layer over `exports`."""

from luthier.v1 import models_pb2 as md
from luthier_server.exports import Exports
from luthier_server.grpc import paging
from luthier_server.grpc.convert import export_proto, job_proto
from luthier_server.job import QUEUED
from luthier_server.jobs import Jobs

TENANT = "default"


class ExportService:
    """The part of luthier.v1.Models that makes, finds and deletes exports."""

    def __init__(self, exports: Exports, jobs: Jobs, history_id: str) -> None:
        self._exports = exports
        self._jobs = jobs
        self._history_id = history_id

    async def ExportModel(self, request: md.ExportModelRequest) -> md.ExportModelResponse:
        """Creates a job that writes and proves an export."""
        job = await self._exports.create(TENANT, request.export, request.request_id.lower(), request.validate_only)
        places = await self._jobs.queue_positions(TENANT) if job.state == QUEUED else {}
        return md.ExportModelResponse(job=job_proto(job, self._history_id, places.get(job.id, 0)))

    async def GetExport(self, request: md.GetExportRequest) -> md.GetExportResponse:
        """Returns an export."""
        return md.GetExportResponse(export=export_proto(await self._exports.get(TENANT, request.export_id)))

    async def ListExports(self, request: md.ListExportsRequest) -> md.ListExportsResponse:
        """Lists exports, newest first."""
        limit = paging.size(request)
        found = await self._exports.page(
            TENANT,
            below=paging.below(request, request.page_token),
            limit=limit + 1,
            model=request.model_id,
            id_prefix=request.id_prefix,
        )
        return md.ListExportsResponse(
            exports=[export_proto(each) for each in found[:limit]],
            next_page_token=paging.token(request, found[limit - 1].id) if len(found) > limit else "",
        )

    async def DeleteExport(self, request: md.DeleteExportRequest) -> md.DeleteExportResponse:
        """Deletes an export."""
        await self._exports.delete(TENANT, request.export_id)
        return md.DeleteExportResponse()
