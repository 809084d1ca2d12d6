"""Datasets as rows."""

import dataclasses
import hashlib
from dataclasses import dataclass

from google.protobuf import json_format
from google.protobuf.message import Message

from luthier.v1.dataset_pb2 import DatasetFormat, DatasetLineage, DatasetReading
from luthier.v1.dataset_report_pb2 import DatasetReport, TokenReport
from luthier_server.job import AT_REST
from luthier_server.store.database import Database, Row, Transaction


@dataclass(frozen=True, slots=True)
class Dataset:
    """One immutable version of a dataset. create_time: microseconds since the epoch; lineage: None for one that was not
    made of others."""

    id: str
    tenant: str
    name: str
    version: int
    sha256: str
    size_bytes: int
    row_count: int
    format: DatasetFormat.ValueType
    create_time: int
    reading: DatasetReading
    source: str = ""
    lineage: DatasetLineage | None = None
    warnings: int = 0


_COLUMNS = ", ".join(each.name for each in dataclasses.fields(Dataset))
_REPORTS_SHOWN = 20


def _text(message: Message) -> str:
    return json_format.MessageToJson(message, indent=None, sort_keys=True)


def _dataset(row: Row) -> Dataset:
    fields = {name: row[name] for name in Dataset.__slots__}
    fields["reading"] = json_format.Parse(row["reading"] or "{}", DatasetReading())
    fields["lineage"] = json_format.Parse(row["lineage"], DatasetLineage()) if row["lineage"] else None
    return Dataset(**fields)


def _values(dataset: Dataset) -> tuple[str | int, ...]:
    lineage = _text(dataset.lineage) if dataset.lineage is not None else ""
    changed = {"reading": _text(dataset.reading), "lineage": lineage}
    return tuple(changed.get(name, getattr(dataset, name)) for name in Dataset.__slots__)


