"""Hub and pages: hints may be lost or doubled, the log decides; one read serves every watcher at a cursor."""

import asyncio
from typing import Any

from luthier.v1.event_pb2 import JobEvent, LogEmitted
from luthier.v1.fine_tuning_pb2 import WatchJobResponse
from luthier_server.hub import Hub
from luthier_server.pages import Pages
from luthier_server.store.events import Events


class SlowLog(Events):
    """A log in memory whose reads take a moment and are counted."""

    def __init__(self, sizes: list[int]) -> None:
        self.payloads = [
            JobEvent(job_id="j", sequence=n, log_emitted=LogEmitted(message="x" * size)).SerializeToString()
            for n, size in enumerate(sizes, start=1)
        ]
        self.reads = 0

    async def after(self, job_id: str, cursor: int, limit: int) -> list[bytes]:
        self.reads += 1
        await asyncio.sleep(0.01)
        return self.payloads[cursor : cursor + limit]


def parsed(body: bytes) -> WatchJobResponse:
    return WatchJobResponse.FromString(body)


async def test_watchers_at_one_cursor_share_one_read() -> None:
    log = SlowLog([10] * 100)
    pages = Pages(log, "history")
    found = await asyncio.gather(*(pages.after("j", 0, 100) for _ in range(1000)))
    assert log.reads == 1
    assert all(page is found[0] for page in found)
    response = parsed(found[0].body)
    assert [event.sequence for event in response.events] == list(range(1, 101))
    assert (response.cursor, response.history_id) == (100, "history")


async def test_a_page_that_became_too_short_is_read_again() -> None:
    log = SlowLog([10] * 5)
    pages = Pages(log, "history")
    assert (await pages.after("j", 0, 5)).end == 5
    log.payloads += SlowLog([10] * 8).payloads[5:]
    assert (await pages.after("j", 0, 8)).end == 8


async def test_a_page_is_bounded_in_bytes_and_an_event_above_the_bound_travels_alone() -> None:
    log = SlowLog([200_000, 200_000, 200_000, 900_000, 10])
    pages = Pages(log, "history")
    cursor, ends = 0, []
    while cursor < 5:
        page = await pages.after("j", cursor, 5)
        assert parsed(page.body).cursor == page.end
        cursor = page.end
        ends.append(cursor)
    assert ends == [2, 3, 4, 5]


async def test_a_watcher_whose_peer_is_cancelled_still_gets_its_page() -> None:
    log = SlowLog([10] * 5)
    pages = Pages(log, "history")
    first = asyncio.create_task(pages.after("j", 0, 5))
    second = asyncio.create_task(pages.after("j", 0, 5))
    await asyncio.sleep(0.001)
    first.cancel()
    assert (await second).end == 5


async def test_an_old_hint_wakes_nobody_and_a_topic_lives_as_long_as_its_watchers() -> None:
    hub = Hub()
    hub.announce("j", 5, False)
    with hub.attach("j") as topic:
        topic.announce(5, False)

        async def waits() -> float:
            started = asyncio.get_running_loop().time()
            await topic.wait(0.2)
            return asyncio.get_running_loop().time() - started

        waiting = asyncio.create_task(waits())
        await asyncio.sleep(0)
        hub.announce("j", 4, False)
        assert await waiting >= 0.19
        waiting = asyncio.create_task(waits())
        await asyncio.sleep(0)
        hub.announce("j", 6, True)
        assert await waiting < 0.19
        assert (topic.head, topic.terminal, hub.watchers) == (6, True, 1)
    leftovers: Any = hub._topics
    assert (hub.watchers, leftovers) == (0, {})
