"""Holds the connections of libraries to the same rules as our own.

`datasets` and `huggingface_hub` open connections of their own, to addresses that a repository or a server may name. In
the process of a fetch nothing is resolved but allowed hosts, and nothing is connected to but addresses that were
judged. Python's audit hooks see every connection that Python makes; what compiled code may do by itself is turned off
(`hub` disables Xet).
"""

import socket
import sys
from typing import Any

from luthier_trainer.data.fetching.address import Policy, normalised
from luthier_trainer.data.fetching.request import FetchError

_getaddrinfo = socket.getaddrinfo


class Fence:
    """A fence around this process, for the rest of its life. refusal: the first thing that was refused, which a library
    may have turned into an error of its own."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.refusal: FetchError | None = None

    def close(self) -> None:
        """From here on the rules hold."""
        socket.getaddrinfo = self._resolve
        sys.addaudithook(self._audit)

    def _resolve(self, host: Any, port: Any, *arguments: Any, **options: Any) -> list[Any]:
        """In place of socket.getaddrinfo: the judged addresses of an allowed host."""
        try:
            name, number = normalised(host.decode() if isinstance(host, bytes) else str(host)), int(port or 0)
            if not self._policy.knows_port(name, number):
                message = f"The dataset leads to {name}:{number}, which this server imports nothing from."
                hint = "If it is meant to be reachable, ask the operator to add the host to import_host."
                raise FetchError("HOST_NOT_ALLOWED", message, hint)
            addresses = [str(address) for address in self._policy.addresses(name, number)]
        except FetchError as error:
            if error.reason == "NOT_FOUND":
                raise socket.gaierror(socket.EAI_NONAME, error.message) from error
            self.refusal = self.refusal or error
            raise
        return [found for address in addresses for found in _getaddrinfo(address, number, *arguments, **options)]

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("socket.connect", "socket.sendto", "socket.sendmsg"):
            return
        address = arguments[1]
        if event != "socket.connect" and address is None:
            return
        if not isinstance(address, tuple) or not self._policy.is_judged(address[0], address[1]):
            message = "The dataset leads to an address that was not asked for by name."
            error = FetchError("ADDRESS_NOT_ALLOWED", message, "Import its files by URL instead.")
            self.refusal = self.refusal or error
            raise error
