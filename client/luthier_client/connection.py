"""A channel to the server, its stubs, and calls that are tried again.

A unary call that finds nobody (UNAVAILABLE) is sent again a few times within its timeout. All calls of the contract can
be repeated but one: reads, cancels and deletes by nature, CreateJob and ExportModel by their request_id. The one is
RollbackModelAlias, which is sent again only when it has not reached a server.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message
from google.protobuf.wrappers_pb2 import Int32Value

from luthier.v1 import datasets_pb2_grpc, fine_tuning_pb2_grpc, models_pb2_grpc
from luthier.v1.datasets_pb2 import TransferProgress, UploadDatasetRequest, UploadDatasetResponse
from luthier_client import endpoint as endpoints
from luthier_client import errors
from luthier_client.access import Access
from luthier_client.backoff import Backoff
from luthier_client.status import to_error

R = TypeVar("R")
TransferReport = Callable[[TransferProgress], None]
"""Called with how far the server is: completed, total (0 when unknown) and the unit."""

TRIES = 4
_HEALTH = "/grpc.health.v1.Health/Check"
_SERVING = 1
# The server has done nothing for a call that ended like this.
_NEVER_BEGUN = {"UNREACHABLE", "SERVER_DRAINING"}


@dataclass(frozen=True)
class ServerInfo:
    """What answers at the endpoint."""

    endpoint: str
    serving: bool
    version: str
    """The server's version; empty when it does not say."""


class Tries:
    """Whether and when a failed call is sent again, within `timeout` seconds from now (None: no limit)."""

    def __init__(self, timeout: float | None) -> None:
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._left = TRIES
        self._backoff = Backoff(first=0.1, limit=2.0)

    def remaining(self) -> float | None:
        """Seconds that are left, at least a millisecond; None without a limit."""
        return None if self._deadline is None else max(0.001, self._deadline - time.monotonic())

    def pause_after(self, error: errors.LuthierError, *, repeatable: bool = True) -> float:
        """The seconds to wait before the next try. Raises the error when there is none."""
        self._left -= 1
        may = repeatable or error.reason in _NEVER_BEGUN
        if not isinstance(error, errors.Unavailable) or not may or self._left <= 0:
            raise error
        pause = max(self._backoff.next(), min(error.retry_delay or 0.0, 5.0))
        remaining = self.remaining()
        if remaining is not None and pause >= remaining:
            raise error
        return pause


