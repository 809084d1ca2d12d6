"""`python -m fault.stalled ADDRESS JOB COUNT`: watchers whose process stands still until somebody continues it.

It prints a line when every stream has brought its first message, and stops itself (SIGSTOP). Once continued it reads
all logs to their end, resuming where it must, and prints how many streams the server had let go (ABORTED), how many
ended otherwise before the end, and the SHA-256 of each distinct log that was seen, with its number of events.
"""

import asyncio
import hashlib
import json
import os
import signal
import sys
from collections import Counter
from typing import Any

import grpc
import grpc.aio

from luthier.v1 import fine_tuning_pb2 as ft
from luthier.v1 import fine_tuning_pb2_grpc

_STREAMS = 25


class _Watch:
    """One watcher: its stream, what it saw, and how its streams ended."""

    def __init__(self, stub: Any, job_id: str, ends: Counter[str]) -> None:
        self._stub = stub
        self._job_id = job_id
        self._ends = ends
        self._seen = 0
        self._digest = hashlib.sha256()
        self._call = self._open()

    def _open(self) -> Any:
        return self._stub.WatchJob(ft.WatchJobRequest(job_id=self._job_id, after_sequence=self._seen))

    def _take(self, response: ft.WatchJobResponse) -> None:
        for event in response.events:
            assert event.sequence == self._seen + 1, f"{event.sequence} after {self._seen}"
            self._seen = event.sequence
            self._digest.update(event.SerializeToString(deterministic=True))

    async def begin(self) -> None:
        """Returns with the first message."""
        self._take(await self._call.read())

    async def rest(self) -> tuple[str, int]:
        """Reads to the end; returns the digest and the number of events."""
        while True:
            try:
                while (response := await self._call.read()) is not grpc.aio.EOF:
                    self._take(response)
                return self._digest.hexdigest(), self._seen
            except grpc.aio.AioRpcError as error:
                self._ends[error.code().name] += 1
                await asyncio.sleep(0.05)
            self._call = self._open()


async def _main(address: str, job_id: str, count: int) -> None:
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
    channels = [grpc.aio.insecure_channel(address, options=options) for _ in range(-(-count // _STREAMS))]
    stubs: list[Any] = [fine_tuning_pb2_grpc.FineTuningStub(channel) for channel in channels]
    ends: Counter[str] = Counter()
    watches = [_Watch(stubs[number % len(stubs)], job_id, ends) for number in range(count)]
    await asyncio.gather(*(watch.begin() for watch in watches))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGSTOP)
    logs = Counter(await asyncio.gather(*(watch.rest() for watch in watches)))
    aborted = ends.pop("ABORTED", 0)
    answer = {"aborted": aborted, "other": ends, "logs": [[*log, number] for log, number in logs.items()]}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
