"""Who may call: everybody with a token, and without one only grpc.health.v1."""

from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import grpc
import structlog

from luthier_server.errors import BadToken, Unauthenticated
from luthier_server.grpc.boundary import Context, abort
from luthier_server.grpc.tokens import Tokens

Q = TypeVar("Q")
R = TypeVar("R")
log = structlog.get_logger()

_OPEN = "/grpc.health.v1.Health/"
_SCHEME = "bearer "


class Authentication(grpc.aio.ServerInterceptor):
    """Lets a call through that brings `authorization: Bearer TOKEN`; ends any other before its first byte is read."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Q, R] | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Q, R] | None":
        """The method's own handler, or one that refuses. A method that does not exist is refused like any other."""
        refusal = self._refusal(handler_call_details)
        if refusal is None:
            return await continuation(handler_call_details)
        return _refusing(refusal, handler_call_details.method)

    def _refusal(self, call: grpc.HandlerCallDetails) -> Unauthenticated | None:
        if call.method.startswith(_OPEN):
            return None
        given = [value for key, value in call.invocation_metadata or () if key == "authorization"]
        if not given:
            return Unauthenticated("this server wants a token, as metadata `authorization: Bearer TOKEN`")
        [header, *further] = given
        if further or not isinstance(header, str) or not header.lower().startswith(_SCHEME):
            return BadToken("one `authorization: Bearer TOKEN` is wanted, and something else came")
        if not self._tokens.opens(header[len(_SCHEME) :].strip()):
            return BadToken("this token is none of this server's")
        return None


def _refusing(error: Unauthenticated, method: str) -> "grpc.RpcMethodHandler[Any, Any]":
    async def refuse(_: AsyncIterable[bytes], context: Context) -> AsyncIterator[bytes]:
        log.info("refused", method=method.rpartition("/")[2][:100], reason=error.reason, peer=context.peer())
        await abort(context, error)
        yield b""  # never reached: what makes this a generator

    # As a stream in both directions, whatever the method is: so no message is waited for, which a caller without a
    # token could hold back for ever.
    return grpc.stream_stream_rpc_method_handler(refuse)
