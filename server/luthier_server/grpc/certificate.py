"""The server's certificate, from files that are read again when they change: the next handshake has the new one."""

import ssl
from pathlib import Path

import grpc
import structlog

from luthier_server.grpc.changes import stamp

log = structlog.get_logger()


class CertificateError(Exception):
    """A certificate and key that cannot be used; the message says why."""


class Certificate:
    """A certificate chain and its key. A new pair that cannot be used is logged, and the one before it stays.

    Two files are never replaced at the same moment, so a pair that does not fit together is looked at again as soon as
    one of them changes. Raises CertificateError when there is nothing to start with.
    """

    def __init__(self, chain: Path, key: Path) -> None:
        self._paths = (chain, key)
        self._stamp = stamp(self._paths)
        self._pair = _load(chain, key)

    def credentials(self) -> grpc.ServerCredentials:
        """Credentials that ask for the newest pair at each handshake."""
        # None means "as before" to gRPC, which its stubs do not say.
        return grpc.dynamic_ssl_server_credentials(_configuration(*self._pair), self._newer)  # type: ignore[arg-type]

    def _newer(self) -> grpc.ServerCertificateConfiguration | None:
        """The pair when it has changed, else None. Called in a thread of gRPC's."""
        now = stamp(self._paths)
        if now == self._stamp:
            return None
        self._stamp = now
        try:
            pair = _load(*self._paths)
        except CertificateError as error:
            log.error("the certificate was changed and cannot be used: the one before it stays", error=str(error))
            return None
        if pair == self._pair:
            return None
        self._pair = pair
        log.info("certificate read again", file=str(self._paths[0]))
        return _configuration(*pair)


def _configuration(chain: bytes, key: bytes) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(key, chain)])


def _load(chain: Path, key: Path) -> tuple[bytes, bytes]:
    """The bytes of both files, once they are known to fit together: gRPC would take any and refuse each handshake."""
    before = stamp((chain, key))
    for path in (chain, key):
        try:
            path.open("rb").close()
        except OSError as error:
            raise CertificateError(f"{path} cannot be read: {error.strerror}") from None
    try:
        # The password is asked for only when there is one; without this, OpenSSL would ask at the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(chain, key, password=lambda: b"")
        pair = chain.read_bytes(), key.read_bytes()
    except (OSError, ssl.SSLError, ValueError) as error:
        why = getattr(error, "reason", None) or error.__class__.__name__
        raise CertificateError(
            f"{chain} and {key} are not a certificate and its key without a password: {why}"
        ) from None
    if stamp((chain, key)) != before:
        raise CertificateError(f"{chain} or {key} is being replaced")
    return pair
