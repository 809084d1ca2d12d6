"""Jobs and their attempts and checkpoints as rows. The mapping from a row to a Job stands here alone."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from google.protobuf import json_format
from google.protobuf.message import DecodeError

from luthier.v1.event_pb2 import DatasetsChecked, JobEvent
from luthier.v1.job_pb2 import JobError, JobSpec, JobState, Progress
from luthier_server.errors import StoreCorrupt
from luthier_server.job import PAUSED, PAUSING, PREPARING, QUEUED, RUNNING, TERMINAL, VALIDATING, Job
from luthier_server.lanes import Lane
from luthier_server.store.database import Database, Row, Transaction

_CHECKED_TAG = JobEvent(datasets_checked=DatasetsChecked()).SerializeToString()[:2]
"""What the field begins with in every serialized event that has it."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One trainer's life, as far as the server has read it. `outcome` is its last report (proto bytes), or empty."""

    job_id: str
    number: int
    spool_offset: int
    reports: int
    reason: str
    resume_from: str
    model_id: str
    pid: int
    outcome: bytes
    slot: int
    end_time: int
    lane: str = "device"
    export_id: str = ""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint on disk, below the job's `checkpoints`."""

    job_id: str
    step: int
    attempt: int
    directory: str
    size_bytes: int
    create_time: int


@functools.lru_cache(maxsize=8192)
def _spec(text: str) -> JobSpec:
    # Specs never change, and parsing one costs more than reading its row. Nobody may write to what comes from here.
    return json_format.Parse(text, JobSpec())


def _job(row: Row) -> Job:
    try:
        return _parsed(row)
    except (json_format.ParseError, DecodeError) as error:
        raise StoreCorrupt(f"job '{row['id']}' is damaged in the database: restore a backup") from error


def _parsed(row: Row) -> Job:
    return Job(
        id=row["id"],
        tenant=row["tenant"],
        state=row["state"],
        spec=_spec(row["spec"]),
        resolved_spec=_spec(row["resolved_spec"]),
        error=JobError.FromString(row["error"]),
        progress=Progress.FromString(row["progress"]),
        attempt=row["attempt"],
        retries=row["retries"],
        last_sequence=row["last_sequence"],
        model_id=row["model_id"],
        create_time=row["create_time"],
        start_time=row["start_time"],
        end_time=row["end_time"],
        retry_time=row["retry_time"],
        pause_reason=row["pause_reason"],
        compacted_sequence=row["compacted_sequence"],
        export_id=row["export_id"],
    )


def _attempt(row: Row) -> Attempt:
    return Attempt(**{name: row[name] for name in Attempt.__slots__})


