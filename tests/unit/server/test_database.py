"""The writer: groups, savepoints, cancellation, a full disk, migrations."""

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib import resources
from pathlib import Path

import pytest

from luthier_server.errors import NotFound, StorageFull, StoreBusy, StoreCorrupt
from luthier_server.store.database import Database, Transaction
from luthier_server.store.model_names import register
from luthier_server.store.models import Models


@contextlib.asynccontextmanager
async def opened(path: Path) -> AsyncIterator[Database]:
    database = await Database.open(path / "luthier.db")
    try:
        yield database
    finally:
        await database.close()


def put(key: str, value: str = "x") -> Callable[[Transaction], Awaitable[None]]:
    async def work(transaction: Transaction) -> None:
        await transaction.execute("INSERT INTO meta (key, value) VALUES (?, ?)", (key, value))

    return work


async def keys(database: Database) -> set[str]:
    return {row["key"] for row in await database.read("SELECT key FROM meta")} - {"history_id"}


async def test_a_write_that_raises_undoes_only_itself_within_its_group(tmp_path: Path) -> None:
    async with opened(tmp_path) as database:

        async def fail(transaction: Transaction) -> None:
            await transaction.execute("INSERT INTO meta (key, value) VALUES ('lost', 'x')")
            raise NotFound("job", "x")

        results = await asyncio.gather(
            *(database.write(put(f"k{n}") if n % 3 else fail) for n in range(30)),
            return_exceptions=True,
        )
        assert [isinstance(each, NotFound) for each in results] == [n % 3 == 0 for n in range(30)]
        assert await keys(database) == {f"k{n}" for n in range(30) if n % 3}


async def test_a_failed_write_alone_leaves_no_open_transaction(tmp_path: Path) -> None:
    async with opened(tmp_path) as database:
        await database.write(put("taken"))
        with pytest.raises(sqlite3.IntegrityError):
            await database.write(put("taken"))
        await database.write(put("next"))
        assert await keys(database) == {"taken", "next"}


async def test_a_cancelled_caller_neither_loses_its_write_nor_blocks_the_writer(tmp_path: Path) -> None:
    async with opened(tmp_path) as database:
        for n in range(50):
            caller = asyncio.create_task(database.write(put(f"k{n}")))
            await asyncio.sleep(0.0002 * (n % 5))
            caller.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await caller
        await database.write(put("last"))
        there = await keys(database)
        assert "last" in there
        # A caller that was cancelled before it began asked for nothing; every write that was asked for is there.
        assert len(there) >= 40


async def test_what_runs_after_a_commit_sees_it_on_another_connection(tmp_path: Path) -> None:
    async with opened(tmp_path) as database:
        seen: list[int] = []

        def look() -> None:
            with contextlib.closing(sqlite3.connect(tmp_path / "luthier.db")) as other:
                seen.append(other.execute("SELECT count(*) FROM meta WHERE key = 'k'").fetchone()[0])

        async def work(transaction: Transaction) -> None:
            await transaction.execute("INSERT INTO meta (key, value) VALUES ('k', 'x')")
            transaction.after_commit(look)

        await database.write(work)
        assert seen == [1]


async def test_what_should_run_after_a_commit_does_not_run_without_one(tmp_path: Path) -> None:
    async with opened(tmp_path) as database:
        called: list[bool] = []

        async def work(transaction: Transaction) -> None:
            transaction.after_commit(lambda: called.append(True))
            raise NotFound("job", "x")

        with pytest.raises(NotFound):
            await database.write(work)
        assert not called


async def test_a_full_database_fails_the_write_and_takes_the_next(tmp_path: Path) -> None:
    async with opened(tmp_path) as database:
        [row] = await database.read("PRAGMA page_count")
        pages = row[0]

        async def limit(transaction: Transaction, most: int) -> None:
            await transaction.fetch(f"PRAGMA max_page_count={most}")

        await database.write(lambda transaction: limit(transaction, pages + 1))
        with pytest.raises(StorageFull):
            await database.write(put("large", "x" * 100_000))
        await database.write(lambda transaction: limit(transaction, 100_000))
        await database.write(put("large", "x" * 100_000))
        assert await keys(database) == {"large"}


