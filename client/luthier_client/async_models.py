"""What an AsyncClient does with models: names and aliases, lineage, exports, downloads.

Where a method takes a `model`, that is `model_...`, `name` (its newest version), `name@3` or `name@production`; where
it says so, a checkpoint `job_...:step-200` too.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path
from typing import IO

import grpc.aio

from luthier.v1.export_pb2 import Export
from luthier.v1.export_task_pb2 import ExportDestination
from luthier.v1.model_pb2 import Model, ModelAlias, ModelName, ModelVersion
from luthier.v1.models_pb2 import (
    DeleteExportRequest,
    DeleteModelAliasRequest,
    DeleteModelRequest,
    GetExportRequest,
    GetExportResponse,
    GetModelCardRequest,
    GetModelCardResponse,
    GetModelLineageRequest,
    GetModelLineageResponse,
    GetModelRequest,
    GetModelResponse,
    RegisterModelRequest,
    RegisterModelResponse,
    RollbackModelAliasRequest,
    RollbackModelAliasResponse,
    SetModelAliasRequest,
    SetModelAliasResponse,
    UpdateModelResponse,
)
from luthier_client import model_requests as requests
from luthier_client.connection import AsyncConnection
from luthier_client.directory import Directory
from luthier_client.download import Download, Progress, Sink, StartOver
from luthier_client.exports import Format
from luthier_client.handle import AsyncJobHandle
from luthier_client.tarball import TarFile, TarStream


class AsyncModelMethods:
    """The part of an AsyncClient that is about models."""

    _connection: AsyncConnection

    async def get_model(self, model: str) -> Model:
        """A model, with its spec, names, aliases and tags. Raises NotFound."""
        request = GetModelRequest(model_id=model)
        response: GetModelResponse = await self._connection.unary(self._connection.models.GetModel, request)
        return response.model

    async def list_models(
        self, *, name: str = "", tags: Mapping[str, str] | None = None, id_prefix: str = "", page_size: int = 0
    ) -> AsyncIterator[Model]:
        """Yields the models, newest first: versions of `name`, with all of these tags. Without their specs."""
        request = requests.list_request(name, tags, id_prefix, page_size)
        while True:
            response = await self._connection.unary(self._connection.models.ListModels, request)
            for model in response.models:
                yield model
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    async def update_model(
        self,
        model: str,
        *,
        set_tags: Mapping[str, str] | None = None,
        remove_tags: Iterable[str] = (),
        description: str | None = None,
    ) -> Model:
        """Changes a model's tags or description; what is not given stays. Raises NotFound, InvalidSpec, ValueError."""
        request = requests.update_request(model, set_tags, remove_tags, description)
        response: UpdateModelResponse = await self._connection.unary(self._connection.models.UpdateModel, request)
        return response.model

    async def delete_model(self, model_id: str) -> None:
        """Deletes a model with its files; takes its id, no name. Raises FailedPrecondition with everything that depends
        on it in `violations`."""
        await self._connection.unary(self._connection.models.DeleteModel, DeleteModelRequest(model_id=model_id))

    async def register_model(self, model: str, name: str) -> ModelVersion:
        """Makes a model, or a checkpoint (`job_...:step-200`), the next version of a name.

        A model that is a version of it already stays that one. Raises NotFound, InvalidSpec.
        """
        request = RegisterModelRequest(model_id=model, name=name)
        method = self._connection.models.RegisterModel
        # A checkpoint is hashed whole, and may have to be copied.
        response: RegisterModelResponse = await self._connection.unary(method, request, limited=False)
        return response.version

    async def list_model_names(self, *, prefix: str = "", page_size: int = 0) -> AsyncIterator[ModelName]:
        """Yields the names with their versions and aliases, in the order of the alphabet."""
        request = requests.names_request(prefix, page_size)
        while True:
            response = await self._connection.unary(self._connection.models.ListModelNames, request)
            for each in response.names:
                yield each
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    async def set_model_alias(self, name: str, alias: str, version: int) -> ModelAlias:
        """Points an alias of a name, such as `production`, to one of its versions. Raises NotFound."""
        request = SetModelAliasRequest(name=name, alias=alias, version=version)
        response: SetModelAliasResponse = await self._connection.unary(self._connection.models.SetModelAlias, request)
        return response.alias

    async def rollback_model_alias(self, name: str, alias: str) -> ModelAlias:
        """Points an alias to where it pointed before its last move. Not sent again when the answer is lost, because a
        second one would go one further back. Raises NotFound, FailedPrecondition when it never pointed elsewhere."""
        request = RollbackModelAliasRequest(name=name, alias=alias)
        method = self._connection.models.RollbackModelAlias
        response: RollbackModelAliasResponse = await self._connection.unary(method, request, repeatable=False)
        return response.alias

    async def delete_model_alias(self, name: str, alias: str) -> None:
        """Deletes an alias; the versions stay. Raises NotFound."""
        request = DeleteModelAliasRequest(name=name, alias=alias)
        await self._connection.unary(self._connection.models.DeleteModelAlias, request)

    async def model_card(self, model: str) -> str:
        """A model's card: Markdown, with the metadata that the Hugging Face Hub reads at its top. Raises NotFound."""
        request = GetModelCardRequest(model_id=model)
        response: GetModelCardResponse = await self._connection.unary(self._connection.models.GetModelCard, request)
        return response.markdown

    async def model_lineage(self, model: str) -> GetModelLineageResponse:
        """What a model was made of and what was made of it: `nodes`, and the `edges` between them. Raises NotFound."""
        request = GetModelLineageRequest(model_id=model)
        return await self._connection.unary(self._connection.models.GetModelLineage, request)

    async def export_model(
        self,
        model: str,
        format: Format,
        *,
        proof_dataset: str = "",
        proof_rows: int | None = None,
        destination: ExportDestination | str | None = None,
        request_id: str | None = None,
        validate_only: bool = False,
    ) -> AsyncJobHandle:
        """Creates a job that writes a model, or a checkpoint, in the form that others load, and proves that it behaves
        as the tuned model does: `exports.adapter()`, `exports.merged("bf16")`, `exports.gguf("q4_k_m")`.

        It is proven on `proof_rows` rows (16) of `proof_dataset`, by default the one that the model was evaluated on,
        else trained on. Once proven, a copy goes to `destination`: a URI, or `exports.destination(uri, secret="hub")`.
        The job fails when the export is not equal; `wait(check=True).export_id` is the export. `request_id` and
        `validate_only` are as in create_job. Raises NotFound, InvalidSpec.
        """
        request = requests.export_request(
            model,
            format,
            proof_dataset=proof_dataset,
            proof_rows=proof_rows,
            destination=destination,
            request_id=request_id,
            validate_only=validate_only,
        )
        response = await self._connection.unary(self._connection.models.ExportModel, request)
        return AsyncJobHandle(self._connection, response.job)

    async def get_export(self, export_id: str) -> Export:
        """An export, with its files and its proof. Raises NotFound."""
        request = GetExportRequest(export_id=export_id)
        response: GetExportResponse = await self._connection.unary(self._connection.models.GetExport, request)
        return response.export

    async def list_exports(self, *, model: str = "", id_prefix: str = "", page_size: int = 0) -> AsyncIterator[Export]:
        """Yields the exports, newest first; with `model` only those of it. Without their lists of files."""
        request = requests.exports_request(model, id_prefix, page_size)
        while True:
            response = await self._connection.unary(self._connection.models.ListExports, request)
            for export in response.exports:
                yield export
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    async def delete_export(self, export_id: str) -> None:
        """Deletes an export with its files; a copy at a destination stays. Raises NotFound."""
        await self._connection.unary(self._connection.models.DeleteExport, DeleteExportRequest(export_id=export_id))

    async def download_model(
        self, model: str, directory: str | os.PathLike[str], *, on_progress: Progress | None = None
    ) -> Path:
        """Downloads a model, a checkpoint or an export (`export_...`) into a directory that is not there yet or empty.

        It appears whole, each file checked by size and SHA-256, or not at all. A download that breaks off goes on by
        itself; one that was given up leaves DIRECTORY.partial, from where the next call goes on. `on_progress` is told
        the bytes done and in all. Raises FileExistsError, DownloadDamaged.
        """
        target = Directory(Path(directory))
        await self._download(model, target, on_progress)
        return target.path

    async def download_model_tar(
        self, model: str, target: str | os.PathLike[str] | IO[bytes], *, on_progress: Progress | None = None
    ) -> None:
        """The same as one tar, into a file that is not there yet or a binary stream such as `sys.stdout.buffer`.

        The tar is not compressed, is the same bytes for the same files, and begins with `manifest.json`: path, size
        and SHA-256 of each (`luthier-manifest.json` where there is such a file already). A file appears whole or not at
        all, and TARGET.partial is gone on from; a stream is only whole when this returns. Raises FileExistsError,
        DownloadDamaged.
        """
        named = isinstance(target, str | os.PathLike)
        await self._download(model, TarFile(Path(target)) if named else TarStream(target), on_progress)  # type: ignore[arg-type]

    async def _download(self, model: str, sink: Sink, on_progress: Progress | None) -> None:
        with Download(sink, on_progress) as download:
            await asyncio.to_thread(download.take_up)
            while True:
                request = download.request(model)
                call = self._connection.models.DownloadModel(request, metadata=self._connection.metadata)
                pause = 0.0
                try:
                    async for response in call:
                        download.accept(response)
                    download.finish()
                    return
                except StartOver:
                    continue
                except grpc.aio.AioRpcError as failed:
                    pause = download.pause_after(self._connection.error(failed))
                finally:
                    call.cancel()
                await asyncio.sleep(pause)
