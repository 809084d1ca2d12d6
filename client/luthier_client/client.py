"""Clients of luthierd: AsyncClient on grpc.aio, Client on grpc's synchronous stack. They offer the same."""

import asyncio
import os
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias, cast

import grpc
import grpc.aio

from luthier.v1.dataset_pb2 import Dataset
from luthier.v1.datasets_pb2 import (
    DeleteDatasetRequest,
    DeleteDatasetResponse,
    GetDatasetRequest,
    GetDatasetResponse,
    ListDatasetsRequest,
    UploadDatasetResponse,
)
from luthier.v1.fine_tuning_pb2 import CreateJobRequest, GetJobRequest, ListJobsRequest
from luthier.v1.job_pb2 import JobSpec, JobState
from luthier.v1.model_pb2 import Model
from luthier.v1.models_pb2 import DownloadModelRequest, GetModelRequest, GetModelResponse, ListModelsRequest
from luthier_client import enums
from luthier_client.access import Access
from luthier_client.connection import AsyncConnection, Connection, ServerInfo, Tries
from luthier_client.download import Download
from luthier_client.handle import AsyncJobHandle, JobHandle
from luthier_client.upload import Progress, Source, open_upload

State: TypeAlias = "JobState.ValueType | str"
"""A job state: its number, or its name in lower case, such as `running`."""


class AsyncClient:
    """A client for one event loop.

    async with AsyncClient() as client:
        dataset = await client.upload_dataset("train.jsonl")
        job = await client.create_job(spec)
        async for event in job.watch():
            ...

    endpoint: HOST:PORT; default $LUTHIER_ENDPOINT, else 127.0.0.1:50051. timeout: seconds for a unary call with all its
    tries; uploads, downloads and watches have none. Every method raises a LuthierError of `luthier_client.errors`.

    token: what the server asks for; default $LUTHIER_TOKEN, else the one in the file $LUTHIER_TOKEN_FILE. tls: whether
    to speak TLS; default: when the endpoint begins with https:// or there is a tls_ca. tls_ca: the authority that
    signed the server's certificate, as PEM bytes or the path of a PEM file; default $LUTHIER_TLS_CA, else the public
    ones. insecure: allow a token to go over the network in clear text. What cannot be used raises ValueError or
    OSError.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        *,
        timeout: float = 30.0,
        token: str | None = None,
        tls_ca: str | os.PathLike[str] | bytes | None = None,
        tls: bool | None = None,
        insecure: bool = False,
    ) -> None:
        access = Access.find(endpoint, token=token, tls_ca=tls_ca, tls=tls, insecure=insecure)
        self._connection = AsyncConnection(access, timeout)

    @property
    def endpoint(self) -> str:
        """Where the server is."""
        return self._connection.endpoint

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends every call and closes the channel."""
        await self._connection.close()

    async def server_info(self) -> ServerInfo:
        """Asks the server for its health and version. Raises Unavailable when nobody answers."""
        return await self._connection.server_info()

    async def create_job(
        self, spec: JobSpec, *, request_id: str | None = None, validate_only: bool = False
    ) -> AsyncJobHandle:
        """Creates a job; with `validate_only` it only says what would be created.

        `request_id` (a UUID, made here by default) makes this safe to send again: the same id gives the same job.
        Raises InvalidSpec with every violation at once.
        """
        request = _create_request(spec, request_id, validate_only)
        response = await self._connection.unary(self._connection.jobs.CreateJob, request)
        return AsyncJobHandle(self._connection, response.job)

    async def get_job(self, job_id: str) -> AsyncJobHandle:
        """A job by its id. Raises NotFound."""
        response = await self._connection.unary(self._connection.jobs.GetJob, GetJobRequest(job_id=job_id))
        return AsyncJobHandle(self._connection, response.job)

    async def list_jobs(
        self,
        *,
        states: Iterable[State] = (),
        labels: Mapping[str, str] | None = None,
        id_prefix: str = "",
        page_size: int = 0,
    ) -> AsyncIterator[AsyncJobHandle]:
        """Yields the jobs that fit, newest first, fetching page after page as they are taken."""
        request = _list_jobs_request(states, labels, id_prefix, page_size)
        while True:
            response = await self._connection.unary(self._connection.jobs.ListJobs, request)
            for job in response.jobs:
                yield AsyncJobHandle(self._connection, job)
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    async def upload_dataset(
        self, source: Source, *, name: str | None = None, on_progress: Progress | None = None
    ) -> Dataset:
        """Uploads a file (its path), bytes, or rows (mappings, written as JSON lines).

        Without a name a file gives its own; bytes and rows need one. The same bytes under the same name give the
        version that is there already. Raises InvalidDataset with the lines that were refused.
        """
        return (await self.upload(source, name=name, on_progress=on_progress)).dataset

    async def upload(
        self, source: Source, *, name: str | None = None, on_progress: Progress | None = None
    ) -> UploadDatasetResponse:
        """As upload_dataset; the response also says whether a new version was made."""
        upload = await asyncio.to_thread(open_upload, source, name)
        try:
            tries = Tries(None)
            while True:
                try:
                    requests = upload.requests_async(on_progress)
                    call = self._connection.datasets.UploadDataset(requests, metadata=self._connection.metadata)
                    response: UploadDatasetResponse = await call
                    return response
                except grpc.aio.AioRpcError as failed:
                    pause = tries.pause_after(self._connection.error(failed))
                await asyncio.sleep(pause)
        finally:
            upload.close()

    async def get_dataset(self, dataset: str) -> Dataset:
        """A dataset by `ds_...`, `name` (its newest version) or `name@3`. Raises NotFound."""
        request = GetDatasetRequest(dataset=dataset)
        response: GetDatasetResponse = await self._connection.unary(self._connection.datasets.GetDataset, request)
        return response.dataset

    async def list_datasets(self, *, name: str = "", page_size: int = 0) -> AsyncIterator[Dataset]:
        """Yields the datasets, newest first; with `name` only its versions."""
        request = ListDatasetsRequest(name=name, page_size=page_size)
        while True:
            response = await self._connection.unary(self._connection.datasets.ListDatasets, request)
            for dataset in response.datasets:
                yield dataset
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    async def delete_dataset(self, dataset: str) -> Dataset:
        """Deletes one version (`ds_...` or `name@3`). Raises FailedPrecondition while a job needs it."""
        request = DeleteDatasetRequest(dataset=dataset)
        response: DeleteDatasetResponse = await self._connection.unary(self._connection.datasets.DeleteDataset, request)
        return response.dataset

    async def get_model(self, model_id: str) -> Model:
        """A model by its id. Raises NotFound."""
        request = GetModelRequest(model_id=model_id)
        response: GetModelResponse = await self._connection.unary(self._connection.models.GetModel, request)
        return response.model

    async def list_models(self, *, id_prefix: str = "", page_size: int = 0) -> AsyncIterator[Model]:
        """Yields the models, newest first."""
        request = ListModelsRequest(id_prefix=id_prefix, page_size=page_size)
        while True:
            response = await self._connection.unary(self._connection.models.ListModels, request)
            for model in response.models:
                yield model
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    async def download_model(
        self, model_id: str, directory: str | os.PathLike[str], *, on_progress: Callable[[int, int], None] | None = None
    ) -> Path:
        """Downloads a model, or a checkpoint (`job_...:step-200`), into a directory that is not there yet or empty.

        It appears whole, each file checked by size and SHA-256, or not at all. Raises FileExistsError, DownloadDamaged.
        """
        tries = Tries(None)
        while True:
            request = DownloadModelRequest(model_id=model_id)
            call = self._connection.models.DownloadModel(request, metadata=self._connection.metadata)
            try:
                with Download(Path(directory), on_progress) as download:
                    async for response in call:
                        download.accept(response)
                    return download.finish()
            except grpc.aio.AioRpcError as failed:
                pause = tries.pause_after(self._connection.error(failed))
            finally:
                call.cancel()
            await asyncio.sleep(pause)


