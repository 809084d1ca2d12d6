"""What the oracle judges: the rows, the trainers' spools, and what clients saw."""

import shutil
import sqlite3
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from luthier.trainer import attempt as files
from luthier.trainer.v1.report_pb2 import TrainerReport
from luthier.v1.event_pb2 import JobEvent
from luthier.v1.job_pb2 import Job, JobState, Progress


@dataclass(frozen=True, slots=True)
class JobRow:
    """A row of `jobs`, as far as it says what the log says as well."""

    id: str
    state: JobState.ValueType
    request_id: str
    attempt: int
    last_sequence: int
    model_id: str
    progress: Progress
    ended: bool
    export_id: str = ""


@dataclass(frozen=True, slots=True)
class AttemptRow:
    """A row of `attempts`."""

    job_id: str
    number: int
    spool_offset: int
    reports: int
    outcome: bytes
    ended: bool
    model_id: str


@dataclass(frozen=True, slots=True)
class Rows:
    """A database at one moment, read from the files alone: what is committed, and nothing else."""

    jobs: dict[str, JobRow]
    attempts: list[AttemptRow]
    events: dict[str, dict[int, JobEvent]]
    models: dict[str, str]
    exports: dict[str, str]
    integrity: str


def read_rows(database: Path) -> Rows:
    """Reads a database that nobody writes to, by a copy, so that its WAL stays for the next server to recover."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy.db"
        shutil.copyfile(database, copy)
        wal = database.with_name(database.name + "-wal")
        if wal.exists():
            shutil.copyfile(wal, copy.with_name("copy.db-wal"))
        connection = sqlite3.connect(copy)
        connection.row_factory = sqlite3.Row
        try:
            return _rows(connection)
        finally:
            connection.close()


def _rows(connection: sqlite3.Connection) -> Rows:
    [(integrity,)] = connection.execute("PRAGMA integrity_check(1)").fetchall()
    if not connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'attempts'").fetchall():
        return Rows({}, [], {}, {}, {}, integrity)
    # A server that was killed in its first moments may have left an older schema.
    exporting = connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'exports'").fetchall()
    jobs = {
        row["id"]: JobRow(
            id=row["id"],
            state=row["state"],
            request_id=row["request_id"] or "",
            attempt=row["attempt"],
            last_sequence=row["last_sequence"],
            model_id=row["model_id"],
            progress=Progress.FromString(row["progress"]),
            ended=bool(row["end_time"]),
            export_id=row["export_id"] if exporting else "",
        )
        for row in connection.execute("SELECT * FROM jobs")
    }
    attempts = [
        AttemptRow(
            job_id=row["job_id"],
            number=row["number"],
            spool_offset=row["spool_offset"],
            reports=row["reports"],
            outcome=row["outcome"],
            ended=bool(row["end_time"]),
            model_id=row["model_id"],
        )
        for row in connection.execute("SELECT * FROM attempts ORDER BY job_id, number")
    ]
    events: dict[str, dict[int, JobEvent]] = {job_id: {} for job_id in jobs}
    for row in connection.execute("SELECT job_id, sequence, payload FROM events ORDER BY job_id, sequence"):
        events.setdefault(row["job_id"], {})[row["sequence"]] = JobEvent.FromString(row["payload"])
    models = {row["id"]: row["job_id"] for row in connection.execute("SELECT id, job_id FROM models")}
    found = connection.execute("SELECT id, job_id FROM exports") if exporting else ()
    exports = {row["id"]: row["job_id"] for row in found}
    return Rows(jobs, attempts, events, models, exports, integrity)


@dataclass(frozen=True, slots=True)
class Spool:
    """An attempt's spool: each whole report with the offset after it, up to the first broken frame."""

    reports: Sequence[tuple[TrainerReport, int]]


def read_spool(attempt_dir: Path) -> Spool:
    """Reads a spool; one that is not there is empty."""
    try:
        data = (attempt_dir / files.SPOOL).read_bytes()
    except FileNotFoundError:
        data = b""
    return Spool([(TrainerReport.FromString(payload), end) for payload, end in files.frames(data)])


@dataclass(frozen=True, slots=True)
class Sighting:
    """An event in a client's hands. `life`: the newest server process that had been started by then, from 1."""

    life: int
    event: JobEvent


@dataclass
class Sightings:
    """What one watcher saw, in its order, over all its streams. `complete`: a status OK ended it."""

    watcher: str
    job_id: str
    after: int
    seen: list[Sighting] = field(default_factory=list)
    complete: bool = False
    complaints: list[str] = field(default_factory=list)

    @property
    def position(self) -> int:
        """Where the next stream starts."""
        return self.seen[-1].event.sequence if self.seen else self.after


@dataclass(frozen=True, slots=True)
class Answer:
    """A job in an answer to a call."""

    life: int
    job: Job
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Death:
    """The database as a server left it, however it left."""

    life: int
    rows: Rows


@dataclass
class Recording:
    """Everything that was noted of one data directory. `complaints`: what a client met that must not be."""

    jobs_dir: Path
    models_dir: Path
    exports_dir: Path
    deaths: list[Death] = field(default_factory=list)
    watchers: list[Sightings] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
