"""The append-only log of every job."""

from collections.abc import Sequence

from luthier.v1.event_pb2 import JobEvent
from luthier_server.store.database import Database, Transaction


class Events:
    """Reads and appends events."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def after(self, job_id: str, cursor: int, limit: int) -> list[bytes]:
        """Serialised JobEvents with sequence `cursor + 1` and on, at most `limit`, up to the first that is missing."""
        rows = await self._database.read(
            "SELECT sequence, payload FROM events WHERE job_id = ? AND sequence > ? ORDER BY sequence LIMIT ?",
            (job_id, cursor, limit),
        )
        return [row["payload"] for place, row in enumerate(rows, start=cursor + 1) if row["sequence"] == place]


async def append(transaction: Transaction, tenant: str, events: Sequence[JobEvent]) -> None:
    """Adds events whose sequences the caller allocated in the same transaction."""
    await transaction.execute_many(
        "INSERT INTO events (job_id, sequence, tenant, payload) VALUES (?, ?, ?, ?)",
        [(each.job_id, each.sequence, tenant, each.SerializeToString()) for each in events],
    )
