"""Exports as rows."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from google.protobuf import json_format

from luthier.v1.export_proof_pb2 import ExportProof
from luthier.v1.export_task_pb2 import ExportTask
from luthier.v1.model_pb2 import ModelFile
from luthier.v1.models_pb2 import DownloadManifest
from luthier_server.lanes import Lane
from luthier_server.store.database import Database, Row, Transaction

_SUMMARY = "id, tenant, model_id, job_id, task, proof, size_bytes, destination_uri, create_time"


@dataclass(frozen=True, slots=True)
class Export:
    """What an export job made. model_id: a model's id, or a checkpoint's name. files: empty in lists. create_time:
    microseconds since the epoch."""

    id: str
    tenant: str
    model_id: str
    job_id: str
    task: ExportTask
    files: Sequence[ModelFile]
    proof: ExportProof
    size_bytes: int
    destination_uri: str
    create_time: int


def _export(row: Row, files: bytes = b"") -> Export:
    return Export(
        id=row["id"],
        tenant=row["tenant"],
        model_id=row["model_id"],
        job_id=row["job_id"],
        task=json_format.Parse(row["task"], ExportTask()),
        files=tuple(DownloadManifest.FromString(files).files),
        proof=ExportProof.FromString(row["proof"]),
        size_bytes=row["size_bytes"],
        destination_uri=row["destination_uri"],
        create_time=row["create_time"],
    )


class Exports:
    """Reads exports."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def get(self, tenant: str, export_id: str) -> Export | None:
        """The export with its files, or None."""
        rows = await self._database.read("SELECT * FROM exports WHERE tenant = ? AND id = ?", (tenant, export_id))
        return _export(rows[0], rows[0]["files"]) if rows else None

    async def page(self, tenant: str, *, below: str, limit: int, model_id: str, id_prefix: str) -> list[Export]:
        """Exports newest first, without their files, with ids below `below` (empty: from the newest)."""
        rows = await self._database.read(
            f"SELECT {_SUMMARY} FROM exports WHERE tenant = ? AND (? = '' OR id < ?) AND (? = '' OR model_id = ?)"
            " AND id >= ? AND id < ? ORDER BY id DESC LIMIT ?",
            (tenant, below, below, model_id, model_id, id_prefix, id_prefix + "\U0010ffff", limit),
        )
        return [_export(row) for row in rows]

    async def of(self, tenant: str, model_ids: Sequence[str]) -> list[Export]:
        """The exports of these models and checkpoints, without their files, oldest first; at most 1000."""
        rows = await self._database.read(
            f"SELECT {_SUMMARY} FROM exports WHERE tenant = ? AND model_id IN (SELECT value FROM json_each(?))"
            " ORDER BY id LIMIT 1000",
            (tenant, json.dumps(list(model_ids))),
        )
        return [_export(row) for row in rows]

    async def ids(self) -> set[str]:
        """The ids of all exports, and of those that jobs are yet to finish."""
        rows = await self._database.read(
            "SELECT id FROM exports UNION SELECT attempts.export_id FROM attempts JOIN jobs ON jobs.id = job_id"
            " WHERE jobs.end_time = 0 AND attempts.export_id != ''"
        )
        return {row["id"] for row in rows}

    async def ended_jobs(self) -> list[str]:
        """The jobs of the exports' lane that have ended."""
        rows = await self._database.read("SELECT id FROM jobs WHERE lane = ? AND end_time > 0", (Lane.CPU,))
        return [row["id"] for row in rows]


async def insert(transaction: Transaction, export: Export) -> None:
    """Adds an export."""
    await transaction.execute(
        "INSERT INTO exports (id, tenant, model_id, job_id, task, files, proof, size_bytes, destination_uri,"
        " create_time) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            export.id,
            export.tenant,
            export.model_id,
            export.job_id,
            json_format.MessageToJson(export.task, indent=None),
            DownloadManifest(files=export.files).SerializeToString(),
            export.proof.SerializeToString(),
            export.size_bytes,
            export.destination_uri,
            export.create_time,
        ),
    )


async def delete(transaction: Transaction, tenant: str, export_id: str) -> bool:
    """Removes the row; returns whether there was one."""
    return bool(await transaction.execute("DELETE FROM exports WHERE tenant = ? AND id = ?", (tenant, export_id)))


async def of_model(transaction: Transaction, tenant: str, model_id: str) -> list[str]:
    """The ids of a model's exports; at most 20."""
    rows = await transaction.fetch(
        "SELECT id FROM exports WHERE tenant = ? AND model_id = ? ORDER BY id LIMIT 20", (tenant, model_id)
    )
    return [row["id"] for row in rows]
