"""One watch of one job: snapshot, pages, heartbeats, and an end that says what it means."""

import asyncio
import contextlib
from dataclasses import dataclass

from luthier.v1.fine_tuning_pb2 import WatchJobRequest, WatchJobResponse
from luthier_server import failpoints
from luthier_server.errors import Draining, Exhausted, ForeignHistory, NotFound, OutOfRange, SlowConsumer, StoreCorrupt
from luthier_server.grpc.boundary import Context, abort
from luthier_server.hub import Hub
from luthier_server.job import Job
from luthier_server.jobs import Jobs
from luthier_server.pages import Pages


@dataclass(frozen=True, slots=True)
class WatchLimits:
    """Seconds, and the number of watches. gap: between two messages of a watch that is at head."""

    heartbeat: float = 15
    slow_consumer: float = 30
    gap: float = 0.05
    watchers: int = 20_000


class Watch:
    """Serves watches. What it promises stands in docs/watch.md."""

    def __init__(self, jobs: Jobs, hub: Hub, pages: Pages, limits: WatchLimits) -> None:
        self._jobs = jobs
        self._hub = hub
        self._pages = pages
        self._limits = limits

    async def serve(self, tenant: str, request: WatchJobRequest, context: Context) -> None:
        """Writes the log after the request's position until its terminal event.

        Raises NotFound, ForeignHistory, OutOfRange, Exhausted, SlowConsumer, Draining. Returning means status OK, which
        a client takes for the end of the job, so every other end must raise.
        """
        history_id = self._pages.history_id
        if request.history_id and request.history_id != history_id:
            raise ForeignHistory(
                "the position belongs to another incarnation of the store: watch from the start",
                subject=request.job_id,
                metadata={"history_id": history_id},
            )
        if self._hub.watchers >= self._limits.watchers:
            raise Exhausted(
                f"{self._limits.watchers} watches are open already",
                subject="watchers",
                reason="TOO_MANY_WATCHERS",
                retry_seconds=5,
            )
        # Attached before the snapshot is read: what is committed in between is announced.
        with self._hub.attach(request.job_id) as topic:
            job = await self._jobs.get(tenant, request.job_id)
            topic.announce(job.last_sequence, job.terminal)
            if request.after_sequence > topic.head:
                raise OutOfRange(
                    f"after_sequence {request.after_sequence} is past the newest event, {topic.head}",
                    reason="POSITION_PAST_HEAD",
                    metadata={"head_sequence": str(topic.head)},
                )
            cursor = request.after_sequence
            _refuse_compacted(job, cursor)
            while True:
                if self._hub.draining:
                    raise Draining()
                if topic.deleted:
                    raise NotFound("job", job.id, "it was deleted")
                if cursor < topic.head:
                    page = await self._pages.after(job.id, cursor, topic.head)
                    if page.end == cursor:
                        # What was announced is not there: the job went meanwhile, or its old events did, or harm came.
                        _refuse_compacted(await self._jobs.get(tenant, job.id), cursor)
                        raise StoreCorrupt(f"the log of job '{job.id}' has no event {cursor + 1}: restore a backup")
                    await self._write(context, page.body, cursor)
                    cursor = page.end
                    await failpoints.reach("between_page_and_live")
                    if cursor >= topic.head and not topic.terminal:
                        # At head: let events gather, so that they travel in one message.
                        await asyncio.sleep(self._limits.gap)
                elif topic.terminal:
                    await failpoints.reach("after_terminal_before_status")
                    return
                else:
                    head = topic.head
                    await topic.wait(self._limits.heartbeat)
                    if topic.head == head and not self._hub.draining and not topic.deleted:
                        beat = WatchJobResponse(cursor=cursor, history_id=history_id)
                        await self._write(context, beat.SerializeToString(), cursor)

    async def _write(self, context: Context, body: bytes, cursor: int) -> None:
        try:
            async with asyncio.timeout(self._limits.slow_consumer):
                await context.write(body)
        except TimeoutError:
            slow = SlowConsumer(
                f"nothing was read for {self._limits.slow_consumer:.0f} s: watch again from {cursor}",
                metadata={"last_sequence": str(cursor)},
            )
            # The stream is stuck, and so may be its trailers.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await abort(context, slow)
            raise slow from None


def _refuse_compacted(job: Job, cursor: int) -> None:
    if cursor < job.compacted_sequence:
        raise OutOfRange(
            f"events up to {job.compacted_sequence} are past their retention: watch from there",
            reason="EVENTS_COMPACTED",
            metadata={
                "oldest_sequence": str(job.compacted_sequence + 1),
                "head_sequence": str(job.last_sequence),
            },
        )
