"""Datasets from elsewhere: fetched by a process of its own as far as the operator allows, and kept."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from luthier.trainer.v1.data_pb2 import FetchFailed
from luthier.v1.datasets_pb2 import DatasetMetadata, ImportDatasetRequest, TransferProgress
from luthier_server import spec as specs
from luthier_server.datasets import Datasets, Kept, Origin
from luthier_server.errors import (
    Exhausted,
    FailedPrecondition,
    InvalidArgument,
    LuthierError,
    NotFound,
    StorageFull,
    Unavailable,
    Violation,
    sentences,
)
from luthier_server.secrets import Secrets
from luthier_server.uploads import Received, Uploads
from luthier_server.workers import Workers

_TOKEN = "LUTHIER_FETCH_TOKEN"


@dataclass(frozen=True, slots=True)
class Allowed:
    """What may be fetched. hosts: names, `*.name`, with a port where it is not 443, with http:// where that is meant;
    networks: private ones that these hosts may lie in; buckets: `s3://bucket/prefix`; roots: local folders."""

    hosts: Sequence[str] = ()
    networks: Sequence[str] = ()
    buckets: Sequence[str] = ()
    roots: Sequence[Path] = ()
    max_bytes: int = 0


class Imports:
    """Fetches datasets."""

    def __init__(
        self, datasets: Datasets, uploads: Uploads, workers: Workers, secrets: Secrets, allowed: Allowed
    ) -> None:
        self._datasets = datasets
        self._uploads = uploads
        self._workers = workers
        self._secrets = secrets
        self._allowed = allowed

    async def fetch(self, tenant: str, request: ImportDatasetRequest) -> AsyncIterator[TransferProgress | Kept]:
        """Tells how far it is, and ends with the dataset.

        Raises FailedPrecondition for a source that the operator does not allow, InvalidArgument, NotFound, Exhausted,
        Unavailable, DatasetInvalid, StorageFull.
        """
        specs.refuse(list(_violations(request)))
        environment = {_TOKEN: self._secrets.value(request.token_secret)} if request.token_secret else {}
        async with self._uploads.scratch() as scratch:
            order, output = scratch / "request.json", scratch / "data"
            order.write_text(json.dumps(self._order(request)))
            source = ""
            async for report in self._workers.fetch(order, output, environment):
                if report.HasField("progress"):
                    each = report.progress
                    yield TransferProgress(completed=each.completed, total=each.total, unit=each.unit)
                elif report.HasField("failed"):
                    raise _error(report.failed, request)
                else:
                    source = report.fetched.source
            received = await asyncio.to_thread(_received, output)
            metadata = DatasetMetadata(name=request.name, reading=request.reading)
            yield await self._datasets.keep(tenant, metadata, received, Origin(source=source))

    def _order(self, request: ImportDatasetRequest) -> dict[str, object]:
        allowed = self._allowed
        order: dict[str, object] = {
            "max_bytes": allowed.max_bytes,
            "hosts": list(allowed.hosts),
            "networks": list(allowed.networks),
            "buckets": list(allowed.buckets),
            "roots": [str(each) for each in allowed.roots],
            "sha256": request.sha256,
        }
        if request.WhichOneof("source") == "hub":
            hub = request.hub
            order["hub"] = {"id": hub.id, "config": hub.config, "split": hub.split, "revision": hub.revision}
        else:
            order["url"] = request.url
        return order


def _violations(request: ImportDatasetRequest) -> Iterator[Violation]:
    hub = request.WhichOneof("source") == "hub"
    if request.token_secret and not hub and not request.url.lower().startswith(("https:", "http:")):
        yield Violation(
            "token_secret", "is of use for the hub and for https alone: buckets have the server's credentials"
        )
    if request.sha256 and hub:
        yield Violation("sha256", "cannot be checked for a dataset of the hub: give its revision")


def _received(path: Path) -> Received:
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return Received(path, sha256, path.stat().st_size)


def _error(failed: FetchFailed, request: ImportDatasetRequest) -> LuthierError:
    """What a fetch that failed is to the caller."""
    text = sentences(failed.message, failed.hint)
    source = request.WhichOneof("source") or "url"
    match failed.reason:
        case reason if reason.endswith("_NOT_ALLOWED"):
            return FailedPrecondition(text, subject=source, reason=reason)
        case "NOT_PERMITTED":
            return FailedPrecondition(text, subject=source, reason="SOURCE_NOT_PERMITTED")
        case "NOT_FOUND":
            # What follows the question mark may be a signature.
            return NotFound("source", request.url.partition("?")[0] or request.hub.id, text)
        case "TOO_LARGE":
            return Exhausted(text, subject="dataset size", reason="TOO_LARGE")
        case "STORAGE_FULL":
            return StorageFull()
        case "NOT_CONFIGURED":
            return FailedPrecondition(text, subject=source, reason=failed.reason)
        case "FAILED" | "UNWRITABLE":
            return Unavailable(text, reason="IMPORT_FAILED")
        case "UNAVAILABLE":
            return Unavailable(text, reason="SOURCE_UNAVAILABLE", retry_seconds=10)
        case reason:
            return InvalidArgument(text, [Violation(source, text[:400])], reason=reason)
