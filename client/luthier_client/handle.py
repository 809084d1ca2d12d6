"""A job in the hands of a client."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Generator

from luthier.v1.checkpoint_pb2 import Checkpoint
from luthier.v1.event_pb2 import JobEvent, LogEmitted
from luthier.v1.fine_tuning_pb2 import (
    CancelJobRequest,
    DeleteJobRequest,
    GetJobRequest,
    ListCheckpointsRequest,
    PauseJobRequest,
    ResumeJobRequest,
)
from luthier.v1.job_pb2 import JOB_STATE_CANCELLED, JOB_STATE_FAILED, Job
from luthier_client.connection import AsyncConnection, Connection
from luthier_client.errors import JobCancelled, JobFailed
from luthier_client.metrics import Metrics, MetricsFold
from luthier_client.watch import WatchCursor, WatchOptions, is_terminal, watch_async, watch_sync


class AsyncJobHandle:
    """A job on an AsyncClient."""

    def __init__(self, connection: AsyncConnection, job: Job) -> None:
        self._connection = connection
        self.proto = job
        """The job as it was last seen."""

    @property
    def id(self) -> str:
        """`job_` and a ULID."""
        return self.proto.id

    def __repr__(self) -> str:
        return f"AsyncJobHandle({self.id!r})"

    async def refresh(self) -> Job:
        """Asks for the job as it is now."""
        response = await self._connection.unary(self._connection.jobs.GetJob, GetJobRequest(job_id=self.id))
        self.proto = response.job
        return self.proto

    async def cancel(self) -> Job:
        """Asks the job to stop; returns at once. Raises FailedPrecondition when it has succeeded or failed."""
        response = await self._connection.unary(self._connection.jobs.CancelJob, CancelJobRequest(job_id=self.id))
        self.proto = response.job
        return self.proto

    async def pause(self) -> Job:
        """Asks the job to rest after a checkpoint; returns at once. Raises FailedPrecondition when it has ended."""
        response = await self._connection.unary(self._connection.jobs.PauseJob, PauseJobRequest(job_id=self.id))
        self.proto = response.job
        return self.proto

    async def resume(self) -> Job:
        """Puts a paused job back into the queue. Raises FailedPrecondition when it has ended."""
        response = await self._connection.unary(self._connection.jobs.ResumeJob, ResumeJobRequest(job_id=self.id))
        self.proto = response.job
        return self.proto

    async def delete(self) -> Job:
        """Deletes a job that has ended or is paused, with its events and checkpoints; its model stays.

        Raises FailedPrecondition for any other job. Its watches end with NotFound.
        """
        response = await self._connection.unary(self._connection.jobs.DeleteJob, DeleteJobRequest(job_id=self.id))
        self.proto = response.job
        return self.proto

    async def checkpoints(self) -> list[Checkpoint]:
        """The checkpoints on disk, newest first. Their names are what `resume_from` and downloads take."""
        request = ListCheckpointsRequest(job_id=self.id)
        response = await self._connection.unary(self._connection.jobs.ListCheckpoints, request)
        return list(response.checkpoints)

    def watch(
        self, after: int = 0, *, history_id: str | None = None, options: WatchOptions | None = None
    ) -> AsyncGenerator[JobEvent, None]:
        """Yields the job's events after sequence `after`, each exactly once, up to the terminal one.

        It outlives restarts of the server and broken connections. `history_id` is the one that `after` came from
        (default: that of the job as last seen). Raises NotFound, OutOfRange, FailedPrecondition, SequenceGap. Leave it
        with `contextlib.aclosing` when you may stop early.
        """
        cursor = WatchCursor(self.id, after, _history(self.proto, after, history_id))
        return watch_async(self._connection, cursor, options or WatchOptions())

    async def wait(self, timeout: float | None = None, *, check: bool = False) -> Job:
        """Waits for the end and returns the job as it is then.

        Raises TimeoutError after `timeout` seconds; with `check` JobFailed or JobCancelled.
        """
        async with asyncio.timeout(timeout):
            await self.refresh()
            if not is_terminal(self.proto.state):
                async with contextlib.aclosing(self.watch(after=self.proto.last_sequence)) as events:
                    async for _ in events:
                        pass
                await self.refresh()
        return _checked(self.proto) if check else self.proto

    async def metrics(self) -> Metrics:
        """The losses so far; steps that a retry threw away are not among them."""
        folding = MetricsFold()
        async with contextlib.aclosing(self._so_far()) as events:
            async for event in events:
                folding.add(event)
        return folding.metrics()

    async def logs(self) -> list[LogEmitted]:
        """The lines for people so far."""
        async with contextlib.aclosing(self._so_far()) as events:
            return [event.log_emitted async for event in events if event.HasField("log_emitted")]

    async def _so_far(self) -> AsyncGenerator[JobEvent, None]:
        head = (await self.refresh()).last_sequence
        if head == 0:
            return
        async with contextlib.aclosing(self.watch()) as events:
            async for event in events:
                yield event
                if event.sequence >= head:
                    return


class JobHandle:
    """A job on a Client."""

    def __init__(self, connection: Connection, job: Job) -> None:
        self._connection = connection
        self.proto = job
        """The job as it was last seen."""

    @property
    def id(self) -> str:
        """`job_` and a ULID."""
        return self.proto.id

    def __repr__(self) -> str:
        return f"JobHandle({self.id!r})"

    def refresh(self) -> Job:
        """Asks for the job as it is now."""
        self.proto = self._connection.unary(self._connection.jobs.GetJob, GetJobRequest(job_id=self.id)).job
        return self.proto

    def cancel(self) -> Job:
        """Asks the job to stop; returns at once. Raises FailedPrecondition when it has succeeded or failed."""
        self.proto = self._connection.unary(self._connection.jobs.CancelJob, CancelJobRequest(job_id=self.id)).job
        return self.proto

    def pause(self) -> Job:
        """Asks the job to rest after a checkpoint; returns at once. Raises FailedPrecondition when it has ended."""
        self.proto = self._connection.unary(self._connection.jobs.PauseJob, PauseJobRequest(job_id=self.id)).job
        return self.proto

    def resume(self) -> Job:
        """Puts a paused job back into the queue. Raises FailedPrecondition when it has ended."""
        self.proto = self._connection.unary(self._connection.jobs.ResumeJob, ResumeJobRequest(job_id=self.id)).job
        return self.proto

    def delete(self) -> Job:
        """Deletes a job that has ended or is paused, with its events and checkpoints; its model stays.

        Raises FailedPrecondition for any other job. Its watches end with NotFound.
        """
        self.proto = self._connection.unary(self._connection.jobs.DeleteJob, DeleteJobRequest(job_id=self.id)).job
        return self.proto

    def checkpoints(self) -> list[Checkpoint]:
        """The checkpoints on disk, newest first. Their names are what `resume_from` and downloads take."""
        request = ListCheckpointsRequest(job_id=self.id)
        response = self._connection.unary(self._connection.jobs.ListCheckpoints, request)
        return list(response.checkpoints)

    def watch(
        self, after: int = 0, *, history_id: str | None = None, options: WatchOptions | None = None
    ) -> Generator[JobEvent, None, None]:
        """Yields the job's events after sequence `after`, each exactly once, up to the terminal one.

        It outlives restarts of the server and broken connections. `history_id` is the one that `after` came from
        (default: that of the job as last seen). Raises NotFound, OutOfRange, FailedPrecondition, SequenceGap.
        """
        cursor = WatchCursor(self.id, after, _history(self.proto, after, history_id))
        return watch_sync(self._connection, cursor, options or WatchOptions())

    def wait(self, timeout: float | None = None, *, check: bool = False) -> Job:
        """Waits for the end and returns the job as it is then.

        Raises TimeoutError after `timeout` seconds; with `check` JobFailed or JobCancelled.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        self.refresh()
        if not is_terminal(self.proto.state):
            cursor = WatchCursor(self.id, self.proto.last_sequence, self.proto.history_id)
            for _ in watch_sync(self._connection, cursor, WatchOptions(), deadline):
                pass
            self.refresh()
        return _checked(self.proto) if check else self.proto

    def metrics(self) -> Metrics:
        """The losses so far; steps that a retry threw away are not among them."""
        folding = MetricsFold()
        with contextlib.closing(self._so_far()) as events:
            for event in events:
                folding.add(event)
        return folding.metrics()

    def logs(self) -> list[LogEmitted]:
        """The lines for people so far."""
        with contextlib.closing(self._so_far()) as events:
            return [event.log_emitted for event in events if event.HasField("log_emitted")]

    def _so_far(self) -> Generator[JobEvent, None, None]:
        head = self.refresh().last_sequence
        if head == 0:
            return
        with contextlib.closing(self.watch()) as events:
            for event in events:
                yield event
                if event.sequence >= head:
                    return


def _history(job: Job, after: int, history_id: str | None) -> str:
    if history_id is not None:
        return history_id
    return job.history_id if after else ""


def _checked(job: Job) -> Job:
    if job.state == JOB_STATE_FAILED:
        raise JobFailed(job)
    if job.state == JOB_STATE_CANCELLED:
        raise JobCancelled(job)
    return job
