"""The database: one writer task that commits groups, a few readers, and the migrations.

`synchronous=FULL` and WAL: what `write` returned is on the disk. The writer alone begins transactions, so a cancelled
caller can never leave one open (with aiosqlite, a task cancelled while awaiting BEGIN would), and it alone runs
checkpoints (two connections that checkpoint can corrupt a WAL, SQLite 3.7.0 to 3.51.2).
"""

import asyncio
import contextlib
import sqlite3
from collections.abc import Awaitable, Callable, Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Generic, TypeVar

import aiosqlite
import structlog

from luthier_server import failpoints
from luthier_server.errors import StorageFull, StoreBusy, StoreCorrupt

T = TypeVar("T")
Row = sqlite3.Row
log = structlog.get_logger()

_GROUP = 256
_READERS = 2
_PRAGMAS = ("PRAGMA foreign_keys=ON", "PRAGMA busy_timeout=5000", "PRAGMA synchronous=FULL")
_WRITE_FAILED = {
    sqlite3.SQLITE_IOERR_WRITE,
    sqlite3.SQLITE_IOERR_FSYNC,
    sqlite3.SQLITE_IOERR_DIR_FSYNC,
    sqlite3.SQLITE_IOERR_TRUNCATE,
    sqlite3.SQLITE_IOERR_SHMSIZE,
}
# Whatever else the system may fail at, and not do so the next time. Whoever waits for a locked database waits here too.
_PASSING = {
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_INTERRUPT,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_PROTOCOL,
    sqlite3.SQLITE_READONLY,
}


