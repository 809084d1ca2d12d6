"""The watch that resumes by itself.

The server promises a log that is dense from 1 and a status OK only after the terminal event. So whatever else ends a
stream means: ask again from the last sequence that was processed, with the history_id that came with it. The cursor
checks the promise; the two loops, one for each stack, only read, wait and ask again.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from dataclasses import dataclass

import grpc
import grpc.aio

from luthier.v1.event_pb2 import JobEvent
from luthier.v1.fine_tuning_pb2 import WatchJobRequest, WatchJobResponse
from luthier.v1.job_pb2 import (
    JOB_STATE_CANCELLED,
    JOB_STATE_FAILED,
    JOB_STATE_SUCCEEDED,
    JobState,
)
from luthier_client import errors
from luthier_client.backoff import Backoff
from luthier_client.connection import AsyncConnection, Connection

TERMINAL_STATES = frozenset({JOB_STATE_SUCCEEDED, JOB_STATE_FAILED, JOB_STATE_CANCELLED})


@dataclass(frozen=True)
class WatchOptions:
    """How a watch behaves when the server is away."""

    give_up_after: float | None = None
    """Seconds without any answer after which the error is raised; None never gives up."""
    on_reconnect: Callable[[int, errors.LuthierError], None] | None = None
    """Called before each wait with the number of the try, from 1, and the error that made it necessary."""
    first_pause: float = 0.1
    """Seconds before the first try; doubles with each further one."""
    longest_pause: float = 5.0
    """Seconds between two tries at most."""


def is_terminal(state: JobState.ValueType) -> bool:
    """Whether nothing follows this state."""
    return state in TERMINAL_STATES


class WatchCursor:
    """Where a watch stands, and the check that nothing is missing or comes twice."""

    def __init__(self, job_id: str, after: int, history_id: str) -> None:
        self.job_id = job_id
        self.sequence = after
        self.history_id = history_id
        self.terminal = False
        self._started_at = after

    def request(self) -> WatchJobRequest:
        """What continues after the last event."""
        return WatchJobRequest(job_id=self.job_id, after_sequence=self.sequence, history_id=self.history_id)

    def accept(self, response: WatchJobResponse) -> Iterator[JobEvent]:
        """The events of a message, each checked before it is handed on.

        Raises SequenceGap for a sequence that is not the next one, FailedPrecondition for another history.
        """
        if self.history_id and response.history_id and response.history_id != self.history_id:
            raise errors.FailedPrecondition(
                f"the log of {self.job_id} belongs to another history: the server's store was replaced or restored",
                reason="HISTORY_MISMATCH",
            )
        self.history_id = response.history_id or self.history_id
        for event in response.events:
            self._expect(event.sequence)
            self.sequence = event.sequence
            self.terminal = event.HasField("state_changed") and is_terminal(event.state_changed.state)
            yield event
        if response.cursor > self.sequence:
            raise self._gap(response.cursor)

    def is_end(self) -> bool:
        """Whether a status OK now is the end of the log: it is after the terminal event, which may have been the very
        position that the watch started from."""
        return self.terminal or (self.sequence == self._started_at > 0)

    def _expect(self, sequence: int) -> None:
        if sequence != self.sequence + 1 or self.terminal:
            raise self._gap(sequence)

    def _gap(self, sequence: int) -> errors.SequenceGap:
        return errors.SequenceGap(
            f"{self.job_id}: after sequence {self.sequence} came {sequence}",
            expected=self.sequence + 1,
            received=sequence,
        )


class _Absence:
    """How long the server has been away, and how long to wait for it."""

    def __init__(self, options: WatchOptions) -> None:
        self._options = options
        self._backoff = Backoff(options.first_pause, options.longest_pause)
        self._since: float | None = None
        self._tries = 0

    def over(self) -> None:
        self._since = None
        self._tries = 0
        self._backoff.reset()

    def pause(self, error: errors.LuthierError) -> float:
        """Seconds until the next try. Raises the error when it does not pass by itself, or has not for too long."""
        if not _passes(error):
            raise error
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        limit = self._options.give_up_after
        if limit is not None and now - self._since >= limit:
            raise error
        self._tries += 1
        if self._options.on_reconnect is not None:
            self._options.on_reconnect(self._tries, error)
        return max(self._backoff.next(), min(error.retry_delay or 0.0, self._options.longest_pause))


async def watch_async(
    connection: AsyncConnection, cursor: WatchCursor, options: WatchOptions
) -> AsyncGenerator[JobEvent, None]:
    """Yields every event after the cursor, each exactly once, up to the terminal one.

    Raises NotFound, OutOfRange, FailedPrecondition and the like at once, SequenceGap for a broken promise.
    """
    absence = _Absence(options)
    while True:
        call = connection.jobs.WatchJob(cursor.request(), metadata=connection.metadata)
        try:
            async for response in call:
                absence.over()
                for event in cursor.accept(response):
                    yield event
            if cursor.is_end():
                return
            error: errors.LuthierError = _ended_early(cursor)
        except grpc.aio.AioRpcError as failed:
            if cursor.terminal:
                return
            error = connection.error(failed)
        finally:
            call.cancel()
        await asyncio.sleep(absence.pause(error))


def watch_sync(
    connection: Connection, cursor: WatchCursor, options: WatchOptions, deadline: float | None = None
) -> Generator[JobEvent, None, None]:
    """The same on the synchronous stack. Raises TimeoutError once `time.monotonic()` passes the deadline."""
    absence = _Absence(options)
    while True:
        call = connection.jobs.WatchJob(cursor.request(), timeout=_until(deadline), metadata=connection.metadata)
        try:
            for response in call:
                absence.over()
                yield from cursor.accept(response)
            if cursor.is_end():
                return
            error: errors.LuthierError = _ended_early(cursor)
        except grpc.RpcError as failed:
            if cursor.terminal:
                return
            error = connection.error(failed)
            if deadline is not None and isinstance(error, errors.DeadlineExceeded):
                raise TimeoutError(f"{cursor.job_id} did not end in time") from None
        finally:
            call.cancel()
        pause = absence.pause(error)
        time.sleep(pause if deadline is None else min(pause, _until(deadline) or 0.0))


def _until(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.001, deadline - time.monotonic())


def _ended_early(cursor: WatchCursor) -> errors.Unavailable:
    return errors.Unavailable(f"the watch of {cursor.job_id} ended before the job did", reason="ENDED_EARLY")


def _passes(error: errors.LuthierError) -> bool:
    """Whether asking again can help: the server is away or leaving, gave up on a slow reader, or says so itself."""
    if isinstance(error, errors.Unavailable | errors.Aborted | errors.CallCancelled) or error.retry_delay is not None:
        return True
    # A connection that breaks in the middle of a frame; a bug of the server carries an ErrorInfo.
    return isinstance(error, errors.Internal) and not error.reason and "RST_STREAM" in error.message