class Jobs:
    """Reads jobs; the functions below write them, inside a transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def get(self, tenant: str, job_id: str) -> Job | None:
        """The job, or None."""
        rows = await self._database.read("SELECT * FROM jobs WHERE tenant = ? AND id = ?", (tenant, job_id))
        return _job(rows[0]) if rows else None

    async def by_request(self, tenant: str, request_id: str) -> tuple[Job, str] | None:
        """The job that a request made, and the SHA-256 of that request's body."""
        rows = await self._database.read("SELECT * FROM jobs WHERE tenant = ? AND request_id = ?", (tenant, request_id))
        return (_job(rows[0]), rows[0]["request_sha256"]) if rows else None

    async def page(
        self,
        tenant: str,
        *,
        below: str,
        limit: int,
        states: Sequence[JobState.ValueType],
        labels: Mapping[str, str],
        id_prefix: str,
    ) -> list[Job]:
        """Jobs newest first, with ids below `below` (empty: from the newest)."""
        sql = ["SELECT * FROM jobs WHERE tenant = ?"]
        parameters: list[str | int] = [tenant]
        if below:
            sql.append("AND id < ?")
            parameters.append(below)
        if states:
            sql.append(f"AND state IN ({', '.join('?' * len(states))})")
            parameters.extend(states)
        for key, value in labels.items():
            sql.append("AND id IN (SELECT job_id FROM job_labels WHERE tenant = ? AND key = ? AND value = ?)")
            parameters.extend((tenant, key, value))
        if id_prefix:
            sql.append("AND id >= ? AND id < ?")
            parameters.extend((id_prefix, id_prefix + "\U0010ffff"))
        sql.append("ORDER BY id DESC LIMIT ?")
        parameters.append(limit)
        return [_job(row) for row in await self._database.read(" ".join(sql), parameters)]

    async def queued(self, tenant: str) -> list[tuple[str, str]]:
        """The jobs that wait for a slot, as id and lane, of each lane the next one first."""
        rows = await self._database.read(
            "SELECT id, lane FROM jobs WHERE tenant = ? AND state = ? ORDER BY id", (tenant, QUEUED)
        )
        return [(row["id"], row["lane"]) for row in rows]

    async def validating(self) -> list[Job]:
        """Jobs that are being validated, the oldest first; at most 100."""
        rows = await self._database.read(
            "SELECT * FROM jobs WHERE tenant = ? AND state = ? ORDER BY id LIMIT 100", ("default", VALIDATING)
        )
        return [_job(row) for row in rows]

    async def unchecked(self, reason: str) -> list[Job]:
        """Jobs, the oldest first, that were queued for this reason while the check of their datasets went on, have not
        ended, and have no DatasetsChecked in their log."""
        states = (QUEUED, PREPARING, RUNNING, PAUSING, PAUSED)
        rows = await self._database.read(
            f"SELECT * FROM jobs WHERE tenant = ? AND state IN ({', '.join('?' * len(states))}) AND EXISTS"
            " (SELECT 1 FROM events WHERE job_id = jobs.id AND instr(payload, ?) > 0) ORDER BY id",
            ("default", *states, reason.encode()),
        )
        found = []
        for row in rows:
            # The field's tag picks out a few of what may be tens of thousands: other payloads may have its bytes too.
            logged = await self._database.read(
                "SELECT payload FROM events WHERE job_id = ? AND instr(payload, ?) > 0", (row["id"], _CHECKED_TAG)
            )
            if not any(JobEvent.FromString(each["payload"]).HasField("datasets_checked") for each in logged):
                found.append(_job(row))
        return found

    async def newest_rate(self, tenant: str, base_model: str) -> float:
        """Tokens a second that the newest of the last 200 jobs on a base model reached; 0 when none did."""
        rows = await self._database.read(
            "SELECT progress, resolved_spec FROM jobs WHERE tenant = ? AND end_time > 0 ORDER BY id DESC LIMIT 200",
            (tenant,),
        )
        for row in rows:
            rate = Progress.FromString(row["progress"]).tokens_per_second
            if rate and _spec(row["resolved_spec"]).fine_tune.base_model == base_model:
                return rate
        return 0

    async def paused_for(self, reason: str) -> list[str]:
        """Ids of the jobs that are paused for this reason."""
        rows = await self._database.read(
            "SELECT id FROM jobs WHERE tenant = ? AND state = ? AND pause_reason = ? ORDER BY id",
            ("default", PAUSED, reason),
        )
        return [row["id"] for row in rows]

    async def open_attempts(self) -> list[Attempt]:
        """Attempts that nobody has settled."""
        rows = await self._database.read("SELECT * FROM attempts WHERE end_time = 0 ORDER BY job_id, number")
        return [_attempt(row) for row in rows]

    async def attempt(self, job_id: str, number: int) -> Attempt:
        """An attempt that exists."""
        rows = await self._database.read("SELECT * FROM attempts WHERE job_id = ? AND number = ?", (job_id, number))
        return _attempt(rows[0])

    async def made(self, tenant: str, model_id: str) -> bool:
        """Whether a job made this model, also when that was deleted since."""
        sql = "SELECT 1 FROM jobs WHERE tenant = ? AND model_id = ? LIMIT 1"
        return bool(await self._database.read(sql, (tenant, model_id)))

    async def checkpoints(self, tenant: str, job_id: str) -> list[Checkpoint]:
        """Checkpoints, newest first: by attempt, then by step."""
        rows = await self._database.read(
            "SELECT * FROM checkpoints WHERE tenant = ? AND job_id = ? ORDER BY attempt DESC, step DESC",
            (tenant, job_id),
        )
        return [Checkpoint(**{name: row[name] for name in Checkpoint.__slots__}) for row in rows]


async def insert(transaction: Transaction, job: Job, request_id: str, request_sha256: str) -> None:
    """Adds a job with its labels. Raises sqlite3.IntegrityError when the request id is taken."""
    await transaction.execute(
        "INSERT INTO jobs (id, tenant, state, spec, resolved_spec, request_id, request_sha256, create_time, lane)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            job.id,
            job.tenant,
            job.state,
            json_format.MessageToJson(job.spec, indent=None),
            json_format.MessageToJson(job.resolved_spec, indent=None),
            request_id or None,
            request_sha256,
            job.create_time,
            job.lane,
        ),
    )
    if job.spec.labels:
        await transaction.execute_many(
            "INSERT INTO job_labels (tenant, key, value, job_id) VALUES (?, ?, ?, ?)",
            [(job.tenant, key, value, job.id) for key, value in job.spec.labels.items()],
        )


