"""Datasets: uploaded once, checked before they are kept, immutable from then on."""

import asyncio
import difflib
import errno
import hashlib
import os
import re
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from luthier.trainer.v1.report_pb2 import DatasetReport
from luthier.v1.datasets_pb2 import DatasetMetadata
from luthier_server import spec as specs
from luthier_server.errors import (
    DatasetInvalid,
    Exhausted,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    StorageFull,
    Violation,
)
from luthier_server.ids import Ids
from luthier_server.store import datasets as rows
from luthier_server.store.database import Database, Transaction
from luthier_server.store.datasets import Dataset
from luthier_server.workers import Workers

_REFERENCE = re.compile(r"(?P<name>[a-z0-9][a-z0-9._-]{0,62})(@(?P<version>[1-9][0-9]{0,8}))?")
_SHOWN = 25


class Datasets:
    """The datasets of every tenant, over `blobs/SHA256`."""

    def __init__(
        self,
        database: Database,
        blobs: Path,
        workers: Workers,
        ids: Ids,
        *,
        max_bytes: int,
        clock: Callable[[], int],
    ) -> None:
        self._database = database
        self._rows = rows.Datasets(database)
        self._blobs = blobs
        self._workers = workers
        self._ids = ids
        self._max_bytes = max_bytes
        self._clock = clock
        self._incoming = blobs / "incoming"

    def prepare(self) -> None:
        """Makes the folders, and clears what uploads left that a server's death broke off."""
        self._incoming.mkdir(parents=True, exist_ok=True)
        for leftover in self._incoming.iterdir():
            leftover.unlink()

    def blob(self, dataset: Dataset) -> Path:
        """The file that holds a dataset's bytes."""
        return self._blobs / dataset.sha256

    async def find(self, tenant: str, reference: str) -> Dataset:
        """The dataset that `ds_...`, `name` or `name@3` names. Raises NotFound with the nearest names."""
        dataset: Dataset | None = None
        if reference.startswith("ds_"):
            dataset = await self._rows.by_id(tenant, reference)
        if dataset is None and (match := _REFERENCE.fullmatch(reference)):
            dataset = await self._rows.by_name(tenant, match["name"], int(match["version"] or 0))
        if dataset is None:
            near = difflib.get_close_matches(reference, await self._rows.names(tenant), n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "upload it first (luthier dataset upload FILE)"
            raise NotFound("dataset", reference, hint)
        return dataset

    async def page(self, tenant: str, *, below: str, limit: int, name: str) -> list[Dataset]:
        """Datasets newest first, with ids below `below` (empty: from the newest)."""
        return await self._rows.page(tenant, below=below, limit=limit, name=name)

    async def upload(
        self, tenant: str, metadata: DatasetMetadata, chunks: AsyncIterator[bytes]
    ) -> tuple[Dataset, bool]:
        """Receives a file, checks it, keeps it. Returns the dataset and whether it is a new version.

        Raises InvalidArgument for a wrong hash or size, DatasetInvalid with the lines that are wrong, Exhausted for a
        file over the limit, StorageFull. Nothing is kept of an upload that fails.
        """
        specs.refuse(specs.rule_violations(metadata, "metadata."))
        aside = self._incoming / uuid.uuid4().hex
        try:
            sha256, size = await self._receive(aside, chunks)
            _compare(metadata, sha256, size)
            report = await self._workers.check_dataset(aside)
            _refuse_findings(report)
            now = self._clock()
            dataset = Dataset(
                id=self._ids.new("ds"),
                tenant=tenant,
                name=metadata.name,
                version=0,
                sha256=sha256,
                size_bytes=size,
                row_count=report.rows,
                format=report.format,
                create_time=now,
            )
            # The blob comes first: a row never names bytes that are not there.
            await asyncio.to_thread(_keep, aside, self.blob(dataset))
            return await self._database.write(lambda transaction: rows.insert(transaction, dataset))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise StorageFull() from error
            raise
        finally:
            aside.unlink(missing_ok=True)

    async def _receive(self, path: Path, chunks: AsyncIterator[bytes]) -> tuple[str, int]:
        digest = hashlib.sha256()
        size = 0
        with await asyncio.to_thread(open, path, "wb") as file:
            async for chunk in chunks:
                size += len(chunk)
                if size > self._max_bytes:
                    raise Exhausted(
                        f"the file has more than {self._max_bytes:,} bytes", subject="dataset size", reason="TOO_LARGE"
                    )
                await asyncio.to_thread(file.write, chunk)
                digest.update(chunk)
            await asyncio.to_thread(_sync, file.fileno(), file.flush)
        return digest.hexdigest(), size

    async def delete(self, tenant: str, reference: str) -> Dataset:
        """Deletes one version, named exactly. Raises NotFound, FailedPrecondition while a job needs it."""
        if not (reference.startswith("ds_") or "@" in reference):
            raise InvalidArgument(
                "name one version exactly",
                [Violation("dataset", "must be ds_... or name@version, so that nothing else goes with it")],
            )
        dataset = await self.find(tenant, reference)

        async def work(transaction: Transaction) -> bool:
            if holders := await rows.holders(transaction, tenant, dataset.id):
                raise FailedPrecondition(
                    f"dataset '{reference}' is needed by {', '.join(holders)}: wait for them, or cancel them",
                    subject=dataset.id,
                    reason="DATASET_IN_USE",
                )
            return await rows.delete(transaction, dataset)

        if await self._database.write(work):
            self.blob(dataset).unlink(missing_ok=True)
        return dataset


def _sync(descriptor: int, flush: Callable[[], None]) -> None:
    flush()
    os.fsync(descriptor)


def _keep(aside: Path, blob: Path) -> None:
    os.replace(aside, blob)
    directory = os.open(blob.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _compare(metadata: DatasetMetadata, sha256: str, size: int) -> None:
    violations = []
    if metadata.size_bytes and metadata.size_bytes != size:
        violations.append(Violation("metadata.size_bytes", f"says {metadata.size_bytes}, but {size} bytes came"))
    if metadata.sha256 and metadata.sha256 != sha256:
        violations.append(Violation("metadata.sha256", f"says {metadata.sha256}, but the bytes have {sha256}"))
    specs.refuse(violations)


def _refuse_findings(report: DatasetReport) -> None:
    """Raises DatasetInvalid. Long trailers are lost, so the first findings come whole and up to 100 by their line."""
    if not report.finding_count:
        return
    first = report.findings[0]
    where = f"line {first.line}: " if first.line else ""
    more = f" (and {report.finding_count - 1:,} more)" if report.finding_count > 1 else ""
    violations = []
    budget = 3000
    for each in report.findings[:_SHOWN]:
        description = f"{each.message[:200]} [{each.code}]"
        budget -= len(description) + 16
        if budget < 0:
            break
        violations.append(Violation(f"line {each.line}" if each.line else "file", description))
    raise DatasetInvalid(
        f"{where}{first.message[:300]}{more}",
        violations,
        metadata={
            "findings": str(report.finding_count),
            "lines": ",".join(str(each.line) for each in report.findings if each.line),
        },
    )
