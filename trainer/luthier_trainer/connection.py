"""A client's connection to the trainer host: requests in, answers out, in order, without blocking."""

import contextlib
import socket
import struct

from google.protobuf.message import DecodeError

from luthier.trainer.v1 import host_pb2

MAX_REQUEST = 1024 * 1024
_LENGTH = struct.Struct("<I")


class Garbage(Exception):
    """The client does not speak the protocol."""


class Connection:
    """Frames over a stream socket: a length (u32, little endian), then a HostRequest or a HostResponse."""

    def __init__(self, accepted: socket.socket) -> None:
        accepted.setblocking(False)
        self.socket = accepted
        self._inbox = bytearray()
        self._outbox = bytearray()

    @property
    def has_answers(self) -> bool:
        """Whether there are answers that the socket did not take yet."""
        return bool(self._outbox)

    def receive(self) -> bool:
        """Takes what came; False when the client is gone. Raises Garbage when it sends without waiting for answers."""
        try:
            received = self.socket.recv(65536)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._inbox += received
        if len(self._inbox) > 2 * MAX_REQUEST:
            raise Garbage("too many requests at once")
        return bool(received)

    def next_request(self, *, starts: bool) -> host_pb2.HostRequest | None:
        """The next whole request, or None. Without `starts` a StartTrainer stays where it is, and all behind it.

        Raises Garbage.
        """
        if len(self._inbox) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._inbox)
        if not 0 < length <= MAX_REQUEST:
            raise Garbage(f"a request of {length} bytes")
        end = _LENGTH.size + length
        if len(self._inbox) < end:
            return None
        try:
            request = host_pb2.HostRequest.FromString(bytes(self._inbox[_LENGTH.size : end]))
        except DecodeError:
            raise Garbage("no request") from None
        if request.WhichOneof("request") is None:
            raise Garbage("an empty request")
        if request.HasField("start") and not starts:
            return None
        del self._inbox[:end]
        return request

    def answer(self, response: host_pb2.HostResponse) -> None:
        """Queues an answer. Raises Garbage when the client reads none."""
        payload = response.SerializeToString()
        self._outbox += _LENGTH.pack(len(payload)) + payload
        if len(self._outbox) > MAX_REQUEST:
            raise Garbage("the client reads no answers")

    def flush(self) -> None:
        """Sends what the socket takes now. Raises OSError when the client is gone."""
        with contextlib.suppress(BlockingIOError):
            while self._outbox:
                del self._outbox[: self.socket.send(self._outbox)]

    def close(self) -> None:
        self.socket.close()
