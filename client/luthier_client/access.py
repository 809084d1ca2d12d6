"""What opens a server: a token, and the certificates that TLS is checked with."""

import os
import re
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import grpc

from luthier_client import endpoint as endpoints

_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]+")
"""The characters of a bearer token (RFC 6750, section 2.1)."""


@dataclass(frozen=True)
class Access:
    """Where a server is and how it is spoken to. Its repr shows no token."""

    target: str
    """HOST:PORT or unix:PATH."""
    tls: bool
    ca: bytes | None = field(default=None, repr=False)
    """PEM of the authorities that may sign the server's certificate; None means the public ones."""
    token: str = field(default="", repr=False)
    """Empty when the server asks for none."""

    @classmethod
    def find(
        cls,
        endpoint: str | None = None,
        *,
        token: str | None = None,
        tls_ca: str | os.PathLike[str] | bytes | None = None,
        tls: bool | None = None,
        insecure: bool = False,
    ) -> Self:
        """Fills what is None from LUTHIER_ENDPOINT, LUTHIER_TOKEN or LUTHIER_TOKEN_FILE, and LUTHIER_TLS_CA.

        TLS is spoken when `tls` says so, the endpoint begins with `https://`, or there is a private authority. Raises
        OSError for a file that cannot be read, and ValueError for what cannot be used: a token that would go over the
        network in clear text (unless `insecure`), a malformed token, a file without certificates.
        """
        target = endpoints.resolve(endpoint)
        by_scheme = endpoints.asks_for_tls(endpoint)
        if tls is False and by_scheme:
            raise ValueError(f"https://{target} asks for TLS, and tls=False forbids it")
        found_ca = tls_ca if tls_ca is not None else os.environ.get("LUTHIER_TLS_CA") or None
        speaks_tls = by_scheme or found_ca is not None if tls is None else tls
        found_token = _checked(token) if token is not None else _token_of_environment()
        if found_token and not (speaks_tls or insecure or endpoints.is_loopback(target)):
            raise ValueError(
                f"refusing to send the token in clear text to {target}: speak TLS (https://{target}, --tls or "
                "tls=True), or pass insecure=True where the network is yours alone"
            )
        ca = _authorities(found_ca) if speaks_tls and found_ca is not None else None
        return cls(target, speaks_tls, ca, found_token)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What each call carries on a channel without TLS; with it, the channel's credentials bring the token."""
        if self.tls or not self.token:
            return ()
        return (("authorization", f"Bearer {self.token}"),)

    def credentials(self) -> grpc.ChannelCredentials | None:
        """The channel's credentials; None for a channel without TLS."""
        if not self.tls:
            return None
        credentials = grpc.ssl_channel_credentials(self.ca)
        if not self.token:
            return credentials
        return grpc.composite_channel_credentials(credentials, grpc.access_token_call_credentials(self.token))


def read_token(path: str | os.PathLike[str]) -> str:
    """The one token of a file; empty lines and lines that begin with `#` do not count.

    Raises OSError, and ValueError for a file with none or several.
    """
    lines = [line.strip() for line in Path(path).read_text().splitlines()]
    tokens = [line for line in lines if line and not line.startswith("#")]
    if len(tokens) != 1:
        raise ValueError(f"{os.fspath(path)} holds {len(tokens)} tokens: a client needs exactly one")
    return _checked(tokens[0])


def _token_of_environment() -> str:
    if token := os.environ.get("LUTHIER_TOKEN"):
        return _checked(token)
    path = os.environ.get("LUTHIER_TOKEN_FILE")
    return read_token(path) if path else ""


def _checked(token: str) -> str:
    token = token.strip()
    if token and not _TOKEN.fullmatch(token):
        raise ValueError("a token has only the characters A-Z a-z 0-9 . _ ~ + / = -, and this one has others")
    return token


def _authorities(source: str | os.PathLike[str] | bytes) -> bytes:
    pem = source if isinstance(source, bytes) else Path(source).read_bytes()
    try:
        # gRPC would take anything and say at the first call that no connection can be made.
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem.decode("ascii", "replace"))
    except (ssl.SSLError, ValueError):
        name = "tls_ca" if isinstance(source, bytes) else os.fspath(source)
        raise ValueError(f"{name} holds no certificate in PEM form") from None
    return pem
