"""Which hosts may be asked, and which addresses may be connected to.

A URL's host is a name or an address, normalised first: `0x7f.1`, `2130706433` and `::ffff:127.0.0.1` are the addresses
that a connection would go to. A host must be in the allow-list, and every address that it resolves to must be public,
or lie in a network that the operator listed, or be an address that the operator listed by itself. The connection is
made to an address that was judged here: nothing is resolved twice.
"""

import ipaddress
import re
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from luthier_trainer.data.fetching.request import FetchError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolver = Callable[[str, int], Sequence[str]]

PORTS = {"https": 443, "http": 80}

_getaddrinfo = socket.getaddrinfo  # as it is before a fence
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?", re.ASCII)
_NUMBER = re.compile(r"(?:0x[0-9a-f]*|[0-9]+)", re.ASCII)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_6TO4_RELAYS = ipaddress.IPv4Network("192.88.99.0/24")
_PUBLIC_V6 = ipaddress.IPv6Network("2000::/3")


@dataclass(frozen=True, slots=True)
class Origin:
    """Who is asked: `https` or `http`, a normalised host, a port."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}" + ("" if self.port == PORTS[self.scheme] else f":{self.port}")


def origin(url: str) -> Origin:
    """The origin of a URL. Raises FetchError INVALID_URL, or SCHEME_NOT_ALLOWED when it is neither https nor http."""
    if not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        raise _invalid(
            "it has characters that a URL cannot have", "Write them as %XX, and an international name as xn--."
        )
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise _invalid("its host or port cannot be read") from error
    if parts.scheme not in PORTS:
        raise FetchError("SCHEME_NOT_ALLOWED", f"Nothing is fetched by {parts.scheme or 'no scheme'}.", "Use https://.")
    if "@" in parts.netloc:
        raise _invalid("it holds a user or a password", "Keep tokens in the server's secrets, and name one.")
    return Origin(parts.scheme, normalised(parts.hostname or ""), PORTS[parts.scheme] if port is None else port)


def normalised(host: str) -> str:
    """A host in one spelling: a name in lower case, or an address. Raises FetchError INVALID_URL."""
    host = host.lower().removesuffix(".")
    if ":" in host:
        try:
            if "%" in host:
                raise ValueError("a zone")
            return str(_unwrapped(ipaddress.IPv6Address(host)))
        except ValueError as error:
            raise _invalid("its address is not one") from error
    labels = host.split(".")
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise _invalid("its host is not a name", "Write an international name as xn--.")
    if _NUMBER.fullmatch(labels[-1]):
        try:
            # As the system's resolver takes it: one to four numbers, decimal, octal or hexadecimal.
            return str(ipaddress.IPv4Address(socket.inet_aton(host)))
        except OSError as error:
            raise _invalid("its address is not one") from error
    return host


def resolve(host: str, port: int) -> list[str]:
    """All addresses of a host. Raises OSError."""
    found = _getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class Policy:
    """The hosts and networks that the operator allows.

    hosts: `NAME`, `*.NAME` (any name below it), `*` (any), an address; each with `:PORT` when it is not the usual one,
    and `http://` in front when it is spoken to without TLS. networks: where addresses may lie that are not public.
    Raises FetchError NOT_CONFIGURED for what cannot be read.
    """

    def __init__(self, hosts: Iterable[str], networks: Iterable[str], resolver: Resolver = resolve) -> None:
        self._hosts = [_entry(each) for each in hosts]
        self._resolver = resolver
        self._judged: set[tuple[str, int]] = set()
        try:
            self._networks = [ipaddress.ip_network(each, strict=False) for each in networks]
        except ValueError as error:
            raise _unusable(f"import_network: {error}") from error

    def admit(self, wanted: Origin) -> None:
        """Raises FetchError when this origin may not be asked, whatever its addresses."""
        if not any(_matches(entry, wanted) for entry in self._hosts):
            if wanted.scheme == "http" and any(
                each.scheme == "https" and _names(each, wanted.host) for each in self._hosts
            ):
                raise FetchError("SCHEME_NOT_ALLOWED", f"{wanted.host} is asked by https only.", "Use https://.")
            hosts = ", ".join(_written(entry) for entry in self._hosts) or "none"
            port = "" if wanted.port == PORTS[wanted.scheme] else f":{wanted.port}"
            raise FetchError(
                "HOST_NOT_ALLOWED",
                f"This server imports nothing from {wanted.host}{port}.",
                f"Upload the file, or ask the operator to add the host to import_host. Allowed: {hosts}.",
            )

    def knows_port(self, host: str, port: int) -> bool:
        """Whether a host may be asked at a port by any scheme."""
        return any(_matches(entry, Origin(entry.scheme, host, port)) for entry in self._hosts)

    def addresses(self, host: str, port: int) -> list[Address]:
        """The addresses to connect to. Raises FetchError: NOT_FOUND for none, ADDRESS_NOT_ALLOWED if any must not be
        connected to."""
        try:
            found = [_unwrapped(ipaddress.ip_address(each)) for each in self._resolver(host, port)]
        except (OSError, ValueError) as error:
            raise FetchError("NOT_FOUND", f"There is no host {host}.", "Check the name.") from error
        if not found:
            raise FetchError("NOT_FOUND", f"There is no host {host}.", "Check the name.")
        for address in found:
            self._judge(address, host)
        self._judged.update((str(address), port) for address in found)
        return found

    def is_judged(self, address: str, port: int) -> bool:
        """Whether this address was found fit to be connected to, at this port."""
        return (address, port) in self._judged

    def _judge(self, address: Address, host: str) -> None:
        """Raises FetchError ADDRESS_NOT_ALLOWED when this address of a host must not be connected to."""
        listed = str(address) == host and any(entry.host == host for entry in self._hosts)
        if not listed and not self._is_open(address):
            raise FetchError(
                "ADDRESS_NOT_ALLOWED",
                f"{host} leads to {address}, which is not a public address.",
                "If it is meant to be reachable, ask the operator to add its network to import_network.",
            )

    def _is_open(self, address: Address) -> bool:
        if any(address in network for network in self._networks):
            return True
        if isinstance(address, ipaddress.IPv4Address):
            return address.is_global and not (address.is_multicast or address.is_reserved or address in _6TO4_RELAYS)
        if address in _NAT64:
            return self._is_open(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if address.sixtofour is not None and not self._is_open(address.sixtofour):
            return False
        is_isatap = int(address) >> 32 & 0xFDFFFFFF == 0x00005EFE
        if is_isatap and not self._is_open(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)):
            return False
        return address in _PUBLIC_V6 and (address.sixtofour is not None or address.is_global)


def _unwrapped(address: Address) -> Address:
    """The IPv4 address that a mapped IPv6 address stands for: what the system connects to."""
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def _entry(text: str) -> Origin:
    """An entry of the allow-list; its host may be `*` or start with `*.`."""
    url = text.strip() if "://" in text else f"https://{text.strip()}"
    star = "*." if url.partition("://")[2].startswith("*.") else ""
    try:
        if url.partition("://")[2].partition(":")[0] == "*":
            entry = origin(url.replace("*", "any", 1))
            return Origin(entry.scheme, "*", entry.port)
        entry = origin(url.replace("*.", "", 1) if star else url)
    except FetchError as error:
        raise _unusable(f"import_host: {text!r} is not HOST, *.HOST, HOST:PORT or http://HOST:PORT") from error
    if urlsplit(url).path not in ("", "/") or urlsplit(url).query:
        raise _unusable(f"import_host: {text!r} has a path; a host is allowed as a whole")
    return Origin(entry.scheme, star + entry.host, entry.port)


def _written(entry: Origin) -> str:
    return str(entry).removeprefix("https://")


def _matches(entry: Origin, wanted: Origin) -> bool:
    return (entry.scheme, entry.port) == (wanted.scheme, wanted.port) and _names(entry, wanted.host)


def _names(entry: Origin, host: str) -> bool:
    if entry.host.startswith("*."):
        return host.endswith(entry.host[1:]) and not _is_address(host)
    return entry.host in ("*", host)


def _is_address(host: str) -> bool:
    return ":" in host or host.rpartition(".")[2].isdigit()


def _invalid(what: str, hint: str = "") -> FetchError:
    return FetchError("INVALID_URL", f"The URL cannot be used: {what}.", hint)


def _unusable(what: str) -> FetchError:
    return FetchError("NOT_CONFIGURED", f"The server's settings cannot be used ({what}).", "Tell the operator.")
