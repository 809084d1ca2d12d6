"""FineTuning, a thin layer over `jobs`."""

from luthier.v1 import fine_tuning_pb2 as ft
from luthier.v1.job_pb2 import Job as JobProto
from luthier_server.estimates import Estimates
from luthier_server.grpc import paging
from luthier_server.grpc.boundary import Context, writes
from luthier_server.grpc.convert import checkpoint_proto, job_proto
from luthier_server.grpc.watch import Watch
from luthier_server.job import QUEUED, Job
from luthier_server.jobs import Jobs

TENANT = "default"


class FineTuning:
    """luthier.v1.FineTuning."""

    def __init__(self, jobs: Jobs, estimates: Estimates, watch: Watch, history_id: str) -> None:
        self._jobs = jobs
        self._estimates = estimates
        self._watch = watch
        self._history_id = history_id

    async def _proto(self, job: Job) -> JobProto:
        places = await self._jobs.queue_positions(TENANT) if job.state == QUEUED else {}
        return job_proto(job, self._history_id, places.get(job.id, 0))

    async def CreateJob(self, request: ft.CreateJobRequest) -> ft.CreateJobResponse:
        """Creates a job."""
        job = await self._jobs.create(TENANT, request.spec, request.request_id.lower(), request.validate_only)
        return ft.CreateJobResponse(job=await self._proto(job))

    async def EstimateJob(self, request: ft.EstimateJobRequest) -> ft.EstimateJobResponse:
        """Tells what a job would take."""
        resolved, estimate = await self._estimates.estimate(TENANT, request.spec, request.probe)
        return ft.EstimateJobResponse(resolved_spec=resolved, estimate=estimate)

    async def GetJob(self, request: ft.GetJobRequest) -> ft.GetJobResponse:
        """Returns a job."""
        return ft.GetJobResponse(job=await self._proto(await self._jobs.get(TENANT, request.job_id)))

    async def ListJobs(self, request: ft.ListJobsRequest) -> ft.ListJobsResponse:
        """Lists jobs, newest first."""
        limit = paging.size(request)
        found = await self._jobs.page(
            TENANT,
            below=paging.below(request, request.page_token),
            limit=limit + 1,
            states=list(request.states),
            labels=dict(request.labels),
            id_prefix=request.id_prefix,
        )
        page = found[:limit]
        waiting = any(job.state == QUEUED for job in page)
        places = await self._jobs.queue_positions(TENANT) if waiting else {}
        return ft.ListJobsResponse(
            jobs=[job_proto(job, self._history_id, places.get(job.id, 0)) for job in page],
            next_page_token=paging.token(request, page[-1].id) if len(found) > limit else "",
        )

    async def CancelJob(self, request: ft.CancelJobRequest) -> ft.CancelJobResponse:
        """Asks a job to stop."""
        return ft.CancelJobResponse(job=await self._proto(await self._jobs.cancel(TENANT, request.job_id)))

    async def PauseJob(self, request: ft.PauseJobRequest) -> ft.PauseJobResponse:
        """Asks a job to rest."""
        return ft.PauseJobResponse(job=await self._proto(await self._jobs.pause(TENANT, request.job_id)))

    async def ResumeJob(self, request: ft.ResumeJobRequest) -> ft.ResumeJobResponse:
        """Queues a paused job again."""
        return ft.ResumeJobResponse(job=await self._proto(await self._jobs.resume(TENANT, request.job_id)))

    async def DeleteJob(self, request: ft.DeleteJobRequest) -> ft.DeleteJobResponse:
        """Deletes a job that is at rest."""
        return ft.DeleteJobResponse(job=await self._proto(await self._jobs.delete(TENANT, request.job_id)))

    async def ListCheckpoints(self, request: ft.ListCheckpointsRequest) -> ft.ListCheckpointsResponse:
        """Lists what a job has saved."""
        found = await self._jobs.checkpoints(TENANT, request.job_id)
        return ft.ListCheckpointsResponse(checkpoints=[checkpoint_proto(each) for each in found])

    @writes
    async def WatchJob(self, request: ft.WatchJobRequest, context: Context) -> None:
        """Streams a job's events."""
        await self._watch.serve(TENANT, request, context)