class Client:
    """The same for code without an event loop; may be shared by threads.

    with Client() as client:
        job = client.create_job(spec)
        print(job.wait().model_id)
    """

    def __init__(
        self,
        endpoint: str | None = None,
        *,
        timeout: float = 30.0,
        token: str | None = None,
        tls_ca: str | os.PathLike[str] | bytes | None = None,
        tls: bool | None = None,
        insecure: bool = False,
    ) -> None:
        access = Access.find(endpoint, token=token, tls_ca=tls_ca, tls=tls, insecure=insecure)
        self._connection = Connection(access, timeout)

    @property
    def endpoint(self) -> str:
        """Where the server is."""
        return self._connection.endpoint

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends every call and closes the channel."""
        self._connection.close()

    def server_info(self) -> ServerInfo:
        """Asks the server for its health and version. Raises Unavailable when nobody answers."""
        return self._connection.server_info()

    def create_job(self, spec: JobSpec, *, request_id: str | None = None, validate_only: bool = False) -> JobHandle:
        """Creates a job; with `validate_only` it only says what would be created.

        `request_id` (a UUID, made here by default) makes this safe to send again: the same id gives the same job.
        Raises InvalidSpec with every violation at once.
        """
        request = _create_request(spec, request_id, validate_only)
        return JobHandle(self._connection, self._connection.unary(self._connection.jobs.CreateJob, request).job)

    def get_job(self, job_id: str) -> JobHandle:
        """A job by its id. Raises NotFound."""
        response = self._connection.unary(self._connection.jobs.GetJob, GetJobRequest(job_id=job_id))
        return JobHandle(self._connection, response.job)

    def list_jobs(
        self,
        *,
        states: Iterable[State] = (),
        labels: Mapping[str, str] | None = None,
        id_prefix: str = "",
        page_size: int = 0,
    ) -> Iterator[JobHandle]:
        """Yields the jobs that fit, newest first, fetching page after page as they are taken."""
        request = _list_jobs_request(states, labels, id_prefix, page_size)
        while True:
            response = self._connection.unary(self._connection.jobs.ListJobs, request)
            for job in response.jobs:
                yield JobHandle(self._connection, job)
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    def upload_dataset(
        self, source: Source, *, name: str | None = None, on_progress: Progress | None = None
    ) -> Dataset:
        """Uploads a file (its path), bytes, or rows (mappings, written as JSON lines).

        Without a name a file gives its own; bytes and rows need one. The same bytes under the same name give the
        version that is there already. Raises InvalidDataset with the lines that were refused.
        `on_progress` is called from another thread.
        """
        return self.upload(source, name=name, on_progress=on_progress).dataset

    def upload(
        self, source: Source, *, name: str | None = None, on_progress: Progress | None = None
    ) -> UploadDatasetResponse:
        """As upload_dataset; the response also says whether a new version was made."""
        upload = open_upload(source, name)
        try:
            tries = Tries(None)
            while True:
                try:
                    requests = upload.requests(on_progress)
                    response: UploadDatasetResponse
                    response = self._connection.datasets.UploadDataset(requests, metadata=self._connection.metadata)
                    return response
                except grpc.RpcError as failed:
                    pause = tries.pause_after(self._connection.error(failed))
                time.sleep(pause)
        finally:
            upload.close()

    def get_dataset(self, dataset: str) -> Dataset:
        """A dataset by `ds_...`, `name` (its newest version) or `name@3`. Raises NotFound."""
        request = GetDatasetRequest(dataset=dataset)
        response: GetDatasetResponse = self._connection.unary(self._connection.datasets.GetDataset, request)
        return response.dataset

    def list_datasets(self, *, name: str = "", page_size: int = 0) -> Iterator[Dataset]:
        """Yields the datasets, newest first; with `name` only its versions."""
        request = ListDatasetsRequest(name=name, page_size=page_size)
        while True:
            response = self._connection.unary(self._connection.datasets.ListDatasets, request)
            yield from response.datasets
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    def delete_dataset(self, dataset: str) -> Dataset:
        """Deletes one version (`ds_...` or `name@3`). Raises FailedPrecondition while a job needs it."""
        request = DeleteDatasetRequest(dataset=dataset)
        response: DeleteDatasetResponse = self._connection.unary(self._connection.datasets.DeleteDataset, request)
        return response.dataset

    def get_model(self, model_id: str) -> Model:
        """A model by its id. Raises NotFound."""
        request = GetModelRequest(model_id=model_id)
        response: GetModelResponse = self._connection.unary(self._connection.models.GetModel, request)
        return response.model

    def list_models(self, *, id_prefix: str = "", page_size: int = 0) -> Iterator[Model]:
        """Yields the models, newest first."""
        request = ListModelsRequest(id_prefix=id_prefix, page_size=page_size)
        while True:
            response = self._connection.unary(self._connection.models.ListModels, request)
            yield from response.models
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    def download_model(
        self, model_id: str, directory: str | os.PathLike[str], *, on_progress: Callable[[int, int], None] | None = None
    ) -> Path:
        """Downloads a model, or a checkpoint (`job_...:step-200`), into a directory that is not there yet or empty.

        It appears whole, each file checked by size and SHA-256, or not at all. Raises FileExistsError, DownloadDamaged.
        """
        tries = Tries(None)
        while True:
            request = DownloadModelRequest(model_id=model_id)
            call = self._connection.models.DownloadModel(request, metadata=self._connection.metadata)
            try:
                with Download(Path(directory), on_progress) as download:
                    for response in call:
                        download.accept(response)
                    return download.finish()
            except grpc.RpcError as failed:
                pause = tries.pause_after(self._connection.error(failed))
            finally:
                call.cancel()
            time.sleep(pause)


def _create_request(spec: JobSpec, request_id: str | None, validate_only: bool) -> CreateJobRequest:
    return CreateJobRequest(spec=spec, request_id=request_id or str(uuid.uuid4()), validate_only=validate_only)


def _list_jobs_request(
    states: Iterable[State], labels: Mapping[str, str] | None, id_prefix: str, page_size: int
) -> ListJobsRequest:
    numbers = [_state(state) for state in states]
    return ListJobsRequest(states=numbers, labels=labels, id_prefix=id_prefix, page_size=page_size)


def _state(state: State) -> JobState.ValueType:
    number = enums.number(JobState.DESCRIPTOR, state) if isinstance(state, str) else state
    return cast("JobState.ValueType", number)
