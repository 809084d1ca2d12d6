"""Datasets: checked before they are kept, immutable from then on."""

import asyncio
import difflib
import os
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from luthier.v1.dataset_pb2 import DatasetLineage, DatasetReading
from luthier.v1.dataset_report_pb2 import DatasetReport, Finding, FindingLevel, TokenReport
from luthier.v1.datasets_pb2 import DatasetMetadata
from luthier_server import spec as specs
from luthier_server.errors import (
    Aborted,
    DatasetInvalid,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Violation,
    sentences,
)
from luthier_server.ids import Ids
from luthier_server.store import datasets as rows
from luthier_server.store.database import Database, Transaction
from luthier_server.store.datasets import Dataset
from luthier_server.uploads import Received, Uploads
from luthier_server.workers import WorkerDied, Workers

_REFERENCE = re.compile(r"(?P<name>[a-z0-9][a-z0-9._-]{0,62})(@(?P<version>[1-9][0-9]{0,8}))?")
_SHOWN = 25
_LINES = 100


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a dataset came from: an import's source, or the datasets it was made of."""

    source: str = ""
    lineage: DatasetLineage | None = None


@dataclass(frozen=True, slots=True)
class Kept:
    """A file that was checked. dataset: without an id when it was only to be checked; created: whether it is new."""

    dataset: Dataset
    created: bool
    report: DatasetReport


class Datasets:
    """The datasets of every tenant, over `blobs/SHA256`."""

    def __init__(
        self,
        database: Database,
        blobs: Path,
        uploads: Uploads,
        workers: Workers,
        ids: Ids,
        *,
        clock: Callable[[], int],
    ) -> None:
        self._database = database
        self._rows = rows.Datasets(database)
        self._blobs = blobs
        self._uploads = uploads
        self._workers = workers
        self._ids = ids
        self._clock = clock
        # A blob may have several rows: none is added between the look that it was the last and the blob's end.
        self._files = asyncio.Lock()

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

    async def page(self, tenant: str, *, below: str, limit: int, name: str, id_prefix: str) -> list[Dataset]:
        """Datasets newest first, with ids below `below` (empty: from the newest)."""
        return await self._rows.page(tenant, below=below, limit=limit, name=name, id_prefix=id_prefix)

    async def report(self, dataset: Dataset) -> DatasetReport:
        """What the structural check found; empty for a dataset of an older server."""
        return await self._rows.report(dataset.id)

    async def token_reports(self, dataset: Dataset) -> list[TokenReport]:
        """What checks for base models found, newest first."""
        return await self._rows.token_reports(dataset.id)

    async def save_token_report(self, tenant: str, report: TokenReport) -> None:
        """Keeps what a check for a base model found."""
        now = self._clock()
        await self._database.write(lambda transaction: rows.save_token_report(transaction, tenant, report, now))

    async def received(self, tenant: str, sha256: str) -> int:
        """How many bytes of a file are here: all, when a dataset of the tenant has it, or what an upload left."""
        known = await self._rows.by_sha256(tenant, sha256)
        return known.size_bytes if known is not None else self._uploads.received(sha256)

    async def upload(self, tenant: str, metadata: DatasetMetadata, chunks: AsyncIterator[bytes]) -> Kept:
        """Receives a file, checks it, keeps it.

        Raises InvalidArgument for a wrong hash, size or offset, DatasetInvalid with the lines that are wrong, Exhausted
        for a file over the limit, StorageFull. Nothing is kept of an upload that fails, but of one that breaks off,
        when its hash was announced, what came of it.
        """
        specs.refuse([*specs.rule_violations(metadata, "metadata."), *_offset_violations(metadata)])
        known = await self._rows.by_sha256(tenant, metadata.sha256) if metadata.offset else None
        if known is not None and metadata.offset == known.size_bytes and await anext(chunks, None) is None:
            here = Received(self.blob(known), known.sha256, known.size_bytes)
            return await self.keep(tenant, metadata, here)
        async with self._uploads.receive(metadata, chunks) as received:
            return await self.keep(tenant, metadata, received)

    async def keep(
        self, tenant: str, metadata: DatasetMetadata, received: Received, origin: Origin | None = None
    ) -> Kept:
        """Checks a file and makes a dataset of it; with `validate_only` it only checks. Raises DatasetInvalid."""
        report = await self._rows.report_of_bytes(tenant, received.sha256, metadata.reading)
        if report is None:
            report = await self._check(received, metadata.reading)
        if not metadata.validate_only:
            refuse_errors(report)
        return await self.store(tenant, metadata, received, report, origin or Origin())

    async def _check(self, received: Received, reading: DatasetReading) -> DatasetReport:
        async with self._uploads.scratch() as scratch:
            try:
                return await self._workers.check_dataset(received.path, reading, scratch)
            except WorkerDied as died:
                # A sound file does not do that, and trying again would do it again.
                message = f"the file cannot be read: {died.message}; write it anew, as JSONL if it is not"
                raise DatasetInvalid(message, [Violation("file", message)]) from died

    async def store(
        self, tenant: str, metadata: DatasetMetadata, received: Received, report: DatasetReport, origin: Origin
    ) -> Kept:
        """Makes a dataset of a file that was checked."""
        dataset = Dataset(
            id="" if metadata.validate_only else self._ids.new("ds"),
            tenant=tenant,
            name=metadata.name,
            version=0,
            sha256=received.sha256,
            size_bytes=received.size_bytes,
            row_count=report.rows,
            format=report.reading.format,
            create_time=self._clock(),
            reading=report.reading,
            source=origin.source,
            lineage=origin.lineage,
            warnings=sum(each.count for each in report.counts if each.level != FindingLevel.FINDING_LEVEL_ERROR),
        )
        if metadata.validate_only:
            return Kept(dataset, False, report)
        async with self._files:
            # The blob comes first: a row never names bytes that are not there.
            await asyncio.to_thread(_move, received.path, self.blob(dataset))
            stored, created = await self._database.write(
                lambda transaction: rows.insert(transaction, dataset, metadata.reading, report)
            )
        return Kept(stored, created, report)

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

        async with self._files:
            if await self._database.write(work):
                self.blob(dataset).unlink(missing_ok=True)
        return dataset


