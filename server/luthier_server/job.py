"""What a job is to the server: its value, its states, and which state may follow which."""

from collections.abc import Mapping
from dataclasses import dataclass

from luthier.v1.job_pb2 import JobError, JobSpec, JobState, Progress
from luthier_server.lanes import Lane, lane_of

VALIDATING = JobState.JOB_STATE_VALIDATING
QUEUED = JobState.JOB_STATE_QUEUED
PREPARING = JobState.JOB_STATE_PREPARING
RUNNING = JobState.JOB_STATE_RUNNING
PAUSING = JobState.JOB_STATE_PAUSING
PAUSED = JobState.JOB_STATE_PAUSED
CANCELLING = JobState.JOB_STATE_CANCELLING
SUCCEEDED = JobState.JOB_STATE_SUCCEEDED
FAILED = JobState.JOB_STATE_FAILED
CANCELLED = JobState.JOB_STATE_CANCELLED

TERMINAL = frozenset({SUCCEEDED, FAILED, CANCELLED})
ACTIVE = frozenset({PREPARING, RUNNING, PAUSING, CANCELLING})
AT_REST = TERMINAL | {PAUSED}

STORAGE_FULL = "STORAGE_FULL"
"""Why a job is paused that resumes by itself once the disk has room."""

TRANSITIONS: Mapping[JobState.ValueType, frozenset[JobState.ValueType]] = {
    JobState.JOB_STATE_UNSPECIFIED: frozenset({VALIDATING, QUEUED}),
    VALIDATING: frozenset({QUEUED, CANCELLED, FAILED}),
    QUEUED: frozenset({PREPARING, PAUSED, CANCELLED, FAILED}),
    PREPARING: frozenset({RUNNING, QUEUED, PAUSING, CANCELLING, FAILED}),
    RUNNING: frozenset({SUCCEEDED, QUEUED, PAUSING, CANCELLING, FAILED}),
    PAUSING: frozenset({PAUSED, CANCELLING, SUCCEEDED, FAILED}),
    PAUSED: frozenset({QUEUED, CANCELLED}),
    CANCELLING: frozenset({CANCELLED, SUCCEEDED, FAILED}),
    SUCCEEDED: frozenset(),
    FAILED: frozenset(),
    CANCELLED: frozenset(),
}


class IllegalTransition(Exception):
    """A state change that the table does not allow: a bug, never a user's error."""


def check_transition(before: JobState.ValueType, after: JobState.ValueType) -> None:
    """Raises IllegalTransition unless `after` may follow `before`."""
    if after not in TRANSITIONS[before]:
        raise IllegalTransition(f"{JobState.Name(before)} -> {JobState.Name(after)}")


@dataclass(frozen=True, slots=True)
class Job:
    """A job as the store holds it. Times are microseconds since the epoch, 0 where there is none yet."""

    id: str
    tenant: str
    state: JobState.ValueType
    spec: JobSpec
    resolved_spec: JobSpec
    error: JobError
    progress: Progress
    attempt: int
    retries: int
    last_sequence: int
    model_id: str
    create_time: int
    start_time: int
    end_time: int
    retry_time: int = 0
    pause_reason: str = ""
    compacted_sequence: int = 0
    export_id: str = ""

    @property
    def lane(self) -> Lane:
        """What it takes up while it runs."""
        return lane_of(self.resolved_spec)

    @property
    def is_export(self) -> bool:
        """Whether it writes a model in another form. Such a job has no checkpoints: each attempt starts over."""
        return self.resolved_spec.WhichOneof("task") == "export"

    @property
    def terminal(self) -> bool:
        """Whether no event can follow."""
        return self.state in TERMINAL
