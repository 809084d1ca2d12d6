"""Deleting models: refused while something depends on one, and whole even when the server dies half-way."""

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import structlog

from luthier_server.errors import FailedPrecondition, InvalidArgument, NotFound, Obstacle, Violation
from luthier_server.job import TERMINAL
from luthier_server.references import is_model_id
from luthier_server.store import model_names as name_rows
from luthier_server.store import models as rows
from luthier_server.store.database import Database, Transaction

log = structlog.get_logger()
Dependents: TypeAlias = Callable[[Transaction, str, str], Awaitable[Sequence[Obstacle]]]
"""Tells what depends on a model, by (transaction, tenant, model id)."""

GONE = ".gone-"
"""Begins the name of a directory that is being deleted."""


async def aliases(transaction: Transaction, tenant: str, model_id: str) -> Sequence[Obstacle]:
    """The aliases that point to a model."""
    found = await name_rows.aliases_of(transaction, tenant, model_id)
    return [Obstacle("ALIAS", each, f"the alias {each} points to it: move or delete it") for each in found]


async def children(transaction: Transaction, tenant: str, model_id: str) -> Sequence[Obstacle]:
    """The models that go on from a model."""
    found = await transaction.fetch(
        "SELECT id FROM models WHERE tenant = ? AND parent_model = ? ORDER BY id LIMIT 20", (tenant, model_id)
    )
    return [Obstacle("MODEL", row["id"], f"{row['id']} goes on from it: delete that one first") for row in found]


async def jobs(transaction: Transaction, tenant: str, model_id: str) -> Sequence[Obstacle]:
    """The jobs that go on from a model, export it or export a checkpoint of a job that goes on from it, and have not
    ended: one that is paused will need it again."""
    ended = tuple(TERMINAL)
    found = await transaction.fetch(
        "WITH living AS (SELECT id, json_extract(resolved_spec, '$.fineTune.baseModel') AS base,"
        " json_extract(resolved_spec, '$.export.model') AS exported FROM jobs"
        f" WHERE tenant = ? AND state NOT IN ({', '.join('?' * len(ended))}))"
        " SELECT living.id FROM living LEFT JOIN jobs AS tuned"
        " ON tuned.id = substr(exported, 1, instr(exported, ':') - 1)"
        " WHERE ? IN (base, exported, json_extract(tuned.resolved_spec, '$.fineTune.baseModel'))"
        " ORDER BY living.id LIMIT 20",
        (tenant, *ended, model_id),
    )
    return [Obstacle("JOB", row["id"], f"{row['id']} needs it: wait for it, or cancel it") for row in found]


DEPENDENTS: Sequence[Dependents] = (aliases, children, jobs)


class Deletions:
    """Deletes models of every tenant, over `models/ID`. dependents: who is asked what depends on a model."""

    def __init__(self, database: Database, models_dir: Path, dependents: Sequence[Dependents] = DEPENDENTS) -> None:
        self._database = database
        self._models_dir = models_dir
        self._dependents = tuple(dependents)

    async def delete(self, tenant: str, model_id: str) -> None:
        """Deletes a model, named by its id, with its files, tags and versions; their numbers are not given again.

        Raises InvalidArgument for anything but an id, NotFound, and FailedPrecondition MODEL_IN_USE with an obstacle
        for each thing that depends on it.
        """
        if not is_model_id(model_id):
            rule = "must be a model's id, model_..., so that nothing else goes with it"
            raise InvalidArgument(f"model_id: {rule}", [Violation("model_id", rule)])

        async def work(transaction: Transaction) -> None:
            if not await rows.present(transaction, tenant, model_id):
                raise NotFound("model", model_id)
            obstacles = [each for ask in self._dependents for each in await ask(transaction, tenant, model_id)]
            if obstacles:
                named = ", ".join(each.subject for each in obstacles[:10])
                more = f" and {len(obstacles) - 10} more" if len(obstacles) > 10 else ""
                raise FailedPrecondition(
                    f"model '{model_id}' is needed by {named}{more}",
                    subject=model_id,
                    reason="MODEL_IN_USE",
                    obstacles=obstacles,
                )
            await rows.delete(transaction, tenant, model_id)

        await self._database.write(work)
        # The row goes first: what a crash leaves here is no model any more, and the next start sweeps it.
        await asyncio.to_thread(_remove, self._models_dir / model_id)

    async def sweep(self) -> int:
        """Removes what no model is: half-written and half-deleted directories, and those of attempts that ended without
        one. To be called before anything is written, with every attempt that has ended settled. Returns how many."""
        found = await self._database.read(
            "SELECT id FROM models UNION ALL SELECT model_id FROM attempts WHERE end_time = 0"
        )
        return await asyncio.to_thread(_sweep, self._models_dir, {row["id"] for row in found})


def _remove(directory: Path) -> None:
    """Deletes a directory. It is renamed first: a reader never meets one that is half gone."""
    doomed = directory.with_name(f"{GONE}{directory.name}")
    try:
        directory.rename(doomed)
    except FileNotFoundError:
        return
    shutil.rmtree(doomed, ignore_errors=True)


def _sweep(models_dir: Path, known: set[str]) -> int:
    swept = 0
    for directory in models_dir.iterdir():
        # A name may follow a prefix: `.tmp-model_...` is what the trainer of a living attempt writes.
        _, _, number = directory.name.rpartition("model_")
        if f"model_{number}" in known and not directory.name.startswith(GONE):
            continue
        if is_model_id(f"model_{number}"):
            log.info("swept", directory=directory.name)
            shutil.rmtree(directory, ignore_errors=True)
            swept += 1
    return swept
