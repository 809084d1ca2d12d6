"""One change of one job: events and the job's row, in the same transaction."""

import dataclasses
from collections.abc import Callable
from typing import Any

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from luthier.v1.event_pb2 import JobEvent, StateChanged
from luthier.v1.job_pb2 import JobError, JobState
from luthier_server.hub import Hub
from luthier_server.job import PAUSED, QUEUED, TERMINAL, Job, check_transition
from luthier_server.store import events, jobs
from luthier_server.store.database import Transaction

PAYLOADS: dict[str, str] = {
    getattr(JobEvent(), field.name).DESCRIPTOR.full_name: field.name
    for field in JobEvent.DESCRIPTOR.oneofs_by_name["payload"].fields
}


def timestamp(microseconds: int) -> Timestamp:
    """Microseconds since the epoch as a proto Timestamp."""
    seconds, rest = divmod(microseconds, 1_000_000)
    return Timestamp(seconds=seconds, nanos=rest * 1000)


class Change:
    """Collects what happens to a job; `commit` writes it. Sequences are allocated here and nowhere else."""

    def __init__(self, job: Job, now: int) -> None:
        self.job = job
        self.now = now
        self.events: list[JobEvent] = []

    def emit(self, payload: Message, *, time: Timestamp | None = None) -> None:
        """Appends an event of the current attempt. Nothing follows a terminal event."""
        if self.events and self.job.terminal:
            raise AssertionError("an event after the terminal one")
        event = JobEvent(
            job_id=self.job.id,
            sequence=self.job.last_sequence + 1,
            event_time=time or timestamp(self.now),
            attempt=self.job.attempt,
        )
        getattr(event, PAYLOADS[payload.DESCRIPTOR.full_name]).CopyFrom(payload)
        self.events.append(event)
        self.set(last_sequence=event.sequence)

    def set(self, **fields: Any) -> None:
        """Replaces fields of the job."""
        self.job = dataclasses.replace(self.job, **fields)

    def move(
        self,
        state: JobState.ValueType,
        reason: str,
        message: str = "",
        *,
        error: JobError | None = None,
        model_id: str = "",
        export_id: str = "",
    ) -> None:
        """Changes the state, and says so in an event. Raises IllegalTransition."""
        before = self.job.state
        check_transition(before, state)
        moved = StateChanged(
            from_state=before, state=state, reason=reason, message=message, model_id=model_id, export_id=export_id
        )
        if error is not None:
            moved.error.CopyFrom(error)
            self.set(error=error)
        self.emit(moved)
        self.set(state=state, model_id=model_id or self.job.model_id, export_id=export_id or self.job.export_id)
        if state != PAUSED:
            self.set(pause_reason="")
        if state != QUEUED:
            self.set(retry_time=0)
        if state in TERMINAL:
            self.set(end_time=self.now)

    async def commit(self, transaction: Transaction, hub: Hub, on_queue: Callable[[], None]) -> Job:
        """Writes the events and the row; wakes watchers, and the scheduler where it matters, once that is durable."""
        await events.append(transaction, self.job.tenant, self.events)
        await jobs.save(transaction, self.job)
        job = self.job
        transaction.after_commit(lambda: hub.announce(job.id, job.last_sequence, job.terminal))
        if job.state == QUEUED or job.terminal:
            transaction.after_commit(on_queue)
        return job