def _move(received: Path, blob: Path) -> None:
    if received == blob:
        if not blob.exists():
            raise Aborted("the bytes were deleted meanwhile: send them again", reason="UPLOAD_OFFSET")
        return
    os.replace(received, blob)
    directory = os.open(blob.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _offset_violations(metadata: DatasetMetadata) -> list[Violation]:
    if not metadata.offset:
        return []
    if not (metadata.sha256 and metadata.size_bytes):
        return [Violation("metadata.offset", "needs sha256 and size_bytes: they tell which file goes on")]
    if metadata.offset > metadata.size_bytes:
        return [Violation("metadata.offset", f"lies beyond the file's {metadata.size_bytes} bytes")]
    return []


def refuse_errors(report: DatasetReport) -> None:
    """Raises DatasetInvalid. Long trailers are lost, so the first findings come whole and up to 100 by their line."""
    errors = [each for each in report.findings if each.level == FindingLevel.FINDING_LEVEL_ERROR]
    if not errors:
        return
    count = sum(each.count for each in report.counts if each.level == FindingLevel.FINDING_LEVEL_ERROR)
    first = errors[0]
    where = f"line {first.line}: " if first.line else ""
    more = f" (and {count - 1:,} more)" if count > 1 else ""
    violations = []
    budget = 3000
    alike: dict[tuple[str, str], list[Finding]] = {}
    for each in errors:
        alike.setdefault((each.code, each.message), []).append(each)
    for each, *others in list(alike.values())[:_SHOWN]:
        also = f" (and {len(others)} lines like it)" if others else ""
        description = f"{sentences(each.message[:200], each.fix[:120])}{also} [{each.code}]"
        budget -= len(description) + 16
        if budget < 0:
            break
        violations.append(Violation(f"line {each.line}" if each.line else "file", description))
    raise DatasetInvalid(
        f"{where}{sentences(first.message[:300], first.fix[:200])}{more}",
        violations,
        metadata={
            "findings": str(count),
            "lines": ",".join(str(each.line) for each in errors[:_LINES] if each.line),
        },
    )
