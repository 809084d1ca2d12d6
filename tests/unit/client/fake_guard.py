"""How the fake service refuses: statuses with details, and a guard at the door."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2


def status(code: grpc.StatusCode, message: str, *details: Any) -> tuple[grpc.StatusCode, str, tuple[Any, ...]]:
    packed = []
    for detail in details:
        each = AnyMessage()
        each.Pack(detail)
        packed.append(each)
    whole = status_pb2.Status(code=code.value[0], message=message, details=packed)
    return code, message, (("grpc-status-details-bin", whole.SerializeToString()),)


def info(reason: str, **metadata: str) -> Any:
    return error_details_pb2.ErrorInfo(reason=reason, domain="luthier", metadata=metadata)


class Guard(grpc.aio.ServerInterceptor):
    """Notes and refuses the calls that do not bring the token."""

    def __init__(self, note: Callable[..., None], token: str) -> None:
        self._note = note
        self._expected = [f"Bearer {token}"]

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        method = handler_call_details.method.rpartition("/")[2]
        given = [value for key, value in handler_call_details.invocation_metadata if key == "authorization"]
        self._note(method="Guard", called=method, admitted=given == self._expected)
        if given == self._expected or method == "Check":
            return await continuation(handler_call_details)

        async def refuse(_: Any, context: Any) -> AsyncIterator[bytes]:
            reason = "BAD_TOKEN" if given else "UNAUTHENTICATED"
            await context.abort(*status(grpc.StatusCode.UNAUTHENTICATED, "a token is wanted", info(reason)))
            yield b""

        return grpc.stream_stream_rpc_method_handler(refuse)