class Datasets:
    """Reads datasets."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def by_id(self, tenant: str, dataset_id: str) -> Dataset | None:
        """The version with this id, or None."""
        return await self._one("id = ?", tenant, dataset_id)

    async def by_name(self, tenant: str, name: str, version: int = 0) -> Dataset | None:
        """A version of a name, the newest for version 0; or None."""
        if version:
            return await self._one("name = ? AND version = ?", tenant, name, version)
        return await self._one("name = ? ORDER BY version DESC LIMIT 1", tenant, name)

    async def _one(self, where: str, tenant: str, *parameters: str | int) -> Dataset | None:
        rows = await self._database.read(
            f"SELECT {_COLUMNS} FROM datasets WHERE tenant = ? AND {where}", (tenant, *parameters)
        )
        return _dataset(rows[0]) if rows else None

    async def page(self, tenant: str, *, below: str, limit: int, name: str, id_prefix: str) -> list[Dataset]:
        """Datasets newest first, with ids below `below` (empty: from the newest)."""
        rows = await self._database.read(
            f"SELECT {_COLUMNS} FROM datasets WHERE tenant = ? AND (? = '' OR id < ?) AND (? = '' OR name = ?)"
            " AND id >= ? AND id < ? ORDER BY id DESC LIMIT ?",
            (tenant, below, below, name, name, id_prefix, id_prefix + "\U0010ffff", limit),
        )
        return [_dataset(row) for row in rows]

    async def by_sha256(self, tenant: str, sha256: str) -> Dataset | None:
        """Some dataset with these bytes, or None."""
        return await self._one("sha256 = ? LIMIT 1", tenant, sha256)

    async def report(self, dataset_id: str) -> DatasetReport:
        """What the structural check found; empty for a dataset of an older server."""
        rows = await self._database.read("SELECT report FROM dataset_reports WHERE dataset_id = ?", (dataset_id,))
        return DatasetReport.FromString(rows[0]["report"]) if rows else DatasetReport()

    async def report_of_bytes(self, tenant: str, sha256: str, asked: DatasetReading) -> DatasetReport | None:
        """What the check of these bytes found when they were to be read in the same way; None when they never were."""
        rows = await self._database.read(
            "SELECT report FROM dataset_reports JOIN datasets ON datasets.id = dataset_id"
            " WHERE datasets.tenant = ? AND sha256 = ? AND asked = ? LIMIT 1",
            (tenant, sha256, _text(asked)),
        )
        return DatasetReport.FromString(rows[0]["report"]) if rows else None

    async def token_reports(self, dataset_id: str) -> list[TokenReport]:
        """What checks for base models found, newest first; at most 20."""
        rows = await self._database.read(
            "SELECT report FROM token_reports WHERE dataset_id = ? ORDER BY create_time DESC LIMIT ?",
            (dataset_id, _REPORTS_SHOWN),
        )
        return [TokenReport.FromString(row["report"]) for row in rows]

    async def names(self, tenant: str) -> list[str]:
        """Every name that has a version."""
        rows = await self._database.read("SELECT DISTINCT name FROM datasets WHERE tenant = ? LIMIT 1000", (tenant,))
        return [row["name"] for row in rows]


async def insert(
    transaction: Transaction, dataset: Dataset, asked: DatasetReading, report: DatasetReport
) -> tuple[Dataset, bool]:
    """Adds a dataset under the next version of its name; or finds the version that has these bytes, read the same way.

    Returns the row and whether it is new.
    """
    rows = await transaction.fetch(
        f"SELECT {_COLUMNS} FROM datasets WHERE tenant = ? AND name = ? AND sha256 = ?"
        " AND (reading = ? OR reading = '' AND ?)",
        (dataset.tenant, dataset.name, dataset.sha256, _text(dataset.reading), asked == DatasetReading()),
    )
    if rows:
        return _dataset(rows[0]), False
    [row] = await transaction.fetch(
        "INSERT INTO dataset_names (tenant, name, last_version) VALUES (?, ?, 1)"
        " ON CONFLICT (tenant, name) DO UPDATE SET last_version = last_version + 1 RETURNING last_version",
        (dataset.tenant, dataset.name),
    )
    dataset = dataclasses.replace(dataset, version=row["last_version"])
    await transaction.execute(
        f"INSERT INTO datasets ({_COLUMNS}) VALUES ({', '.join('?' * len(Dataset.__slots__))})",
        _values(dataset),
    )
    await transaction.execute(
        "INSERT INTO dataset_reports (dataset_id, tenant, asked, report) VALUES (?, ?, ?, ?)",
        (dataset.id, dataset.tenant, _text(asked), report.SerializeToString()),
    )
    return dataset, True


async def save_token_report(transaction: Transaction, tenant: str, report: TokenReport, now: int) -> None:
    """Keeps what a check for a base model found, in place of what an earlier one for the same found. A dataset that was
    deleted meanwhile needs none."""
    if not await present(transaction, tenant, report.dataset_id):
        return
    subject = TokenReport(
        base_model=report.base_model,
        tokenization=report.tokenization,
        max_length=report.max_length,
        template_sha256=report.template_sha256,
    )
    key = hashlib.sha256(subject.SerializeToString(deterministic=True)).hexdigest()
    await transaction.execute(
        "INSERT INTO token_reports (dataset_id, key, tenant, report, create_time) VALUES (?, ?, ?, ?, ?)"
        " ON CONFLICT (dataset_id, key) DO UPDATE SET report = excluded.report, create_time = excluded.create_time",
        (report.dataset_id, key, tenant, report.SerializeToString(), now),
    )


async def present(transaction: Transaction, tenant: str, dataset_id: str) -> bool:
    """Whether the dataset still exists."""
    return bool(await transaction.fetch("SELECT 1 FROM datasets WHERE tenant = ? AND id = ?", (tenant, dataset_id)))


async def hold(transaction: Transaction, tenant: str, dataset_id: str, job_id: str) -> None:
    """Notes that a job needs the dataset."""
    await transaction.execute(
        "INSERT OR IGNORE INTO job_datasets (tenant, dataset_id, job_id) VALUES (?, ?, ?)",
        (tenant, dataset_id, job_id),
    )


async def holders(transaction: Transaction, tenant: str, dataset_id: str) -> list[str]:
    """Ids of jobs, not at rest, that need the dataset; at most 10."""
    at_rest = tuple(AT_REST)
    rows = await transaction.fetch(
        "SELECT jobs.id FROM job_datasets JOIN jobs ON jobs.id = job_datasets.job_id"
        " WHERE job_datasets.tenant = ? AND dataset_id = ?"
        f" AND jobs.state NOT IN ({', '.join('?' * len(at_rest))}) LIMIT 10",
        (tenant, dataset_id, *at_rest),
    )
    return [row["id"] for row in rows]


async def delete(transaction: Transaction, dataset: Dataset) -> bool:
    """Removes the row; returns whether its bytes are needed by no other dataset."""
    await transaction.execute("DELETE FROM datasets WHERE tenant = ? AND id = ?", (dataset.tenant, dataset.id))
    return not await transaction.fetch("SELECT 1 FROM datasets WHERE sha256 = ? LIMIT 1", (dataset.sha256,))