async def load(transaction: Transaction, job_id: str) -> Job | None:
    """The job as the transaction sees it, or None."""
    rows = await transaction.fetch("SELECT * FROM jobs WHERE id = ?", (job_id,))
    return _job(rows[0]) if rows else None


async def save(transaction: Transaction, job: Job) -> None:
    """Writes everything of a job that can change."""
    await transaction.execute(
        "UPDATE jobs SET state = ?, error = ?, progress = ?, attempt = ?, retries = ?, last_sequence = ?, model_id = ?,"
        " export_id = ?, start_time = ?, end_time = ?, retry_time = ?, pause_reason = ? WHERE id = ?",
        (
            job.state,
            job.error.SerializeToString(),
            job.progress.SerializeToString(),
            job.attempt,
            job.retries,
            job.last_sequence,
            job.model_id,
            job.export_id,
            job.start_time,
            job.end_time,
            job.retry_time,
            job.pause_reason,
            job.id,
        ),
    )


async def load_attempt(transaction: Transaction, job_id: str, number: int) -> Attempt:
    """An attempt that exists, as the transaction sees it."""
    rows = await transaction.fetch("SELECT * FROM attempts WHERE job_id = ? AND number = ?", (job_id, number))
    return _attempt(rows[0])


async def insert_attempt(transaction: Transaction, attempt: Attempt, tenant: str, now: int) -> None:
    """Adds an attempt that is about to start."""
    await transaction.execute(
        "INSERT INTO attempts (tenant, job_id, number, reason, resume_from, model_id, export_id, lane, slot,"
        " start_time) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            tenant,
            attempt.job_id,
            attempt.number,
            attempt.reason,
            attempt.resume_from,
            attempt.model_id,
            attempt.export_id,
            attempt.lane,
            attempt.slot,
            now,
        ),
    )


async def save_attempt(transaction: Transaction, attempt: Attempt) -> None:
    """Writes how far an attempt's spool is ingested, and its end."""
    await transaction.execute(
        "UPDATE attempts SET spool_offset = ?, reports = ?, pid = ?, outcome = ?, end_time = ?"
        " WHERE job_id = ? AND number = ?",
        (
            attempt.spool_offset,
            attempt.reports,
            attempt.pid,
            attempt.outcome,
            attempt.end_time,
            attempt.job_id,
            attempt.number,
        ),
    )


async def insert_checkpoints(transaction: Transaction, tenant: str, checkpoints: Sequence[Checkpoint]) -> None:
    """Adds checkpoints that are on disk."""
    await transaction.execute_many(
        "INSERT OR REPLACE INTO checkpoints (tenant, job_id, step, attempt, directory, size_bytes, create_time)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        [
            (tenant, each.job_id, each.step, each.attempt, each.directory, each.size_bytes, each.create_time)
            for each in checkpoints
        ],
    )


async def exporting_checkpoints(transaction: Transaction, tenant: str, job_id: str) -> list[str]:
    """The jobs that export a checkpoint of a job and have not ended, also paused ones; at most 10."""
    ended = tuple(TERMINAL)
    rows = await transaction.fetch(
        "SELECT id FROM jobs WHERE tenant = ? AND lane = ?"
        f" AND state NOT IN ({', '.join('?' * len(ended))})"
        " AND json_extract(resolved_spec, '$.export.model') LIKE ? LIMIT 10",
        (tenant, Lane.CPU, *ended, f"{job_id}:%"),
    )
    return [row["id"] for row in rows]


async def bury(transaction: Transaction, job: Job, now: int) -> None:
    """Deletes a job with everything that hangs on it; its request is remembered."""
    await transaction.execute(
        "INSERT OR REPLACE INTO tombstones (tenant, request_id, request_sha256, job_id, delete_time)"
        " SELECT tenant, request_id, request_sha256, id, ? FROM jobs WHERE id = ? AND request_id IS NOT NULL",
        (now, job.id),
    )
    await transaction.execute("DELETE FROM jobs WHERE id = ?", (job.id,))


async def tombstone(transaction: Transaction, tenant: str, request_id: str) -> tuple[str, str] | None:
    """The id and body hash of the deleted job that a request made, or None."""
    rows = await transaction.fetch(
        "SELECT job_id, request_sha256 FROM tombstones WHERE tenant = ? AND request_id = ?", (tenant, request_id)
    )
    return (rows[0]["job_id"], rows[0]["request_sha256"]) if rows else None
