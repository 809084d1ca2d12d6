"""The edge of the domain: bytes become checked requests, exceptions become statuses, and nothing else leaks out.

The status of an error carries exactly one ErrorInfo, at most one detail of each type, and stays below about 4 kB,
because trailers over 8 KiB are dropped at random.
"""

import uuid
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn, TypeAlias, TypeVar

import grpc
import structlog
from google.protobuf import any_pb2, message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from luthier_server import __version__, errors, spec

log = structlog.get_logger()
M = TypeVar("M", bound=Message)
F = TypeVar("F", bound=Callable[..., Any])
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
VERSION_METADATA = (("luthier-version", __version__),)

# The first class of an error's ancestry that stands here decides; a test walks the whole tree.
CODES: dict[type[errors.LuthierError], grpc.StatusCode] = {
    errors.InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    errors.OutOfRange: grpc.StatusCode.OUT_OF_RANGE,
    errors.Exhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Aborted: grpc.StatusCode.ABORTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.StoreCorrupt: grpc.StatusCode.DATA_LOSS,
    errors.LuthierError: grpc.StatusCode.INTERNAL,
}
_DOMAIN = "luthier"
_TEXT = 1000


class Malformed:
    """Stands in for a request whose bytes do not decode."""


def code_of(error: errors.LuthierError) -> grpc.StatusCode:
    """The status code of an error."""
    return next(CODES[each] for each in type(error).__mro__ if each in CODES)


def status_of(error: errors.LuthierError) -> status_pb2.Status:
    """The whole status of an error, details included."""
    metadata = {key: value[:600] for key, value in error.metadata.items()}
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=_DOMAIN, metadata=metadata),
        *_details(error),
    ]
    status = status_pb2.Status(code=code_of(error).value[0], message=error.message[:_TEXT])
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def _details(error: errors.LuthierError) -> list[Message]:
    found: list[Message] = []
    if isinstance(error, errors.InvalidArgument) and error.violations:
        bad = error_details_pb2.BadRequest()
        for violation in error.violations[: spec.MAX_VIOLATIONS]:
            entry = bad.field_violations.add(field=violation.field[:200], description=violation.description[:400])
            if bad.ByteSize() > 3500:
                bad.field_violations.remove(entry)
                break
        found.append(bad)
    if isinstance(error, errors.NotFound | errors.AlreadyExists):
        found.append(error_details_pb2.ResourceInfo(resource_type=error.kind, resource_name=error.name[:200]))
    if isinstance(error, errors.FailedPrecondition):
        failure = error_details_pb2.PreconditionFailure()
        for obstacle in error.obstacles:
            met = failure.violations.add(
                type=obstacle.kind, subject=obstacle.subject[:200], description=obstacle.description[:_TEXT]
            )
            if failure.ByteSize() > 3500:
                failure.violations.remove(met)
                break
        found.append(failure)
    if isinstance(error, errors.Exhausted):
        quota = error_details_pb2.QuotaFailure()
        quota.violations.add(subject=error.subject, description=error.message[:_TEXT])
        found.append(quota)
    retry = getattr(error, "retry_seconds", 0)
    if retry:
        delay = Duration()
        delay.FromMilliseconds(int(retry * 1000))
        found.append(error_details_pb2.RetryInfo(retry_delay=delay))
    return found


async def abort(context: Context, error: errors.LuthierError) -> NoReturn:
    """Ends a call with an error's status."""
    status = status_of(error)
    trailers = (("grpc-status-details-bin", status.SerializeToString()),)
    await context.abort(code_of(error), status.message, trailers)
    raise AssertionError("abort returns never")


async def _fail(context: Context, error: Exception, method: str) -> NoReturn:
    if isinstance(error, errors.LuthierError):
        log.info("refused", method=method, reason=error.reason, message=error.message[:200])
        await abort(context, error)
    error_id = uuid.uuid4().hex[:12]
    log.exception("bug", method=method, error_id=error_id)
    bug = errors.LuthierError(
        f"an internal error happened; the server's log has it as {error_id}", metadata={"error_id": error_id}
    )
    await abort(context, bug)


