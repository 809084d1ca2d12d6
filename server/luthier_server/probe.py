"""`luthierd health`: asks the server of these settings how it is."""

import socket
import ssl
import sys
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from luthier_server.settings import Settings

_SECONDS = 3


def health(settings: Settings) -> int:
    """Prints what the server says; 0 when it serves, 1 otherwise."""
    address = settings.listen
    try:
        with _channel(settings) as channel:
            check = channel.unary_unary(
                "/grpc.health.v1.Health/Check",
                request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
                response_deserializer=health_pb2.HealthCheckResponse.FromString,
            )
            answer = check(health_pb2.HealthCheckRequest(), timeout=_SECONDS)
    except grpc.RpcError as error:
        sys.stderr.write(f"{address}: {error.code().name}\n")
        return 1
    except ssl.SSLError as error:
        sys.stderr.write(f"{address}: TLS failed: {getattr(error, 'verify_message', '') or error.reason}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"{address}: {error.strerror or error}\n")
        return 1
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    sys.stdout.write(f"{address}: {status}\n")
    return 0 if answer.status == health_pb2.HealthCheckResponse.SERVING else 1


def _channel(settings: Settings) -> grpc.Channel:
    """A channel to the server's own address, which no certificate has to name: it is given another name to expect.

    Without --tls-ca the certificate that the server shows is its own authority. That authenticates nothing, and nothing
    secret is sent: an address that this machine listens on is asked whether it is alive. The file of --tls-cert would
    be no better, because a server keeps the certificate it has when that file is replaced by one it cannot use.
    """
    if settings.tls_cert is None:
        return grpc.insecure_channel(settings.listen)
    if settings.tls_ca is not None:
        roots = settings.tls_ca.read_text()
    else:
        with _handshake(settings.listen, None) as shown:
            roots = ssl.DER_cert_to_PEM_cert(shown.getpeercert(binary_form=True) or b"")
    with _handshake(settings.listen, roots) as shown:
        name = _name(shown.getpeercert() or {})
    credentials = grpc.ssl_channel_credentials(roots.encode())
    return grpc.secure_channel(settings.listen, credentials, options=[("grpc.ssl_target_name_override", name)])


def _handshake(address: str, roots: str | None) -> ssl.SSLSocket:
    """A TLS connection; the certificate is checked against `roots`, if there are any. Raises OSError and SSLError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.set_alpn_protocols(["h2"])
    if roots is None:
        context.verify_mode = ssl.CERT_NONE
    else:
        context.load_verify_locations(cadata=roots)
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # a certificate that no other signed, or not here
    if address.startswith("unix:"):
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(_SECONDS)
        connection.connect(address.removeprefix("unix:").removeprefix("//"))
    else:
        host, _, port = address.rpartition(":")
        connection = socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS)
    try:
        return context.wrap_socket(connection)
    except BaseException:
        connection.close()
        raise


def _name(certificate: Any) -> str:
    """A name that the certificate is for: gRPC wants one, and any will do. Raises OSError where there is none."""
    names = [value for _, value in certificate.get("subjectAltName", ())]
    if not names:
        raise OSError("the certificate names no host (subjectAltName)")
    return str(names[0]).replace("*.", "any.", 1)
