"""The gRPC server: its options, its services, its start and its end."""

import asyncio
from collections.abc import Mapping, Sequence

import grpc
import structlog
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from luthier_server.grpc.auth import Authentication
from luthier_server.grpc.boundary import service_handler
from luthier_server.grpc.certificate import Certificate
from luthier_server.grpc.health import Health
from luthier_server.grpc.tokens import Tokens

log = structlog.get_logger()

_OPTIONS = (
    ("grpc.so_reuseport", 0),  # otherwise a second server on the same port binds without a word
    ("grpc.max_receive_message_length", 4 * 1024 * 1024),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 20_000),
    ("grpc.server_handshake_timeout_ms", 10_000),
    # Bursts wait; with gRPC's own limits some calls of a few thousand at once are cancelled at random.
    ("grpc.server.max_pending_requests", 20_000),
    ("grpc.server.max_pending_requests_hard_limit", 40_000),
)


class AddressError(Exception):
    """The address cannot be listened on."""


class GrpcServer:
    """Listens, serves, and stops in order.

    tokens: what callers need, health apart; None lets everybody in. certificate: what TLS is spoken with, if it is.
    """

    def __init__(
        self,
        services: Mapping[ServiceDescriptor, Sequence[object]],
        *,
        tokens: Tokens | None = None,
        certificate: Certificate | None = None,
    ) -> None:
        names = [service.full_name for service in services]
        self._certificate = certificate
        interceptors = [Authentication(tokens)] if tokens is not None else []
        self._server = grpc.aio.server(options=_OPTIONS, interceptors=interceptors)
        self.health = Health(names)
        self._server.add_generic_rpc_handlers(
            tuple(service_handler(service, *implementations) for service, implementations in services.items())
        )
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        reflection.enable_server_reflection([*names, "grpc.health.v1.Health", reflection.SERVICE_NAME], self._server)

    async def start(self, address: str) -> int:
        """Listens; returns the port. Raises AddressError."""
        try:
            port = (
                self._server.add_insecure_port(address)
                if self._certificate is None
                else self._server.add_secure_port(address, self._certificate.credentials())
            )
        except RuntimeError as error:
            raise AddressError(f"cannot listen on {address}: is another server using it?") from error
        await self._server.start()
        self.health.set(True)
        return port

    async def stop(self, grace: float) -> None:
        """Lets calls end for `grace` seconds, then ends them."""
        await self._server.stop(grace)
        # Give cancelled handlers a turn before the loop goes away.
        await asyncio.sleep(0)
