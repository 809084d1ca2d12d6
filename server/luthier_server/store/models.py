"""Models as rows."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from google.protobuf import json_format

from luthier.v1.job_pb2 import JobSpec
from luthier_server.store.database import Database, Row, Transaction


@dataclass(frozen=True, slots=True)
class Version:
    """A model as a version of a name. create_time: microseconds since the epoch."""

    name: str
    version: int
    model_id: str
    create_time: int


@dataclass(frozen=True, slots=True)
class Model:
    """What a job made. create_time: microseconds since the epoch; spec, resolved_spec: None in pages, and where no job
    of an older server tells them; tags, versions and aliases (`support-bot@production`) are kept apart from the row."""

    id: str
    tenant: str
    name: str
    job_id: str
    base_model: str
    adaptation: str
    step: int
    size_bytes: int
    metrics: Mapping[str, float]
    create_time: int
    training_dataset: str
    validation_dataset: str
    base_model_revision: str = ""
    base_licence: str = ""
    parent_model: str = ""
    checkpoint: str = ""
    description: str = ""
    spec: JobSpec | None = None
    resolved_spec: JobSpec | None = None
    tags: Mapping[str, str] = dataclasses.field(default_factory=dict)
    versions: Sequence[Version] = ()
    aliases: Sequence[str] = ()


_APART = {"tags", "versions", "aliases"}
_SPECS = ("spec", "resolved_spec")
_WHOLE = [each.name for each in dataclasses.fields(Model) if each.name not in _APART]
_BRIEF = [name for name in _WHOLE if name not in _SPECS]
_OF_CHECKPOINT = "SELECT id FROM models WHERE tenant = ? AND checkpoint = ?"


def _model(row: Row) -> Model:
    fields = {name: row[name] for name in row.keys()} | {"metrics": json.loads(row["metrics"])}  # noqa: SIM118
    for name in _SPECS:
        if name in fields:
            fields[name] = json_format.Parse(fields[name], JobSpec()) if fields[name] else None
    return Model(**fields)


def _values(model: Model) -> tuple[str | int, ...]:
    changed: dict[str, str] = {"metrics": json.dumps(dict(model.metrics), sort_keys=True)}
    for name, spec in zip(_SPECS, (model.spec, model.resolved_spec), strict=True):
        changed[name] = json_format.MessageToJson(spec, indent=None) if spec is not None else ""
    return tuple(changed.get(name, getattr(model, name)) for name in _WHOLE)


class Models:
    """Reads models."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def get(self, tenant: str, model_id: str) -> Model | None:
        """The model with everything that is known of it, or None."""
        rows = await self._database.read(
            f"SELECT {', '.join(_WHOLE)} FROM models WHERE tenant = ? AND id = ?", (tenant, model_id)
        )
        found = await self._completed(tenant, [_model(row) for row in rows])
        return found[0] if found else None

    async def of_checkpoint(self, tenant: str, checkpoint: str) -> str:
        """The id of the model that was registered from a checkpoint; empty for none."""
        rows = await self._database.read(_OF_CHECKPOINT, (tenant, checkpoint))
        return str(rows[0]["id"]) if rows else ""

    async def of_same_base(self, tenant: str, job_id: str, base_model: str) -> tuple[str, str]:
        """What models tell of a base: its licence, by the newest that knows it, and the revision that a job took."""
        licences = await self._database.read(
            "SELECT base_licence FROM models WHERE tenant = ? AND base_model = ? AND base_licence != ''"
            " ORDER BY id DESC LIMIT 1",
            (tenant, base_model),
        )
        revisions = await self._database.read(
            "SELECT base_model_revision FROM models WHERE tenant = ? AND job_id = ? AND base_model_revision != ''"
            " LIMIT 1",
            (tenant, job_id),
        )
        return (
            licences[0]["base_licence"] if licences else "",
            revisions[0]["base_model_revision"] if revisions else "",
        )

    async def children(self, tenant: str, model_id: str) -> list[Model]:
        """Models that go on from this one, without their specs, oldest first; at most 1000."""
        rows = await self._database.read(
            f"SELECT {', '.join(_BRIEF)} FROM models WHERE tenant = ? AND parent_model = ? ORDER BY id LIMIT 1000",
            (tenant, model_id),
        )
        return [_model(row) for row in rows]

    async def newest_ids(self, tenant: str, limit: int) -> list[str]:
        """The newest ids, newest first."""
        rows = await self._database.read(
            "SELECT id FROM models WHERE tenant = ? ORDER BY id DESC LIMIT ?", (tenant, limit)
        )
        return [row["id"] for row in rows]

    async def newest_mfu(self, tenant: str, base_model: str, adaptation: str) -> float:
        """Share of the device's peak that the newest of the last 50 models of this base and adaptation was trained at;
        0 when none tells."""
        rows = await self._database.read(
            "SELECT metrics FROM models WHERE tenant = ? AND base_model = ? AND adaptation = ?"
            " ORDER BY id DESC LIMIT 50",
            (tenant, base_model, adaptation),
        )
        known = (float(json.loads(row["metrics"]).get("mfu", 0)) for row in rows)
        return next((each for each in known if each > 0), 0.0)

    async def page(
        self, tenant: str, *, below: str, limit: int, id_prefix: str, name: str, tags: Mapping[str, str]
    ) -> list[Model]:
        """Models newest first, with ids below `below` (empty: from the newest), without their specs. name: only
        versions of it; tags: only models that have all of these."""
        sql = [f"SELECT {', '.join(_BRIEF)} FROM models WHERE tenant = ? AND id >= ? AND id < ?"]
        parameters: list[str | int] = [tenant, id_prefix, id_prefix + "\U0010ffff"]
        if below:
            sql.append("AND id < ?")
            parameters.append(below)
        if name:
            sql.append("AND id IN (SELECT model_id FROM model_versions WHERE tenant = ? AND name = ?)")
            parameters.extend((tenant, name))
        for key, value in tags.items():
            sql.append("AND id IN (SELECT model_id FROM model_tags WHERE tenant = ? AND key = ? AND value = ?)")
            parameters.extend((tenant, key, value))
        sql.append("ORDER BY id DESC LIMIT ?")
        parameters.append(limit)
        rows = await self._database.read(" ".join(sql), parameters)
        return await self._completed(tenant, [_model(row) for row in rows])

    async def _completed(self, tenant: str, models: Sequence[Model]) -> list[Model]:
        """The same with their tags, versions and aliases."""
        ids = json.dumps([each.id for each in models])
        tags: dict[str, dict[str, str]] = {}
        for row in await self._database.read(
            "SELECT model_id, key, value FROM model_tags"
            " WHERE tenant = ? AND model_id IN (SELECT value FROM json_each(?)) ORDER BY key",
            (tenant, ids),
        ):
            tags.setdefault(row["model_id"], {})[row["key"]] = row["value"]
        versions: dict[str, list[Version]] = {}
        for row in await self._database.read(
            "SELECT name, version, model_id, create_time FROM model_versions"
            " WHERE tenant = ? AND model_id IN (SELECT value FROM json_each(?)) ORDER BY name",
            (tenant, ids),
        ):
            versions.setdefault(row["model_id"], []).append(Version(**dict(row)))
        aliases: dict[str, list[str]] = {}
        for row in await self._database.read(
            "SELECT model_id, name, alias FROM model_aliases JOIN model_versions USING (tenant, name, version)"
            " WHERE tenant = ? AND model_id IN (SELECT value FROM json_each(?)) ORDER BY name, alias",
            (tenant, ids),
        ):
            aliases.setdefault(row["model_id"], []).append(f"{row['name']}@{row['alias']}")
        return [
            dataclasses.replace(
                each,
                tags=tags.get(each.id, {}),
                versions=tuple(versions.get(each.id, ())),
                aliases=tuple(aliases.get(each.id, ())),
            )
            for each in models
        ]


