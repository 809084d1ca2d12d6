"""What the server does by the clock: old events and uploads that broke off go, and jobs that a full disk has paused go
on when there is room."""

import asyncio
import functools
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from luthier_server.errors import LuthierError
from luthier_server.job import STORAGE_FULL
from luthier_server.jobs import Jobs, microseconds
from luthier_server.store.database import Database, Transaction
from luthier_server.store.jobs import Jobs as JobRows
from luthier_server.uploads import Uploads

log = structlog.get_logger()
_DAY = 24 * 3600 * 1_000_000
_TOMBSTONE_DAYS = 7
_COMPACT_SECONDS = 3600


@dataclass(frozen=True, slots=True)
class UpkeepSettings:
    """retention_days: how long the events of an ended job stay whole; free_bytes: room at which jobs go on."""

    data_dir: Path
    retention_days: float = 30
    free_bytes: int = 256 * 2**20
    every_seconds: float = 5


class Upkeep:
    """Looks after the data directory until it is cancelled."""

    def __init__(
        self,
        settings: UpkeepSettings,
        database: Database,
        jobs: Jobs,
        uploads: Uploads,
        clock: Callable[[], int] = microseconds,
    ) -> None:
        self._uploads = uploads
        self._settings = settings
        self._database = database
        self._rows = JobRows(database)
        self._jobs = jobs
        self._clock = clock

    async def run(self) -> None:
        """Does what is due, again and again."""
        compacted = float("-inf")
        while True:
            try:
                await self.resume_stored()
                if time.monotonic() - compacted > _COMPACT_SECONDS:
                    compacted = time.monotonic()
                    await self.compact()
                    await asyncio.to_thread(self._uploads.sweep)
            except LuthierError as error:
                log.warning("upkeep waits", error=str(error))
            await asyncio.sleep(self._settings.every_seconds)

    async def resume_stored(self) -> None:
        """Queues the jobs that a full disk has paused, once there is room."""
        waiting = await self._rows.paused_for(STORAGE_FULL)
        if not waiting or shutil.disk_usage(self._settings.data_dir).free < self._settings.free_bytes:
            return
        for job_id in waiting:
            log.info("the disk has room again", job_id=job_id)
            await self._jobs.resume("default", job_id, "STORAGE_FREE")

    async def compact(self) -> int:
        """Deletes the events, all but the last, of jobs whose end is past the retention. Returns how many jobs.

        Running jobs and terminal events are never compacted.
        """
        now = self._clock()
        found = await self._database.read(
            "SELECT id FROM jobs WHERE end_time > 0 AND end_time < ? AND compacted_sequence < last_sequence - 1"
            " LIMIT 100",
            (now - int(self._settings.retention_days * _DAY),),
        )
        for row in found:
            await self._database.write(functools.partial(_compact, job_id=row["id"]))
        await self._database.write(lambda transaction: _forget(transaction, now - _TOMBSTONE_DAYS * _DAY))
        return len(found)


async def _compact(transaction: Transaction, job_id: str) -> None:
    await transaction.execute(
        "DELETE FROM events WHERE job_id = ? AND sequence < (SELECT last_sequence FROM jobs WHERE id = ?)",
        (job_id, job_id),
    )
    await transaction.execute("UPDATE jobs SET compacted_sequence = last_sequence - 1 WHERE id = ?", (job_id,))


async def _forget(transaction: Transaction, older_than: int) -> None:
    await transaction.execute("DELETE FROM tombstones WHERE delete_time < ?", (older_than,))