class AsyncConnection:
    """For one event loop: the channel opens with the first call. Each call has to carry `metadata`."""

    def __init__(self, access: Access, timeout: float) -> None:
        self.endpoint = access.target
        self.timeout = timeout
        self.metadata = access.metadata
        self._access = access
        self._channel: grpc.aio.Channel | None = None
        self._synchronous: Connection | None = None

    @property
    def channel(self) -> grpc.aio.Channel:
        """The channel. Belongs to the loop that runs now, which is why it is not made before."""
        if self._channel is None:
            options = endpoints.channel_options(self.endpoint)
            credentials = self._access.credentials()
            self._channel = (
                grpc.aio.insecure_channel(self.endpoint, options=options)
                if credentials is None
                else grpc.aio.secure_channel(self.endpoint, credentials, options=options)
            )
        return self._channel

    @property
    def jobs(self) -> "fine_tuning_pb2_grpc.FineTuningAsyncStub":
        """The stub of FineTuning."""
        return fine_tuning_pb2_grpc.FineTuningStub(self.channel)

    @property
    def datasets(self) -> "datasets_pb2_grpc.DatasetsAsyncStub":
        """The stub of Datasets."""
        return datasets_pb2_grpc.DatasetsStub(self.channel)

    @property
    def models(self) -> "models_pb2_grpc.ModelsAsyncStub":
        """The stub of Models."""
        return models_pb2_grpc.ModelsStub(self.channel)

    def error(self, failed: grpc.aio.AioRpcError) -> errors.LuthierError:
        """The error that a failed call stands for."""
        return to_error(failed, self.endpoint, tls=self._access.tls)

    async def unary(
        self, method: Callable[..., Awaitable[R]], request: Message, *, limited: bool = True, repeatable: bool = True
    ) -> R:
        """Calls a unary method; one that is not limited waits as long as it takes, one that is not repeatable is sent
        again only when it has reached nobody. Raises a LuthierError."""
        tries = Tries(self.timeout if limited else None)
        while True:
            try:
                return await method(request, timeout=tries.remaining(), metadata=self.metadata)
            except grpc.aio.AioRpcError as failed:
                pause = tries.pause_after(self.error(failed), repeatable=repeatable)
            await asyncio.sleep(pause)

    async def result(
        self, method: Callable[..., Any], request: Message, part: str, on_progress: TransferReport | None
    ) -> Any:
        """Calls a method that streams its progress and ends with its result, the message that has this part.

        There is no timeout. Raises a LuthierError.
        """
        tries = Tries(None)
        while True:
            call = method(request, metadata=self.metadata)
            result = None
            try:
                async for response in call:
                    if response.WhichOneof("part") == part:
                        result = response
                    elif on_progress is not None and response.HasField("progress"):
                        on_progress(response.progress)
                if result is not None:
                    return result
                pause = tries.pause_after(errors.Unavailable("the call ended without a result", reason="ENDED_EARLY"))
            except grpc.aio.AioRpcError as failed:
                pause = tries.pause_after(self.error(failed))
            finally:
                call.cancel()
            await asyncio.sleep(pause)

    async def server_info(self) -> ServerInfo:
        """Asks the server for its health and version. Raises Unavailable when nobody answers."""
        call = _health(self.channel)(b"", timeout=self.timeout, metadata=self.metadata)
        try:
            serving = _is_serving(await call)
            return ServerInfo(self.endpoint, serving, _version(await call.initial_metadata()))
        except grpc.aio.AioRpcError as failed:
            raise self.error(failed) from failed

    async def upload(self, requests: Iterator[UploadDatasetRequest]) -> UploadDatasetResponse:
        """Sends an upload, once, from another thread. Raises a LuthierError.

        On the synchronous stack: grpc.aio forgets why a server ended a call when that comes in the middle of a write
        (it says INTERNAL), and it would read the file in the event loop.
        """
        if self._synchronous is None:
            self._synchronous = Connection(self._access, self.timeout)
        connection, loop, ended = self._synchronous, asyncio.get_running_loop(), asyncio.Event()

        def end(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is gone: nobody waits
                loop.call_soon_threadsafe(ended.set)

        call: Any = connection.datasets.UploadDataset
        call = call.future(requests, metadata=self.metadata)
        call.add_done_callback(end)
        try:
            await ended.wait()
            response: UploadDatasetResponse = call.result()
            return response
        except grpc.RpcError as failed:
            raise connection.error(failed) from failed
        finally:
            call.cancel()

    async def close(self) -> None:
        """Ends every call and closes the channel."""
        if self._synchronous is not None:
            self._synchronous.close()
        if self._channel is not None:
            await self._channel.close()


class Connection:
    """The same on grpc's synchronous stack."""

    def __init__(self, access: Access, timeout: float) -> None:
        self.endpoint = access.target
        self.timeout = timeout
        self.metadata = access.metadata
        self._access = access
        options, credentials = endpoints.channel_options(self.endpoint), access.credentials()
        self.channel = (
            grpc.insecure_channel(self.endpoint, options=options)
            if credentials is None
            else grpc.secure_channel(self.endpoint, credentials, options=options)
        )
        self.jobs = fine_tuning_pb2_grpc.FineTuningStub(self.channel)
        self.datasets = datasets_pb2_grpc.DatasetsStub(self.channel)
        self.models = models_pb2_grpc.ModelsStub(self.channel)

    def upload(self, requests: Iterator[UploadDatasetRequest]) -> UploadDatasetResponse:
        """Sends an upload, once. Raises a LuthierError."""
        try:
            response: UploadDatasetResponse = self.datasets.UploadDataset(requests, metadata=self.metadata)
            return response
        except grpc.RpcError as failed:
            raise self.error(failed) from failed

    def error(self, failed: grpc.RpcError) -> errors.LuthierError:
        """The error that a failed call stands for."""
        call: Any = failed  # what a stub raises is also a grpc.Call, which the class of the exception does not say
        return to_error(call, self.endpoint, tls=self._access.tls)

    def unary(self, method: Callable[..., R], request: Message, *, limited: bool = True, repeatable: bool = True) -> R:
        """Calls a unary method; one that is not limited waits as long as it takes, one that is not repeatable is sent
        again only when it has reached nobody. Raises a LuthierError."""
        tries = Tries(self.timeout if limited else None)
        while True:
            try:
                return method(request, timeout=tries.remaining(), metadata=self.metadata)
            except grpc.RpcError as failed:
                pause = tries.pause_after(self.error(failed), repeatable=repeatable)
            time.sleep(pause)

    def result(
        self, method: Callable[..., Any], request: Message, part: str, on_progress: TransferReport | None
    ) -> Any:
        """Calls a method that streams its progress and ends with its result, the message that has this part.

        There is no timeout. Raises a LuthierError.
        """
        tries = Tries(None)
        while True:
            call = method(request, metadata=self.metadata)
            result = None
            try:
                for response in call:
                    if response.WhichOneof("part") == part:
                        result = response
                    elif on_progress is not None and response.HasField("progress"):
                        on_progress(response.progress)
                if result is not None:
                    return result
                pause = tries.pause_after(errors.Unavailable("the call ended without a result", reason="ENDED_EARLY"))
            except grpc.RpcError as failed:
                pause = tries.pause_after(self.error(failed))
            finally:
                call.cancel()
            time.sleep(pause)

    def server_info(self) -> ServerInfo:
        """Asks the server for its health and version. Raises Unavailable when nobody answers."""
        try:
            response, call = _health(self.channel).with_call(b"", timeout=self.timeout, metadata=self.metadata)
        except grpc.RpcError as failed:
            raise self.error(failed) from failed
        return ServerInfo(self.endpoint, _is_serving(response), _version(call.initial_metadata()))

    def close(self) -> None:
        """Ends every call and closes the channel."""
        self.channel.close()


def _health(channel: Any) -> Any:
    # By hand, because two bytes do not deserve another dependency: the request {service: ""} is empty on the wire.
    return channel.unary_unary(_HEALTH, request_serializer=None, response_deserializer=None)


def _is_serving(response: bytes) -> bool:
    # HealthCheckResponse{status} has the wire form of Int32Value{value}: one varint in field 1.
    return Int32Value.FromString(response).value == _SERVING


def _version(metadata: Any) -> str:
    pairs: Iterator[tuple[str, str]] = iter(metadata or ())
    return next((str(value) for key, value in pairs if key == "luthier-version"), "")
