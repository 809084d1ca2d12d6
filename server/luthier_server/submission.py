"""How a job comes to be: once for each request, in one transaction with its first event and with what it holds."""

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from google.protobuf.message import Message

from luthier.v1.event_pb2 import LogEmitted, LogLevel
from luthier.v1.job_pb2 import JobError, JobSpec, JobState, Progress
from luthier_server.change import Change
from luthier_server.errors import AlreadyExists, Exhausted, FailedPrecondition, NotFound
from luthier_server.job import QUEUED, VALIDATING, Job
from luthier_server.store import datasets as dataset_rows
from luthier_server.store import jobs as rows
from luthier_server.store import models as model_rows
from luthier_server.store.database import Transaction
from luthier_server.store.jobs import Checkpoint


@dataclass(frozen=True, slots=True)
class Draft:
    """A job that may be created.

    resolved: the spec with every default. first_state: VALIDATING or QUEUED. dataset_ids: what must not be deleted
    while the job is not at rest. reasons: why rules decided numbers as they did. model_id: the model that it cannot do
    without, if there is one; checkpoint_of: the same of the job whose checkpoint it works on. link: brings what the job
    needs of another one into its folder, and returns the checkpoints among that.
    """

    resolved: JobSpec
    first_state: JobState.ValueType
    dataset_ids: Sequence[str] = ()
    reasons: Sequence[str] = ()
    model_id: str = ""
    checkpoint_of: str = ""
    link: Callable[[Job], Awaitable[list[Checkpoint]]] | None = None


def body_of(spec: Message) -> str:
    """What tells a request's body from another's."""
    return hashlib.sha256(spec.SerializeToString(deterministic=True)).hexdigest()


def new_job(job_id: str, tenant: str, spec: JobSpec, resolved: JobSpec, now: int) -> Job:
    """A job that is nowhere yet."""
    return Job(
        id=job_id,
        tenant=tenant,
        state=JobState.JOB_STATE_UNSPECIFIED,
        spec=spec,
        resolved_spec=resolved,
        error=JobError(),
        progress=Progress(),
        attempt=0,
        retries=0,
        last_sequence=0,
        model_id="",
        create_time=now,
        start_time=0,
        end_time=0,
    )


async def store(
    transaction: Transaction,
    job: Job,
    draft: Draft,
    checkpoints: Sequence[Checkpoint],
    request_id: str,
    body: str,
    max_queued: int,
) -> Change:
    """Adds a new job with all that it holds; returns its first events, which are not written yet.

    Raises Exhausted, NotFound, AlreadyExists, FailedPrecondition, and sqlite3.IntegrityError when the request id is
    taken.
    """
    [count] = await transaction.fetch(
        "SELECT count(*) AS queued FROM jobs WHERE tenant = ? AND state IN (?, ?)", (job.tenant, QUEUED, VALIDATING)
    )
    if count["queued"] >= max_queued:
        raise Exhausted(
            f"{count['queued']} jobs wait already: try again when some have ended",
            subject="queue",
            reason="QUEUE_FULL",
            retry_seconds=30,
        )
    if request_id and (buried := await rows.tombstone(transaction, job.tenant, request_id)):
        _refuse_buried(*buried, body, request_id)
    await rows.insert(transaction, job, request_id, body)
    await rows.insert_checkpoints(transaction, job.tenant, checkpoints)
    for dataset_id in draft.dataset_ids:
        if not await dataset_rows.present(transaction, job.tenant, dataset_id):
            raise NotFound("dataset", dataset_id)
        await dataset_rows.hold(transaction, job.tenant, dataset_id, job.id)
    if draft.model_id and not await model_rows.present(transaction, job.tenant, draft.model_id):
        raise NotFound("model", draft.model_id, "it was deleted just now")
    if draft.checkpoint_of and await rows.load(transaction, draft.checkpoint_of) is None:
        raise NotFound("job", draft.checkpoint_of, "it was deleted just now")
    change = Change(job, job.create_time)
    if draft.first_state == VALIDATING:
        change.move(VALIDATING, "SUBMITTED", "its datasets are checked for its base model")
    else:
        change.move(QUEUED, "SUBMITTED", "waits for a free slot")
    for reason in draft.reasons:
        change.emit(LogEmitted(level=LogLevel.LOG_LEVEL_INFO, message=reason))
    return change


def same_request(job: Job, body_then: str, body: str, request_id: str) -> Job:
    """The job that a request made before. Raises AlreadyExists when its body was another."""
    if body_then != body:
        raise _reused(request_id)
    return job


def _refuse_buried(job_id: str, body_then: str, body: str, request_id: str) -> None:
    if body_then == body:
        raise FailedPrecondition(
            f"request_id {request_id} made job '{job_id}', which was deleted: send a new one",
            subject=job_id,
            reason="JOB_DELETED",
        )
    raise _reused(request_id)


def _reused(request_id: str) -> AlreadyExists:
    return AlreadyExists(
        f"request_id {request_id} was used for another spec: send a new one",
        kind="request_id",
        name=request_id,
        reason="REQUEST_ID_REUSED",
    )
