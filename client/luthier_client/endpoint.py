"""Where the server is, and how a channel to it is set up."""

import ipaddress
import os

DEFAULT = "127.0.0.1:50051"
_PORT = 50051
_TLS = "https://"
_MIB = 1024 * 1024


def resolve(endpoint: str | None) -> str:
    """The endpoint as gRPC wants it: the argument, else LUTHIER_ENDPOINT, else the default.

    `https://` before it only asks for TLS. A host without a port gets port 50051. Raises ValueError for any other URL
    or an impossible port.
    """
    text = _given(endpoint)
    if asks_for_tls(text):
        text = text[len(_TLS) :].removesuffix("/")
    if text.startswith("unix:"):
        return text
    if "/" in text:
        raise ValueError(f"an endpoint is HOST:PORT or unix:PATH, not {text!r}")
    if text.startswith("["):
        host, _, port = text[1:].partition("]")
        host, port = f"[{host}]", port.removeprefix(":")
    elif text.count(":") > 1:
        host, port = f"[{text}]", ""
    else:
        host, _, port = text.partition(":")
    if not host:
        raise ValueError(f"an endpoint is HOST:PORT or unix:PATH, not {text!r}")
    if port and not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ValueError(f"{port!r} is not a port (in the endpoint {text!r})")
    return f"{host}:{port or _PORT}"


def asks_for_tls(endpoint: str | None) -> bool:
    """Whether the endpoint, found as by `resolve`, begins with `https://`."""
    return _given(endpoint).lower().startswith(_TLS)


def is_loopback(endpoint: str) -> bool:
    """Whether the endpoint is on this machine."""
    if endpoint.startswith("unix:"):
        return True
    host = endpoint.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def unreachable(endpoint: str, details: str, *, tls: bool = False) -> str:
    """What to tell a person when nobody answers."""
    if not tls and details.endswith("Socket closed"):
        return (
            f"the server at {endpoint} closed the connection before it said a word: "
            f"if it speaks TLS, name it as https://{endpoint}"
        )
    if is_loopback(endpoint):
        return (
            f"no server answers at {endpoint}: start one with `luthierd` (or `make serve`), "
            "or name another with LUTHIER_ENDPOINT or --endpoint"
        )
    cause = details.rpartition("last error: ")[2]
    return f"no server answers at {endpoint} ({cause}): is luthierd running there, and is the port reachable?"


def channel_options(endpoint: str) -> list[tuple[str, int]]:
    """gRPC's options: keepalive finds a dead peer in 40 s, and reconnecting is left to this library's own back-off."""
    options = [
        # Fifty previewed rows of two sequences, each with 8,192 tokens and its text.
        ("grpc.max_receive_message_length", 64 * _MIB),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        # gRPC waits up to two minutes between its own attempts to connect; a watch wants to be back sooner.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 1_000),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        # Each client has connections of its own, so a closed one takes its sockets with it.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if is_loopback(endpoint):
        options.append(("grpc.enable_http_proxy", 0))
    return options


def _given(endpoint: str | None) -> str:
    return (endpoint or os.environ.get("LUTHIER_ENDPOINT") or DEFAULT).strip()