class Transaction:
    """What a write may do: statements in the writer's transaction, and calls once they are on the disk."""

    def __init__(self, connection: aiosqlite.Connection) -> None:
        self._connection = connection
        self.committed: list[Callable[[], None]] = []

    async def execute(self, sql: str, parameters: Sequence[Any] = ()) -> int:
        """Runs a statement; returns the number of rows it changed."""
        await failpoints.reach("database_call")
        async with self._connection.execute(sql, parameters) as cursor:
            return cursor.rowcount

    async def execute_many(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        """Runs a statement once for each row, in one hop."""
        await failpoints.reach("database_call")
        async with self._connection.executemany(sql, rows):
            pass

    async def fetch(self, sql: str, parameters: Sequence[Any] = ()) -> list[Row]:
        """All rows of a query, as the transaction sees them."""
        await failpoints.reach("database_call")
        return list(await self._connection.execute_fetchall(sql, parameters))

    def after_commit(self, call: Callable[[], None]) -> None:
        """`call` runs once the transaction is durable, and not at all if it is not."""
        self.committed.append(call)


class _Request(Generic[T]):
    def __init__(self, work: Callable[[Transaction], Awaitable[T]], done: "asyncio.Future[T]") -> None:
        self.work = work
        self.done = done
        self.transaction: Transaction | None = None
        self.result: T | None = None
        self.error: Exception | None = None


class Database:
    """An open database. Made by `open`, ended by `close`."""

    def __init__(self, path: Path, writer: aiosqlite.Connection, readers: Sequence[aiosqlite.Connection]) -> None:
        self.path = path
        self._writer = writer
        self._all_readers = tuple(readers)
        self._readers: asyncio.LifoQueue[aiosqlite.Connection] = asyncio.LifoQueue()
        for reader in readers:
            self._readers.put_nowait(reader)
        self._requests: asyncio.Queue[_Request[Any] | None] = asyncio.Queue()
        self._task = asyncio.create_task(self._write_groups(), name="database writer")

    @classmethod
    async def open(cls, path: Path) -> "Database":
        """Opens or creates the database and brings it to the newest schema.

        Raises StoreCorrupt for a file that is not a sound database, or one of a newer Luthier.
        """
        connections: list[aiosqlite.Connection] = []
        try:
            for mode in ("rwc", *["ro"] * _READERS):
                connection = await aiosqlite.connect(
                    f"{path.absolute().as_uri()}?mode={mode}", uri=True, isolation_level=None
                )
                connections.append(connection)
                connection.row_factory = sqlite3.Row
                for pragma in _PRAGMAS:
                    await connection.execute(pragma)
                if mode == "rwc":
                    await connection.execute("PRAGMA journal_mode=WAL")
                    await _migrate(connection, path)
        except BaseException as error:
            # A connection that is not closed keeps the process alive after the loop has ended.
            for connection in connections:
                await connection.close()
            if isinstance(error, sqlite3.DatabaseError | UnicodeDecodeError):
                # A damaged schema may come back as bytes that are no text.
                raise _translated(error) from error
            raise
        return cls(path, connections[0], connections[1:])

    async def write(self, work: Callable[[Transaction], Awaitable[T]]) -> T:
        """Runs `work` in a transaction and returns its result once that is durable.

        Writes of many callers share a commit; one that raises undoes only itself. A cancelled caller does not stop the
        write. Raises what `work` raised, StorageFull, StoreBusy or StoreCorrupt.
        """
        if self._task.done():
            raise RuntimeError("the database is closed")
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._requests.put_nowait(_Request(work, done))
        return await asyncio.shield(done)

    async def read(self, sql: str, parameters: Sequence[Any] = ()) -> list[Row]:
        """All rows of a query over what is committed."""
        if failpoints.PUBLISH_EARLY:
            return list(await self._writer.execute_fetchall(sql, parameters))
        reader = await self._readers.get()
        try:
            await failpoints.reach("database_call")
            return list(await reader.execute_fetchall(sql, parameters))
        except sqlite3.DatabaseError as error:
            raise _translated(error) from error
        finally:
            self._readers.put_nowait(reader)

    async def close(self) -> None:
        """Commits what is waiting and closes every connection."""
        self._requests.put_nowait(None)
        await self._task
        for connection in (*self._all_readers, self._writer):
            await connection.close()

    async def _write_groups(self) -> None:
        closing = False
        while not closing:
            request = await self._requests.get()
            group: list[_Request[Any]] = []
            while True:
                if request is None:
                    closing = True
                    break
                group.append(request)
                if len(group) == _GROUP or self._requests.empty():
                    break
                request = self._requests.get_nowait()
            if group:
                await self._commit(group)

    async def _commit(self, group: Sequence[_Request[Any]]) -> None:
        try:
            await failpoints.reach("database_call")
            await self._writer.execute("BEGIN IMMEDIATE")
            for request in group:
                await self._run(request, alone=len(group) == 1)
            if self._writer.in_transaction:
                if failpoints.PUBLISH_EARLY:
                    await _publish_early(group)
                await failpoints.reach("before_commit")
                await self._writer.execute("COMMIT")
                await failpoints.reach("after_commit_before_publish")
        except sqlite3.DatabaseError as error:
            failure = _translated(error)
            log.error("commit failed", requests=len(group), error=str(error))
            # SQLite undoes the transaction by itself on a full disk, and then a ROLLBACK raises.
            if self._writer.in_transaction:
                with contextlib.suppress(sqlite3.DatabaseError):
                    await self._writer.execute("ROLLBACK")
            for request in group:
                request.error = request.error or failure
        for request in group:
            self._answer(request)

    async def _run(self, request: _Request[Any], *, alone: bool) -> None:
        transaction = Transaction(self._writer)
        if not alone:
            await self._writer.execute("SAVEPOINT request")
        try:
            request.result = await request.work(transaction)
        except sqlite3.OperationalError:
            raise
        except Exception as error:
            request.error = error if isinstance(error, sqlite3.IntegrityError) else _translated(error)
            if alone:
                await self._writer.execute("ROLLBACK")
            else:
                await self._writer.execute("ROLLBACK TO request")
        else:
            request.transaction = transaction
        if not alone:
            await self._writer.execute("RELEASE request")

    def _answer(self, request: _Request[Any]) -> None:
        if request.error is None and request.transaction is not None:
            for call in request.transaction.committed:
                call()
        if request.done.done():
            return
        if request.error is not None:
            request.done.set_exception(request.error)
            request.done.exception()  # a caller that is gone reads no exception
        else:
            request.done.set_result(request.result)


async def _publish_early(group: Sequence[_Request[Any]]) -> None:
    """What the known-bad build does, with time for watchers to see it."""
    for request in group:
        if request.transaction is not None:
            for call in request.transaction.committed:
                call()
    await asyncio.sleep(0.1)


async def _migrate(writer: aiosqlite.Connection, path: Path) -> None:
    files = sorted(
        (each for each in resources.files(__package__).joinpath("migrations").iterdir() if each.name.endswith(".sql")),
        key=lambda each: each.name,
    )
    [(version,)] = await writer.execute_fetchall("PRAGMA user_version")
    if version > len(files):
        raise StoreCorrupt(
            f"{path} was made by a newer Luthier (schema {version}, this one knows {len(files)}): "
            "start that version, or another --data-dir"
        )
    if 0 < version < len(files):
        backup = path.with_name(f"{path.name}.schema-{version}")
        async with aiosqlite.connect(backup) as copy:
            await writer.backup(copy)
    for number, file in enumerate(files[version:], start=version + 1):
        script = file.read_text()
        await writer.executescript(f"BEGIN IMMEDIATE;\n{script}\nPRAGMA user_version={number};\nCOMMIT;")


def _translated(error: Exception) -> Exception:
    code = getattr(error, "sqlite_errorcode", 0)
    if code == sqlite3.SQLITE_FULL or code in _WRITE_FAILED:
        return StorageFull()
    if code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StoreBusy("the database is locked by another process", retry_seconds=1)
    if code & 0xFF in _PASSING:
        return StoreBusy(f"the database cannot be used just now ({error})", retry_seconds=1)
    no_text = isinstance(error, UnicodeDecodeError) or "decode to UTF-8" in str(error)
    if no_text or code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return StoreCorrupt("the database is damaged: stop luthierd and restore a backup")
    return error