async def test_a_database_locked_by_another_process_is_busy_and_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from luthier_server.store import database as module

    monkeypatch.setattr(module, "_PRAGMAS", ("PRAGMA foreign_keys=ON", "PRAGMA busy_timeout=50"))
    async with opened(tmp_path) as database:
        with contextlib.closing(sqlite3.connect(tmp_path / "luthier.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(StoreBusy):
                await database.write(put("k"))
            other.execute("ROLLBACK")
        await database.write(put("k"))
        assert await keys(database) == {"k"}


async def test_full_durability_and_wal_are_on(tmp_path: Path) -> None:
    async with opened(tmp_path) as database:

        async def work(transaction: Transaction) -> tuple[str, int, int]:
            [mode] = await transaction.fetch("PRAGMA journal_mode")
            [sync] = await transaction.fetch("PRAGMA synchronous")
            [foreign] = await transaction.fetch("PRAGMA foreign_keys")
            return mode[0], sync[0], foreign[0]

        assert await database.write(work) == ("wal", 2, 1)


async def test_a_random_file_and_a_newer_schema_are_refused(tmp_path: Path) -> None:
    (tmp_path / "luthier.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(StoreCorrupt):
        await Database.open(tmp_path / "luthier.db")
    with contextlib.closing(sqlite3.connect(tmp_path / "newer.db")) as newer:
        newer.execute("PRAGMA user_version=999")
    with pytest.raises(StoreCorrupt, match="newer Luthier"):
        await Database.open(tmp_path / "newer.db")


async def test_every_table_has_a_tenant(tmp_path: Path) -> None:
    async with opened(tmp_path) as database:
        tables = [row["name"] for row in await database.read("SELECT name FROM sqlite_master WHERE type = 'table'")]
        assert len(tables) >= 9
        for table in tables:
            columns = {row["name"] for row in await database.read(f"PRAGMA table_info({table})")}
            assert "tenant" in columns or table == "meta", table


async def test_models_of_an_older_server_get_their_jobs_specs_and_their_parents(tmp_path: Path) -> None:
    path = tmp_path / "luthier.db"
    migrations = sorted(
        resources.files("luthier_server.store").joinpath("migrations").iterdir(), key=lambda each: each.name
    )
    parent, child = "model_01ARZ3NDEKTSV4RRFFQ69G5FA0", "model_01ARZ3NDEKTSV4RRFFQ69G5FA1"
    with contextlib.closing(sqlite3.connect(path)) as old:
        for file in migrations[:3]:
            old.executescript(file.read_text())
        old.execute("PRAGMA user_version=3")
        old.execute(
            "INSERT INTO jobs (id, state, spec, resolved_spec, request_sha256, create_time)"
            " VALUES ('job_1', 8, '{\"displayName\": \"asked\"}',"
            ' \'{"displayName": "decided", "fineTune": {"baseModelRevision": "v1"}}\', \'\', 1)'
        )
        for model_id, job_id, base in ((parent, "job_gone", "model_zoo/x"), (child, "job_1", parent)):
            old.execute(
                "INSERT INTO models (id, name, job_id, base_model, adaptation, step, size_bytes, create_time)"
                " VALUES (?, 'n', ?, ?, 'lora', 1, 1, 1)",
                (model_id, job_id, base),
            )
        old.commit()
    async with opened(tmp_path) as database:
        models = Models(database)
        before, after = await models.get("default", parent), await models.get("default", child)
        assert before is not None
        assert after is not None
        assert (before.parent_model, before.spec, before.base_licence) == ("", None, "")
        assert (before.base_model_revision, after.base_model_revision) == ("", "v1")
        assert after.parent_model == parent
        assert after.spec is not None
        assert after.resolved_spec is not None
        assert (after.spec.display_name, after.resolved_spec.display_name) == ("asked", "decided")
        assert [each.id for each in await models.children("default", parent)] == [child]
        await database.write(lambda transaction: register(transaction, "default", "old", child, 1))
        assert [
            each.name for each in (await models.page("default", below="", limit=9, id_prefix="", name="old", tags={}))
        ]
    assert path.with_name("luthier.db.schema-3").exists()
