"""What a fetch says on standard output: length-prefixed `FetchReport` messages."""

import os
import select
import struct
import threading
import time
from collections.abc import Callable

from luthier.trainer.v1 import data_pb2
from luthier_trainer.data.fetching.request import FetchError

INTERVAL_SECONDS = 0.5


class Reports:
    """Writes progress, at most twice a second, and one end. Raises BrokenPipeError when nobody reads."""

    def __init__(self, descriptor: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._descriptor = descriptor
        self._clock = clock
        self._next = clock()

    def progress(self, completed: int, total: int, unit: str) -> None:
        """Says how far the fetch is, when it is time to. total: 0 when unknown; unit: `bytes` or `rows`."""
        now = self._clock()
        if now >= self._next:
            self._next = now + INTERVAL_SECONDS
            progress = data_pb2.FetchProgress(completed=completed, total=total, unit=unit)
            self._write(data_pb2.FetchReport(progress=progress))

    def fetched(self, source: str) -> None:
        """Says that the file is complete."""
        self._write(data_pb2.FetchReport(fetched=data_pb2.Fetched(source=source)))

    def failed(self, error: FetchError) -> None:
        """Says that it cannot be had."""
        failed = data_pb2.FetchFailed(reason=error.reason, message=error.message, hint=error.hint)
        self._write(data_pb2.FetchReport(failed=failed))

    def _write(self, report: data_pb2.FetchReport) -> None:
        body = report.SerializeToString()
        data = memoryview(struct.pack("<I", len(body)) + body)
        while data:
            data = data[os.write(self._descriptor, data) :]


def leave_with_the_reader(descriptor: int) -> None:
    """Ends this process as soon as nobody can read the pipe or socket any more: a server that died wants no file."""

    def watch() -> None:
        poll = select.poll()
        poll.register(descriptor, 0)  # errors and hang-ups alone, which need not be asked for
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll()):
            os._exit(1)

    threading.Thread(target=watch, name="reader", daemon=True).start()
