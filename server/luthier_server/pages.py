"""Pages of a job's log as response bytes: read once, serialised once, shared by every watcher at the same cursor.

The cache may be dropped at any time; the store stands behind it. Replay and live are one path.
"""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass

from luthier.v1.fine_tuning_pb2 import WatchJobResponse
from luthier_server.store.events import Events

_EVENTS = 1000
_BYTES = 512 * 1024
_CACHED = 256


@dataclass(frozen=True, slots=True)
class Page:
    """Consecutive events after a cursor. `body` is a WatchJobResponse; `end` is the last sequence in it."""

    body: bytes
    end: int
    full: bool


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _response(payloads: list[bytes], end: int, history_id: str) -> bytes:
    # Field 1, length-delimited: the stored bytes are JobEvents, so nothing is parsed to be sent.
    events = b"".join(b"\x0a" + _varint(len(each)) + each for each in payloads)
    return events + WatchJobResponse(cursor=end, history_id=history_id).SerializeToString()


class Pages:
    """Reads pages, each at most once at a time."""

    def __init__(self, events: Events, history_id: str) -> None:
        self._events = events
        self.history_id = history_id
        self._cache: OrderedDict[tuple[str, int], Page] = OrderedDict()
        self._reading: dict[tuple[str, int], asyncio.Task[Page]] = {}

    async def after(self, job_id: str, cursor: int, head: int) -> Page:
        """The page after `cursor`; `head` is the last sequence known to be committed, and above `cursor`."""
        key = (job_id, cursor)
        page = self._cache.get(key)
        if page is not None and (page.full or page.end >= head):
            self._cache.move_to_end(key)
            return page
        reading = self._reading.get(key)
        if reading is None:
            reading = asyncio.create_task(self._read(key), name="page")
            self._reading[key] = reading
            reading.add_done_callback(lambda _: self._reading.pop(key, None))
        return await asyncio.shield(reading)

    async def _read(self, key: tuple[str, int]) -> Page:
        job_id, cursor = key
        rows = await self._events.after(job_id, cursor, _EVENTS)
        payloads: list[bytes] = []
        size = 0
        for payload in rows:
            if payloads and size + len(payload) > _BYTES:
                break
            payloads.append(payload)
            size += len(payload)
        end = cursor + len(payloads)
        full = len(payloads) == _EVENTS or len(payloads) < len(rows)
        page = Page(_response(payloads, end, self.history_id), end, full)
        self._cache[key] = page
        self._cache.move_to_end(key)
        while len(self._cache) > _CACHED:
            self._cache.popitem(last=False)
        return page
