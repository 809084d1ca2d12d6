"""The fake service's models: the jobs' own, their exports, and what a client must refuse, retry or never repeat.

Ids that say what happens:

    escape, damaged, short      a download that must be refused
    flaky                       each stream of a download breaks after three chunks
    slow                        a chunk takes a while, so that the server can be killed in between
    needed                      cannot be deleted
    NAME                        RollbackModelAlias(NAME, "lost") is done, and its answer is lost
    unequal                     its exports are not equal
"""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from google.protobuf import json_format
from google.rpc import error_details_pb2
from unit.client.fake_guard import info, status

from luthier.v1 import models_pb2 as md
from luthier.v1 import models_pb2_grpc
from luthier.v1.export_pb2 import Export
from luthier.v1.job_pb2 import JOB_STATE_VALIDATING, Job, JobSpec
from luthier.v1.model_pb2 import Model, ModelAlias, ModelFile, ModelVersion

FILES = {"adapter_config.json": b'{"r": 16}\n', "adapter_model.safetensors": bytes(range(256)) * 3000, "empty.txt": b""}
_CHUNK = 65536


class FakeModels(models_pb2_grpc.ModelsServicer):
    def __init__(self, state: Any, job: Callable[[str], Job]) -> None:
        self.state = state
        self.job = job

    def jobs(self) -> list[Job]:
        return [self.job(job_id) for job_id in sorted(self.state.rows, reverse=True)]

    def models(self) -> list[Model]:
        return [
            Model(id=job.model_id, name="tiny-cards", job_id=job.id, base_model="builtin/tiny", adaptation="lora",
                  step=job.progress.step, size_bytes=sum(map(len, FILES.values())), metrics={"eval_loss": 0.9})
            for job in self.jobs() if job.model_id
        ]  # fmt: skip

    async def GetModel(self, request: Any, context: Any) -> Any:
        for model in self.models():
            if model.id == request.model_id:
                return md.GetModelResponse(model=model)
        await context.abort(*status(grpc.StatusCode.NOT_FOUND, "no such model", info("MODEL_NOT_FOUND")))

    async def ListModels(self, request: Any, context: Any) -> Any:
        return md.ListModelsResponse(models=[each for each in self.models() if each.id.startswith(request.id_prefix)])

    async def RegisterModel(self, request: Any, context: Any) -> Any:
        await asyncio.sleep(0.8)  # as one that hashes a large checkpoint
        return md.RegisterModelResponse(version=ModelVersion(name=request.name, version=1, model_id=request.model_id))

    async def DeleteModel(self, request: Any, context: Any) -> Any:
        unmet = error_details_pb2.PreconditionFailure()
        for subject, text in (
            ("job_01J8ZQ4Y6N0000000000000001", "goes on from it"),
            ("export_01J8ZQ4Y6N0000000000000002", "was made of it"),
            ("support-bot@production", "points to it"),
        ):
            unmet.violations.add(type="MODEL_IN_USE", subject=subject, description=text)
        code = grpc.StatusCode.FAILED_PRECONDITION
        await context.abort(*status(code, "something depends on it", info("MODEL_IN_USE"), unmet))

    async def RollbackModelAlias(self, request: Any, context: Any) -> Any:
        self.state.note(method="RollbackModelAlias", name=request.name)
        if request.alias == "lost":
            await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
        return md.RollbackModelAliasResponse(alias=ModelAlias(name=request.name, alias=request.alias, version=1))

    async def unknown(self, request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "the tests ask a real server for this")

    UpdateModel: Any = unknown
    ListModelNames: Any = unknown
    SetModelAlias: Any = unknown
    DeleteModelAlias: Any = unknown
    GetModelCard: Any = unknown
    GetModelLineage: Any = unknown
    DeleteExport: Any = unknown

    async def ExportModel(self, request: Any, context: Any) -> Any:
        self.state.note(method="ExportModel", request=json_format.MessageToDict(request))
        spec = JobSpec(export=request.export)
        if request.validate_only:
            return md.ExportModelResponse(job=Job(spec=spec, resolved_spec=spec))
        digest = hashlib.sha256(request.request_id.encode()).hexdigest()[:16].upper()
        job_id = f"job_01{len(self.state.rows):08d}{digest}"
        self.state.rows[job_id] = {
            "spec": json_format.MessageToDict(spec), "created": time.time(), "request_id": request.request_id
        }  # fmt: skip
        self.state.save()
        return md.ExportModelResponse(job=Job(id=job_id, spec=spec, state=JOB_STATE_VALIDATING))

    def exports(self) -> list[Export]:
        return [
            Export(id=job.export_id, job_id=job.id, task=job.spec.export, model_id=job.spec.export.model, size_bytes=9)
            for job in self.jobs() if job.export_id
        ]  # fmt: skip

    async def GetExport(self, request: Any, context: Any) -> Any:
        for export in self.exports():
            if export.id == request.export_id:
                return md.GetExportResponse(export=export)
        await context.abort(*status(grpc.StatusCode.NOT_FOUND, "no such export", info("EXPORT_NOT_FOUND")))

    async def ListExports(self, request: Any, context: Any) -> Any:
        return md.ListExportsResponse(exports=[e for e in self.exports() if e.id.startswith(request.id_prefix)])

    async def DownloadModel(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Any id brings the files."""
        self.state.note(method="DownloadModel", path=request.from_path, offset=request.from_offset)
        files = [
            ModelFile(path=path, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
            for path, data in FILES.items()
        ]
        if request.model_id == "escape":
            files[0].path = "../escaped"
        yield md.DownloadModelResponse(manifest=md.DownloadManifest(files=files))
        begun, sent = not request.from_path, 0
        for file in files:
            data = FILES.get(file.path, b"gotcha")
            if request.model_id == "damaged":
                data = bytes(len(data))
            if request.model_id == "short":
                data = data[:-1]
            offset = request.from_offset if file.path == request.from_path else 0
            begun = begun or file.path == request.from_path
            for start in range(offset, len(data) if begun else 0, _CHUNK):
                if request.model_id == "flaky" and sent == 3:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
                if request.model_id == "slow":
                    await asyncio.sleep(0.1)
                chunk = md.FileChunk(path=file.path, offset=start, data=data[start : start + _CHUNK])
                yield md.DownloadModelResponse(chunk=chunk)
                sent += 1
