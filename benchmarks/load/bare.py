"""The least a stream server in grpc.aio can do: every event one message, from memory.

`python -m benchmarks.load.bare EVENTS_FILE` serves `/bare/Watch` on loopback and prints its port. The request is the
number of events to skip in decimal; the file holds payloads, each after its length in 4 bytes.
"""

import asyncio
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc


def write_events(path: Path, payloads: Sequence[bytes]) -> None:
    """The file that the server reads."""
    path.write_bytes(b"".join(struct.pack("<I", len(each)) + each for each in payloads))


def read_events(path: Path) -> list[bytes]:
    """What `write_events` wrote."""
    content, payloads, at = path.read_bytes(), [], 0
    while at < len(content):
        (length,) = struct.unpack_from("<I", content, at)
        payloads.append(content[at + 4 : at + 4 + length])
        at += 4 + length
    return payloads


async def _serve(payloads: list[bytes]) -> None:
    async def watch(request: bytes, context: Any) -> None:
        for payload in payloads[int(request) :]:
            await context.write(payload)

    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    handler: Any = grpc.unary_stream_rpc_method_handler(watch)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", {"Watch": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_serve(read_events(Path(sys.argv[1]))))
