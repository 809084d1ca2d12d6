"""The contract's Datasets in memory, a part of `fake_service`. What it does is said by a dataset's name:

    slow-...      an upload takes 20 ms a chunk
    huge          an upload is refused at its first chunk
    long          previews have 20 MB
    break-K-...   an upload breaks off once with UNAVAILABLE after K chunks, K times in all with the digit K

What came of an upload is kept in `STATE/parts`, so it outlives the process. With a file `STATE/old` the server is one
that does not know GetUpload. Every upload, import, preview, check and derivation is noted in `STATE/calls.jsonl`.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
from google.protobuf import json_format
from google.rpc import error_details_pb2
from unit.client.fake_guard import info, status

from luthier.v1 import dataset_report_pb2 as rp
from luthier.v1 import datasets_pb2 as ds
from luthier.v1 import datasets_pb2_grpc
from luthier.v1.dataset_pb2 import DATASET_FORMAT_MESSAGES, FILE_FORMAT_JSONL, Dataset, DatasetLineage, DatasetReading
from luthier.v1.tokenization_pb2 import OVERLONG_TRUNCATE, TRAIN_ON_ASSISTANT, Tokenization

NASTY = "\x1b[2Jgone\x07"


class FakeDatasets(datasets_pb2_grpc.DatasetsServicer):
    def __init__(self, state: Any) -> None:
        self.state = state
        self.datasets: dict[str, Dataset] = state.datasets
        self.parts = state.root / "parts"
        self.parts.mkdir(exist_ok=True)
        self.broken: dict[str, int] = {}

    def note(self, method: str, request: Any, **more: Any) -> None:
        said = json_format.MessageToDict(request, preserving_proto_field_name=True)
        self.state.note(method=method, **{"request": said, **more})

    async def GetUpload(self, request: Any, context: Any) -> Any:
        if (self.state.root / "old").exists():
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        part = self.parts / request.sha256
        known = [each.size_bytes for each in self.datasets.values() if each.sha256 == request.sha256]
        received = known[0] if known else part.stat().st_size if part.exists() else 0
        self.note("GetUpload", request, received=received)
        return ds.GetUploadResponse(received_bytes=received)

    async def UploadDataset(self, requests: Any, context: Any) -> Any:
        first = await anext(aiter(requests))
        metadata, chunks = first.metadata, 0
        self.note("UploadDataset", metadata)
        known = [each for each in self.datasets.values() if each.sha256 == metadata.sha256]
        part = self.parts / metadata.sha256
        with part.open("r+b" if part.exists() else "wb") as file:
            file.truncate(0 if known else metadata.offset)
            file.seek(0, 2)
            async for request in requests:
                assert request.HasField("chunk")
                await self.delay(metadata.name, chunks, context)
                file.write(request.chunk)
                file.flush()
                chunks += 1
        self.state.note(method="Chunks", name=metadata.name, chunks=chunks)
        content = part.read_bytes()
        part.unlink()
        if not known:
            assert (metadata.sha256, metadata.size_bytes) == (hashlib.sha256(content).hexdigest(), len(content))
        elif not metadata.validate_only:
            return await self.again(metadata, known)
        if metadata.name.startswith("pondering"):
            await asyncio.sleep(3.5)
        report = report_on(content)
        if metadata.validate_only:
            dataset = Dataset(name=metadata.name, sha256=metadata.sha256, rows=report.rows, size_bytes=len(content))
            return ds.UploadDatasetResponse(dataset=dataset, report=report)
        if report.findings and report.findings[0].level == rp.FINDING_LEVEL_ERROR:
            await self.refuse(metadata.name, report, context)
        kept = self.keep(
            metadata.name, content, rows=report.rows, reading=metadata.reading if metadata.HasField("reading") else None
        )
        return ds.UploadDatasetResponse(dataset=kept, created=True, report=report)

    async def again(self, metadata: Any, known: list[Dataset]) -> Any:
        """The bytes are here already, under this name or another one."""
        for each in known:
            if each.name == metadata.name:
                return ds.UploadDatasetResponse(dataset=each, created=False)
        made = self.keep(metadata.name, b"", rows=known[0].rows)
        made.sha256, made.size_bytes = metadata.sha256, metadata.size_bytes
        return ds.UploadDatasetResponse(dataset=made, created=True)

    async def delay(self, name: str, chunks: int, context: Any) -> None:
        words = name.split("-")
        if words[0] == "slow":
            await asyncio.sleep(0.02)
        if words[0] == "huge":
            await context.abort(*status(grpc.StatusCode.RESOURCE_EXHAUSTED, "too large", info("TOO_LARGE")))
        if words[0] == "break" and chunks == int(words[1]) and self.broken.get(name, 0) < int(words[1]):
            self.broken[name] = self.broken.get(name, 0) + 1
            await context.abort(*status(grpc.StatusCode.UNAVAILABLE, "leaving", info("SERVER_DRAINING")))

    async def refuse(self, name: str, report: rp.DatasetReport, context: Any) -> None:
        bad = error_details_pb2.BadRequest()
        wrong = [finding for finding in report.findings if finding.level == rp.FINDING_LEVEL_ERROR]
        for finding in wrong[:25]:
            bad.field_violations.add(field=f"line {finding.line}", description=finding.message)
        lines = ",".join(str(finding.line) for finding in wrong[:100])
        total = report.counts[0].count
        why = info("DATASET_INVALID", findings=str(total), lines=lines)
        await context.abort(*status(grpc.StatusCode.INVALID_ARGUMENT, f"{total} findings in {name}", why, bad))

    def keep(self, name: str, content: bytes, *, rows: int, reading: Any = None, **more: Any) -> Dataset:
        versions = [each for each in self.datasets.values() if each.name == name]
        sha256 = hashlib.sha256(content).hexdigest()
        dataset = Dataset(
            id=f"ds_01{hashlib.sha256(f'{name}{len(versions)}'.encode()).hexdigest()[:24].upper()}", name=name,
            version=len(versions) + 1, sha256=sha256, size_bytes=len(content), rows=rows,
            format=DATASET_FORMAT_MESSAGES, reading=reading, **more,
        )  # fmt: skip
        dataset.create_time.GetCurrentTime()
        self.datasets[dataset.id] = dataset
        return dataset

    async def dataset(self, name: str, context: Any) -> Dataset:
        for each in reversed(self.datasets.values()):
            if name in (each.id, each.name, f"{each.name}@{each.version}"):
                return each
        await context.abort(*status(grpc.StatusCode.NOT_FOUND, f"no dataset {name}", info("DATASET_NOT_FOUND")))
        raise AssertionError

    async def GetDataset(self, request: Any, context: Any) -> Any:
        dataset = await self.dataset(request.dataset, context)
        report = rp.DatasetReport(rows=dataset.rows, reading=DatasetReading(file_format=FILE_FORMAT_JSONL))
        report.findings.add(level=rp.FINDING_LEVEL_WARNING, code="DUPLICATE_ROW", line=7, message=f"as {NASTY} line 3")
        report.counts.add(level=rp.FINDING_LEVEL_WARNING, code="DUPLICATE_ROW", count=2)
        report.statistics.turns["user"] = 12
        report.statistics.lengths.add(up_to=64, rows=10)
        report.statistics.lengths.add(up_to=128, rows=2)
        reports = [tokens_of(dataset.id, "builtin/tiny")] if dataset.name == "checked" else []
        return ds.GetDatasetResponse(dataset=dataset, report=report, token_reports=reports)

    async def ListDatasets(self, request: Any, context: Any) -> Any:
        every = list(reversed(self.datasets.values()))
        found = [each for each in every if request.name in ("", each.name) and each.id.startswith(request.id_prefix)]
        return ds.ListDatasetsResponse(datasets=found)

    async def DeleteDataset(self, request: Any, context: Any) -> Any:
        dataset = await self.dataset(request.dataset, context)
        return ds.DeleteDatasetResponse(dataset=self.datasets.pop(dataset.id))

    async def ImportDataset(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """`https://early/` ends without a result the first time, `https://wrong/` has a broken row."""
        self.note("ImportDataset", request)
        for done in (0, 50, 100):
            progress = ds.TransferProgress(completed=done, total=100, unit="bytes")
            yield ds.ImportDatasetResponse(progress=progress)
        if request.url == "https://early/" and not self.broken.get(request.url):
            self.broken[request.url] = 1
            return
        if request.name == "pondering-too":
            await asyncio.sleep(3.5)
        if request.url == "https://wrong/":
            await self.refuse(request.name, report_on(b"oops\n"), context)
        source = request.url or f"hf://datasets/{request.hub.id}@abc?split={request.hub.split or 'train'}"
        kept = self.keep(request.name, source.encode(), rows=3, reading=request.reading, source=source)
        yield ds.ImportDatasetResponse(imported=ds.UploadDatasetResponse(dataset=kept, created=True))

    async def PreviewDataset(self, request: Any, context: Any) -> Any:
        self.note("PreviewDataset", request)
        await self.dataset(request.dataset, context)
        response = ds.PreviewDatasetResponse()
        for line in list(request.lines) or range(1, (request.count or 3) + 1):
            row = response.rows.add(line=line)
            sequence = row.sequences.add(token_count=6, trained_count=2)
            if not request.base_model:
                sequence.token_count = sequence.trained_count = 0
                sequence.turns.add(role="user", content=f"Hi{NASTY}")
                sequence.turns.add(role="assistant", content="Hello\nyou", trained=True)
                continue
            response.mask_method, response.template_sha256 = "generation blocks", "ab" * 32
            texts = ["<user>", f" Hi{NASTY}", "\n", "Hel", "lo\n", "you"]
            if request.dataset == "long":
                texts = ["a token" * 50] * 60_000
            for number, text in enumerate(texts):
                sequence.tokens.add(id=number, text=text, trained=number > 2, lost=number > 4)
            row.findings.add(
                level=rp.FINDING_LEVEL_WARNING, code="ROW_TOO_LONG", line=line, message="is cut", fix="raise the limit"
            )
        return response

    async def CheckDataset(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.note("CheckDataset", request)
        dataset = await self.dataset(request.dataset, context)
        for done in (10, 20):
            yield ds.CheckDatasetResponse(progress=ds.TransferProgress(completed=done, total=20, unit="rows"))
        reports = ds.TokenReports(training=tokens_of(dataset.id, request.base_model))
        if request.validation_dataset:
            reports.validation.CopyFrom(tokens_of("ds_validation", request.base_model))
        yield ds.CheckDatasetResponse(reports=reports)

    async def DeriveDataset(self, request: Any, context: Any) -> Any:
        self.note("DeriveDataset", request)
        if "pondering" in str(request):
            await asyncio.sleep(3.5)
        if request.HasField("concatenate"):
            parents = [await self.dataset(each, context) for each in request.concatenate.datasets]
            made = [(request.concatenate.name, sum(each.rows for each in parents))]
        elif request.HasField("sample"):
            parents = [await self.dataset(request.sample.dataset, context)]
            made = [(request.sample.name or f"{parents[0].name}-sample", request.sample.rows)]
        else:
            parents = [await self.dataset(request.split.dataset, context)]
            held_out = round(parents[0].rows * request.split.validation)
            made = [(request.split.training_name or f"{parents[0].name}-train", parents[0].rows - held_out),
                    (request.split.validation_name or f"{parents[0].name}-validation", held_out)]  # fmt: skip
        operation = str(request.WhichOneof("operation"))
        lineage = DatasetLineage(operation=operation, parents=[each.id for each in parents], parameters={"seed": "1"})
        return ds.DeriveDatasetResponse(
            datasets=[self.keep(name, name.encode(), rows=rows, lineage=lineage) for name, rows in made]
        )


def report_on(content: bytes) -> rp.DatasetReport:
    """Lines that begin with no brace are errors; empty objects are worth a note."""
    lines = [b"{"] if content.startswith(b"PK") else content.splitlines()
    report = rp.DatasetReport(rows=len(lines), reading=DatasetReading(file_format=FILE_FORMAT_JSONL))
    broken = [number for number, line in enumerate(lines, 1) if not line.startswith(b"{")]
    for number in broken[:1000]:
        report.findings.add(
            level=rp.FINDING_LEVEL_ERROR, code="NOT_JSON", line=number, message="is not a JSON object", fix="mend it"
        )
    if broken:
        report.counts.add(level=rp.FINDING_LEVEL_ERROR, code="NOT_JSON", count=len(broken))
    if empty := sum(line == b"{}" for line in lines):
        report.findings.add(level=rp.FINDING_LEVEL_NOTE, code="EMPTY_ROW", line=0, message=f"empty {NASTY}")
        report.counts.add(level=rp.FINDING_LEVEL_NOTE, code="EMPTY_ROW", count=empty)
    report.statistics.rows = len(lines)
    return report


def tokens_of(dataset_id: str, base_model: str) -> rp.TokenReport:
    """What a dataset is for a base model; `bad` finds an error."""
    tokenization = Tokenization(train_on=TRAIN_ON_ASSISTANT, overlong=OVERLONG_TRUNCATE)
    report = rp.TokenReport(
        dataset_id=dataset_id, base_model=base_model, tokenization=tokenization, max_length=1024,
        template_sha256="ab" * 32, mask_method="generation blocks",
    )  # fmt: skip
    report.statistics.CopyFrom(
        rp.TokenStatistics(
            rows=1000,
            tokens=20_000,
            trained_tokens=5_000,
            longest=2048,
            overlong_rows=12,
            lost_tokens=340,
            examples=1000,
            tokens_by_role={"user": 9000, "assistant": 5000},
            estimated_steps=188,
            estimated_seconds=200.0,
        )
    )
    report.statistics.lengths.add(up_to=1024, rows=988)
    report.statistics.lengths.add(up_to=2048, rows=12)
    report.findings.add(level=rp.FINDING_LEVEL_WARNING, code="ROW_TOO_LONG", line=17, message=f"is too long {NASTY}")
    report.counts.add(level=rp.FINDING_LEVEL_WARNING, code="ROW_TOO_LONG", count=12)
    if base_model == "bad":
        report.findings.add(level=rp.FINDING_LEVEL_ERROR, code="NO_TRAINED_TOKEN", line=3, message="trains nothing")
        report.counts.add(level=rp.FINDING_LEVEL_ERROR, code="NO_TRAINED_TOKEN", count=1)
    return report
