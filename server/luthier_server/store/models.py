"""Models as rows."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from luthier_server.store.database import Database, Row, Transaction


@dataclass(frozen=True, slots=True)
class Model:
    """What a job made. create_time: microseconds since the epoch."""

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


def _model(row: Row) -> Model:
    fields = {name: row[name] for name in Model.__slots__}
    return Model(**(fields | {"metrics": json.loads(row["metrics"])}))


class Models:
    """Reads models."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def get(self, tenant: str, model_id: str) -> Model | None:
        """The model, or None."""
        rows = await self._database.read("SELECT * FROM models WHERE tenant = ? AND id = ?", (tenant, model_id))
        return _model(rows[0]) if rows else None

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

    async def page(self, tenant: str, *, below: str, limit: int, id_prefix: str) -> list[Model]:
        """Models newest first, with ids below `below` (empty: from the newest)."""
        rows = await self._database.read(
            "SELECT * FROM models WHERE tenant = ? AND (? = '' OR id < ?) AND id >= ? AND id < ?"
            " ORDER BY id DESC LIMIT ?",
            (tenant, below, below, id_prefix, id_prefix + "\U0010ffff", limit),
        )
        return [_model(row) for row in rows]


async def insert(transaction: Transaction, model: Model) -> None:
    """Adds a model."""
    await transaction.execute(
        "INSERT INTO models (id, tenant, name, job_id, base_model, adaptation, step, size_bytes, metrics, create_time,"
        " training_dataset, validation_dataset) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            model.id,
            model.tenant,
            model.name,
            model.job_id,
            model.base_model,
            model.adaptation,
            model.step,
            model.size_bytes,
            json.dumps(dict(model.metrics), sort_keys=True),
            model.create_time,
            model.training_dataset,
            model.validation_dataset,
        ),
    )


async def present(transaction: Transaction, tenant: str, model_id: str) -> bool:
    """Whether the model still exists."""
    return bool(await transaction.fetch("SELECT 1 FROM models WHERE tenant = ? AND id = ?", (tenant, model_id)))
