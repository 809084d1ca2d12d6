"""Names of models as rows: their versions, and the aliases that point to them."""

from collections.abc import Sequence
from dataclasses import dataclass

from luthier_server.store.database import Database, Row, Transaction
from luthier_server.store.models import Version

MOST_MOVES = 50


@dataclass(frozen=True, slots=True)
class Move:
    """One place that an alias pointed to. before: the number of the move that a rollback from here goes to, 0 for none;
    time: microseconds since the epoch."""

    number: int
    version: int
    before: int
    time: int
    rollback: bool


@dataclass(frozen=True, slots=True)
class Alias:
    """An alias of a name, with the moves that it made, newest first."""

    name: str
    alias: str
    version: int
    model_id: str
    moves: Sequence[Move]


@dataclass(frozen=True, slots=True)
class Name:
    """A name with its versions, newest first, and its aliases."""

    name: str
    versions: Sequence[Version]
    aliases: Sequence[Alias]


_VERSIONS = "SELECT name, version, model_id, create_time FROM model_versions WHERE tenant = ? AND name = ?"
_ALIASES = (
    "SELECT name, alias, version, model_id FROM model_aliases JOIN model_versions USING (tenant, name, version)"
    " WHERE tenant = ? AND name = ?"
)
_MOVES = "SELECT alias, number, version, before, time, rollback FROM model_alias_moves WHERE tenant = ? AND name = ?"
_NEWEST_FIRST = " ORDER BY number DESC LIMIT ?"


def _move(row: Row) -> Move:
    return Move(row["number"], row["version"], row["before"], row["time"], bool(row["rollback"]))


class ModelNames:
    """Reads names of models; the functions below write them, inside a transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def get(self, tenant: str, name: str) -> Name:
        """A name; without versions when there is none."""
        versions = await self._database.read(_VERSIONS + " ORDER BY version DESC", (tenant, name))
        moves: dict[str, list[Move]] = {}
        for row in await self._database.read(_MOVES + " ORDER BY number DESC", (tenant, name)):
            moves.setdefault(row["alias"], []).append(_move(row))
        aliases = await self._database.read(_ALIASES + " ORDER BY alias", (tenant, name))
        return Name(
            name,
            tuple(Version(**dict(row)) for row in versions),
            tuple(Alias(**dict(row), moves=tuple(moves.get(row["alias"], ()))) for row in aliases),
        )

    async def last_version(self, tenant: str, name: str) -> int:
        """The newest number that was given, also when that version was deleted; 0 for a name that never was one."""
        rows = await self._database.read(
            "SELECT last_version FROM model_names WHERE tenant = ? AND name = ?", (tenant, name)
        )
        return int(rows[0]["last_version"]) if rows else 0

    async def page(self, tenant: str, *, above: str, limit: int, prefix: str) -> list[str]:
        """Names that have a version, in order, from above `above` (empty: from the first)."""
        rows = await self._database.read(
            "SELECT DISTINCT name FROM model_versions WHERE tenant = ? AND name > ? AND name >= ? AND name < ?"
            " ORDER BY name LIMIT ?",
            (tenant, above, prefix, prefix + "\U0010ffff", limit),
        )
        return [row["name"] for row in rows]


async def register(transaction: Transaction, tenant: str, name: str, model_id: str, now: int) -> Version:
    """Makes a model the next version of a name; or finds the version that it is already."""
    found = await transaction.fetch(_VERSIONS + " AND model_id = ?", (tenant, name, model_id))
    if found:
        return Version(**dict(found[0]))
    [row] = await transaction.fetch(
        "INSERT INTO model_names (tenant, name, last_version) VALUES (?, ?, 1)"
        " ON CONFLICT (tenant, name) DO UPDATE SET last_version = last_version + 1 RETURNING last_version",
        (tenant, name),
    )
    version = Version(name, row["last_version"], model_id, now)
    await transaction.execute(
        "INSERT INTO model_versions (tenant, name, version, model_id, create_time) VALUES (?, ?, ?, ?, ?)",
        (tenant, version.name, version.version, version.model_id, version.create_time),
    )
    return version


async def versions(transaction: Transaction, tenant: str, name: str) -> list[Version]:
    """The versions of a name, newest first."""
    rows = await transaction.fetch(_VERSIONS + " ORDER BY version DESC", (tenant, name))
    return [Version(**dict(row)) for row in rows]


async def alias(transaction: Transaction, tenant: str, name: str, alias: str) -> Alias | None:
    """The alias, or None."""
    rows = await transaction.fetch(_ALIASES + " AND alias = ?", (tenant, name, alias))
    if not rows:
        return None
    moves = await transaction.fetch(_MOVES + " AND alias = ?" + _NEWEST_FIRST, (tenant, name, alias, MOST_MOVES))
    return Alias(**dict(rows[0]), moves=tuple(_move(row) for row in moves))


async def aliases(transaction: Transaction, tenant: str, name: str) -> list[str]:
    """The aliases of a name, in order."""
    rows = await transaction.fetch(_ALIASES + " ORDER BY alias", (tenant, name))
    return [row["alias"] for row in rows]


async def move(transaction: Transaction, tenant: str, name: str, alias: str, moved: Move) -> None:
    """Points an alias somewhere, which makes it if need be; keeps its newest 50 moves."""
    await transaction.execute(
        "INSERT INTO model_aliases (tenant, name, alias, version) VALUES (?, ?, ?, ?)"
        " ON CONFLICT (tenant, name, alias) DO UPDATE SET version = excluded.version",
        (tenant, name, alias, moved.version),
    )
    await transaction.execute(
        "INSERT INTO model_alias_moves (tenant, name, alias, number, version, before, time, rollback)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (tenant, name, alias, moved.number, moved.version, moved.before, moved.time, int(moved.rollback)),
    )
    await transaction.execute(
        "DELETE FROM model_alias_moves WHERE tenant = ? AND name = ? AND alias = ? AND number <= ?",
        (tenant, name, alias, moved.number - MOST_MOVES),
    )


async def delete_alias(transaction: Transaction, tenant: str, name: str, alias: str) -> bool:
    """Removes an alias with its moves; returns whether there was one."""
    return bool(
        await transaction.execute(
            "DELETE FROM model_aliases WHERE tenant = ? AND name = ? AND alias = ?", (tenant, name, alias)
        )
    )


async def aliases_of(transaction: Transaction, tenant: str, model_id: str) -> list[str]:
    """The aliases that point to a model, as `support-bot@production`."""
    rows = await transaction.fetch(
        "SELECT name, alias FROM model_aliases JOIN model_versions USING (tenant, name, version)"
        " WHERE tenant = ? AND model_id = ? ORDER BY name, alias",
        (tenant, model_id),
    )
    return [f"{row['name']}@{row['alias']}" for row in rows]
