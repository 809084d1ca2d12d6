"""The client that a command works with, as the global options ask for it."""

import os
from typing import TYPE_CHECKING

from luthier_client.cli.lazy import Settings

if TYPE_CHECKING:
    from luthier_client.client import Client


def connect(chosen: Settings, *, timeout: float = 30.0) -> "Client":
    """A client of the server that was chosen. Raises ValueError and OSError for options that cannot be used."""
    # gRPC writes failed handshakes on stderr itself; the error that they end in says it in words. Set before it loads.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from luthier_client.access import read_token
    from luthier_client.client import Client

    token = read_token(chosen.token_file) if chosen.token_file else None
    return Client(
        chosen.endpoint, timeout=timeout, token=token, tls_ca=chosen.tls_ca or None, tls=True if chosen.tls else None
    )
