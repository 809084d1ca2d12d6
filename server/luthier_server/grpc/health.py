"""grpc.health.v1 with bounded writes.

The stock asyncio servicer holds its lock across a write, so one stalled peer would block the change of a status.
"""

import asyncio
from collections.abc import Sequence

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from luthier_server.grpc.boundary import VERSION_METADATA, Context

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
_WRITE_SECONDS = 10


class Health(health_pb2_grpc.HealthServicer):
    """The health of the server (``) and of each service: all alike, SERVING or not."""

    def __init__(self, services: Sequence[str]) -> None:
        self._services = frozenset({"", *services})
        self._serving = False
        self._changed: asyncio.Event = asyncio.Event()

    def set(self, serving: bool) -> None:
        """Says whether new calls are welcome."""
        self._serving = serving
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _status(self, service: str) -> health_pb2.HealthCheckResponse:
        if service not in self._services:
            return health_pb2.HealthCheckResponse(status=_UNKNOWN)
        return health_pb2.HealthCheckResponse(status=_SERVING if self._serving else _NOT_SERVING)

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> health_pb2.HealthCheckResponse:
        """The status now."""
        await context.send_initial_metadata(VERSION_METADATA)
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no service '{request.service[:200]}'")
        return self._status(request.service)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        """The status now and at each change."""
        await context.send_initial_metadata(VERSION_METADATA)
        while True:
            changed = self._changed
            async with asyncio.timeout(_WRITE_SECONDS):
                await context.write(self._status(request.service))
            await changed.wait()