def _accept(request: Message | Malformed) -> None:
    if isinstance(request, Malformed):
        raise errors.MalformedRequest("the bytes do not decode as this method's request")
    spec.check(request)


def _unary(call: Callable[[Any], Awaitable[Message]], name: str) -> Callable[[Any, Context], Awaitable[Message]]:
    async def handle(request: Message | Malformed, context: Context) -> Message:
        structlog.contextvars.bind_contextvars(method=name, request_id=getattr(request, "request_id", "") or None)
        await context.send_initial_metadata(VERSION_METADATA)
        try:
            _accept(request)
            return await call(request)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await _fail(context, error, name)

    return handle


def _server_stream(
    call: Callable[[Any, Context], AsyncIterator[Message]], name: str
) -> Callable[[Any, Context], AsyncIterator[Message]]:
    async def handle(request: Message | Malformed, context: Context) -> AsyncIterator[Message]:
        structlog.contextvars.bind_contextvars(method=name)
        await context.send_initial_metadata(VERSION_METADATA)
        try:
            _accept(request)
            async for response in call(request, context):
                yield response
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await _fail(context, error, name)

    return handle


def _writing(call: Callable[[Any, Context], Awaitable[None]], name: str) -> Callable[[Any, Context], Awaitable[None]]:
    async def handle(request: Message | Malformed, context: Context) -> None:
        structlog.contextvars.bind_contextvars(method=name)
        await context.send_initial_metadata(VERSION_METADATA)
        try:
            _accept(request)
            await call(request, context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await _fail(context, error, name)

    return handle


def _client_stream(
    call: Callable[[AsyncIterable[Any]], Awaitable[Message]], name: str
) -> Callable[[AsyncIterable[Any], Context], Awaitable[Message]]:
    async def handle(requests: AsyncIterable[Any], context: Context) -> Message:
        structlog.contextvars.bind_contextvars(method=name)
        await context.send_initial_metadata(VERSION_METADATA)
        try:
            return await call(_decoded(requests))
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await _fail(context, error, name)

    return handle


async def _decoded(requests: AsyncIterable[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        if isinstance(request, Malformed):
            raise errors.MalformedRequest("the bytes do not decode as this method's request")
        yield request


def _deserializer(message: type[M]) -> Callable[[bytes], M | Malformed]:
    def deserialize(data: bytes) -> M | Malformed:
        try:
            return message.FromString(data)
        except DecodeError:
            return Malformed()

    return deserialize


def _serialize(response: Message | bytes) -> bytes:
    return response if isinstance(response, bytes) else response.SerializeToString()


def _handler(method: MethodDescriptor, call: Any, name: str) -> "grpc.RpcMethodHandler[Any, Any]":
    deserializer = _deserializer(message_factory.GetMessageClass(method.input_type))
    if method.client_streaming:
        return grpc.stream_unary_rpc_method_handler(_client_stream(call, name), deserializer, _serialize)
    if method.server_streaming:
        wrap = _writing if getattr(call, "writes", False) else _server_stream
        return grpc.unary_stream_rpc_method_handler(wrap(call, name), deserializer, _serialize)
    return grpc.unary_unary_rpc_method_handler(_unary(call, name), deserializer, _serialize)


def writes(call: F) -> F:
    """Marks a streaming method that writes its responses itself, as bytes."""
    call.writes = True  # type: ignore[attr-defined]
    return call


def service_handler(service: ServiceDescriptor, *implementations: object) -> grpc.GenericRpcHandler:
    """The handler of a whole service: each method of the contract, by name, from the one implementation that has it.
    Raises ValueError when none has, or several."""
    handlers = {}
    for method in service.methods:
        (call,) = (getattr(each, method.name) for each in implementations if hasattr(each, method.name))
        handlers[method.name] = _handler(method, call, method.name)
    return grpc.method_handlers_generic_handler(service.full_name, handlers)