async def insert(transaction: Transaction, model: Model) -> None:
    """Adds a model. Raises sqlite3.IntegrityError when its checkpoint is a model already."""
    await transaction.execute(
        f"INSERT INTO models ({', '.join(_WHOLE)}) VALUES ({', '.join('?' * len(_WHOLE))})", _values(model)
    )


async def registered(transaction: Transaction, tenant: str, checkpoint: str) -> str:
    """The id of the model that was registered from a checkpoint; empty for none."""
    rows = await transaction.fetch(_OF_CHECKPOINT, (tenant, checkpoint))
    return str(rows[0]["id"]) if rows else ""


async def present(transaction: Transaction, tenant: str, model_id: str) -> bool:
    """Whether the model still exists."""
    return bool(await transaction.fetch("SELECT 1 FROM models WHERE tenant = ? AND id = ?", (tenant, model_id)))


async def describe(transaction: Transaction, tenant: str, model_id: str, description: str) -> None:
    """Gives a model another description."""
    await transaction.execute(
        "UPDATE models SET description = ? WHERE tenant = ? AND id = ?", (description, tenant, model_id)
    )


async def tag(
    transaction: Transaction, tenant: str, model_id: str, tags: Mapping[str, str], removed: Iterable[str]
) -> int:
    """Removes tags, then sets others. Returns how many the model has then."""
    await transaction.execute_many(
        "DELETE FROM model_tags WHERE tenant = ? AND model_id = ? AND key = ?",
        [(tenant, model_id, key) for key in removed],
    )
    await transaction.execute_many(
        "INSERT INTO model_tags (tenant, model_id, key, value) VALUES (?, ?, ?, ?)"
        " ON CONFLICT (model_id, key) DO UPDATE SET value = excluded.value",
        [(tenant, model_id, key, value) for key, value in tags.items()],
    )
    [row] = await transaction.fetch(
        "SELECT count(*) AS tags FROM model_tags WHERE tenant = ? AND model_id = ?", (tenant, model_id)
    )
    return int(row["tags"])


async def delete(transaction: Transaction, tenant: str, model_id: str) -> None:
    """Removes a model with its tags and versions. No alias may point to one of them."""
    await transaction.execute("DELETE FROM models WHERE tenant = ? AND id = ?", (tenant, model_id))
