"""The client of luthierd for an event loop, on grpc.aio."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self

from luthier.v1.dataset_pb2 import Dataset
from luthier.v1.dataset_report_pb2 import DatasetReport
from luthier.v1.datasets_pb2 import (
    DeleteDatasetRequest,
    DeleteDatasetResponse,
    DeriveDatasetRequest,
    GetDatasetRequest,
    GetDatasetResponse,
    GetUploadRequest,
    ListDatasetsRequest,
    PreviewDatasetResponse,
    TokenReports,
    UploadDatasetResponse,
)
from luthier.v1.fine_tuning_pb2 import EstimateJobResponse, GetJobRequest
from luthier.v1.job_pb2 import JobSpec
from luthier_client import dataset_requests as requests
from luthier_client import job_requests
from luthier_client.access import Access
from luthier_client.async_models import AsyncModelMethods
from luthier_client.connection import AsyncConnection, ServerInfo, TransferReport
from luthier_client.dataset_requests import TokenizationLike
from luthier_client.errors import LuthierError, Unimplemented
from luthier_client.handle import AsyncJobHandle
from luthier_client.persistence import Persistence
from luthier_client.upload import Progress, Source, Upload, broke_off, in_this_loop, open_upload


class AsyncClient(AsyncModelMethods):
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
        request = job_requests.create_request(spec, request_id, validate_only)
        response = await self._connection.unary(self._connection.jobs.CreateJob, request)
        return AsyncJobHandle(self._connection, response.job)

    async def estimate_job(self, spec: JobSpec, *, probe: bool = False) -> EstimateJobResponse:
        """What a job would take: tokens, steps, time, money, memory and disk. Nothing is created.

        With `probe` the model is loaded and two real steps are made, in a free slot. No timeout holds: the server may
        have to count tokens, or to train. Raises InvalidSpec, and FailedPrecondition for a probe without a free slot.
        """
        request = job_requests.estimate_request(spec, probe)
        return await self._connection.unary(self._connection.jobs.EstimateJob, request, limited=False)

    async def get_job(self, job_id: str) -> AsyncJobHandle:
        """A job by its id. Raises NotFound."""
        response = await self._connection.unary(self._connection.jobs.GetJob, GetJobRequest(job_id=job_id))
        return AsyncJobHandle(self._connection, response.job)

    async def list_jobs(
        self,
        *,
        states: Iterable[job_requests.State] = (),
        labels: Mapping[str, str] | None = None,
        id_prefix: str = "",
        page_size: int = 0,
    ) -> AsyncIterator[AsyncJobHandle]:
        """Yields the jobs that fit, newest first, fetching page after page as they are taken."""
        request = job_requests.list_request(states, labels, id_prefix, page_size)
        while True:
            response = await self._connection.unary(self._connection.jobs.ListJobs, request)
            for job in response.jobs:
                yield AsyncJobHandle(self._connection, job)
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    async def upload_dataset(
        self,
        source: Source,
        *,
        name: str | None = None,
        file_format: str = "",
        format: str = "",
        columns: Mapping[str, str] | None = None,
        images: str | os.PathLike[str] | None = None,
        on_progress: Progress | None = None,
        on_hashing: Progress | None = None,
    ) -> Dataset:
        """Uploads a file or a folder (its path), bytes, or rows (mappings, written as JSON lines).

        Without a name a file gives its own; bytes and rows need one. The same bytes under the same name give the
        version that is there already. What the server has of these bytes is not sent again, so an upload that broke off
        goes on, here and when it is called anew. A folder, or a file with the folder of its `images`, is sent as one
        zip. How the file is read is detected, or told by `file_format` (`csv`), `format` (`prompt_completion`) and
        `columns` (from a format's field to the file's column). `on_progress` is told the bytes done and in all, from
        where the upload goes on; `on_hashing`, told likewise while a file is hashed, from another thread.
        Raises InvalidDataset with the lines that were refused, OSError, ValueError.
        """
        response = await self.upload(
            source,
            name=name,
            file_format=file_format,
            format=format,
            columns=columns,
            images=images,
            on_progress=on_progress,
            on_hashing=on_hashing,
        )
        return response.dataset

    async def upload(
        self,
        source: Source,
        *,
        name: str | None = None,
        file_format: str = "",
        format: str = "",
        columns: Mapping[str, str] | None = None,
        images: str | os.PathLike[str] | None = None,
        on_progress: Progress | None = None,
        on_hashing: Progress | None = None,
    ) -> UploadDatasetResponse:
        """As upload_dataset; the response also has the report, and says whether a new version was made."""
        reading = requests.reading_of(file_format, format, columns)
        upload = await asyncio.to_thread(
            open_upload, source, name, reading=reading, images=images, on_hashing=on_hashing
        )
        return await self._send(upload, on_progress)

    async def validate_dataset(
        self,
        source: Source,
        *,
        file_format: str = "",
        format: str = "",
        columns: Mapping[str, str] | None = None,
        images: str | os.PathLike[str] | None = None,
        on_progress: Progress | None = None,
        on_hashing: Progress | None = None,
    ) -> DatasetReport:
        """Has the server check a dataset and keep nothing of it; takes what upload_dataset takes.

        The report lists errors; they are not raised.
        """
        reading = requests.reading_of(file_format, format, columns)
        upload = await asyncio.to_thread(
            open_upload, source, reading=reading, images=images, validate_only=True, on_hashing=on_hashing
        )
        return (await self._send(upload, on_progress)).report

    async def import_dataset(
        self,
        name: str,
        *,
        url: str = "",
        hub: str = "",
        config: str = "",
        split: str = "",
        revision: str = "",
        token_secret: str = "",
        sha256: str = "",
        file_format: str = "",
        format: str = "",
        columns: Mapping[str, str] | None = None,
        on_progress: TransferReport | None = None,
    ) -> Dataset:
        """Has the server fetch a dataset: from a `url` (https, s3, gs, or file in a folder that the operator allows),
        or from the Hugging Face Hub by its id there (`hub="openai/gsm8k"`, with `config`, `split` and `revision`).

        `token_secret` names a secret that the operator configured. With `sha256` other bytes than these are refused.
        `file_format`, `format` and `columns` are as in upload_dataset. Raises InvalidDataset and others.
        """
        request = requests.import_request(
            name,
            url=url,
            hub=hub,
            config=config,
            split=split,
            revision=revision,
            token_secret=token_secret,
            sha256=sha256,
            reading=requests.reading_of(file_format, format, columns),
        )
        method = self._connection.datasets.ImportDataset
        response = await self._connection.result(method, request, "imported", on_progress)
        imported: UploadDatasetResponse = response.imported
        return imported.dataset

    async def get_dataset(self, dataset: str) -> Dataset:
        """A dataset by `ds_...`, `name` (its newest version) or `name@3`. Raises NotFound."""
        return (await self.dataset_report(dataset)).dataset

    async def dataset_report(self, dataset: str) -> GetDatasetResponse:
        """A dataset with what its check found, and what checks for base models found. Raises NotFound."""
        request = GetDatasetRequest(dataset=dataset)
        return await self._connection.unary(self._connection.datasets.GetDataset, request)

    async def list_datasets(self, *, name: str = "", id_prefix: str = "", page_size: int = 0) -> AsyncIterator[Dataset]:
        """Yields the datasets, newest first; with `name` only its versions."""
        request = ListDatasetsRequest(name=name, id_prefix=id_prefix, page_size=page_size)
        while True:
            response = await self._connection.unary(self._connection.datasets.ListDatasets, request)
            for dataset in response.datasets:
                yield dataset
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    async def preview_dataset(
        self,
        dataset: str,
        *,
        base_model: str = "",
        base_model_revision: str = "",
        tokenization: TokenizationLike | None = None,
        max_length: int | None = None,
        count: int = 0,
        lines: Sequence[int] = (),
        hub_token_secret: str = "",
    ) -> PreviewDatasetResponse:
        """Rows as the model will see them: the rendered template, the tokens, and which of them are trained.

        Shows the first `count` rows (0: the server's default), or those at `lines`. Without a base model there are only
        turns. `tokenization` is the message, or its fields as a job file has them: `{"train_on": "last_turn"}`. No
        timeout holds: the server may have to fetch a tokenizer.
        """
        request = requests.preview_request(
            dataset,
            base_model=base_model,
            base_model_revision=base_model_revision,
            tokenization=tokenization,
            max_length=max_length,
            count=count,
            lines=lines,
            hub_token_secret=hub_token_secret,
        )
        return await self._connection.unary(self._connection.datasets.PreviewDataset, request, limited=False)

    async def check_dataset(
        self,
        dataset: str,
        base_model: str,
        *,
        base_model_revision: str = "",
        tokenization: TokenizationLike | None = None,
        max_length: int | None = None,
        validation_dataset: str = "",
        hub_token_secret: str = "",
        on_progress: TransferReport | None = None,
    ) -> TokenReports:
        """Checks a dataset for a base model as a job on it would be: every row rendered, tokenised and masked.

        With a validation dataset rows that are in both are found. The reports list errors; they are not raised.
        """
        request = requests.check_request(
            dataset,
            base_model=base_model,
            base_model_revision=base_model_revision,
            tokenization=tokenization,
            max_length=max_length,
            validation_dataset=validation_dataset,
            hub_token_secret=hub_token_secret,
        )
        method = self._connection.datasets.CheckDataset
        response = await self._connection.result(method, request, "reports", on_progress)
        reports: TokenReports = response.reports
        return reports

    async def split_dataset(
        self, dataset: str, *, validation: float, seed: int = 0, training_name: str = "", validation_name: str = ""
    ) -> tuple[Dataset, Dataset]:
        """Splits a dataset in two new ones, for training and for validation, which gets that share of the rows.

        Equal rows fall on one side. The same seed gives the same split. Names default to `NAME-train` and
        `NAME-validation`.
        """
        request = requests.split_request(
            dataset,
            validation=validation,
            seed=seed,
            training_name=training_name,
            validation_name=validation_name,
        )
        training, held_out = await self._derive(request)
        return training, held_out

    async def sample_dataset(self, dataset: str, *, rows: int, seed: int = 0, name: str = "") -> Dataset:
        """Makes a new dataset of so many rows, chosen by the seed, in their order; by default `NAME-sample`."""
        (sample,) = await self._derive(requests.sample_request(dataset, rows=rows, seed=seed, name=name))
        return sample

    async def concatenate_datasets(self, datasets: Sequence[str], *, name: str) -> Dataset:
        """Makes a new dataset of all rows of several, one after the other."""
        (whole,) = await self._derive(requests.concatenate_request(datasets, name=name))
        return whole

    async def delete_dataset(self, dataset: str) -> Dataset:
        """Deletes one version (`ds_...` or `name@3`). Raises FailedPrecondition while a job needs it."""
        request = DeleteDatasetRequest(dataset=dataset)
        response: DeleteDatasetResponse = await self._connection.unary(self._connection.datasets.DeleteDataset, request)
        return response.dataset

    async def _send(self, upload: Upload, on_progress: Progress | None) -> UploadDatasetResponse:
        """Sends what the server does not have yet, as often as there is hope, and closes the upload."""
        told = in_this_loop(on_progress)
        persistence = Persistence(passing=broke_off)
        request = GetUploadRequest(sha256=upload.sha256)
        try:
            while True:
                try:
                    try:
                        there = await self._connection.unary(self._connection.datasets.GetUpload, request)
                        offset = min(there.received_bytes, upload.size_bytes)
                    except Unimplemented:  # an older server takes whole files alone
                        offset = 0
                    persistence.met(offset)
                    return await self._connection.upload(upload.requests(offset, told))
                except LuthierError as error:
                    pause = persistence.pause_after(error)
                await asyncio.sleep(pause)
        finally:
            upload.close()

    async def _derive(self, request: DeriveDatasetRequest) -> list[Dataset]:
        method = self._connection.datasets.DeriveDataset
        return list((await self._connection.unary(method, request, limited=False)).datasets)
