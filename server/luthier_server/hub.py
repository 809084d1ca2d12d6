"""Wakes watchers. A notification is a hint: it says how far a job's log is committed, never what stands in it."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


class Topic:
    """A job that somebody watches: its last committed sequence and whether that is the end."""

    def __init__(self) -> None:
        self.head = 0
        self.terminal = False
        self.deleted = False
        self.watchers = 0
        self._changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def announce(self, head: int, terminal: bool) -> None:
        """The log is committed up to `head`."""
        if head <= self.head:
            return
        self.head = head
        self.terminal = self.terminal or terminal
        self.wake()

    def wake(self) -> None:
        """Every waiter looks again."""
        changed, self._changed = self._changed, asyncio.get_running_loop().create_future()
        changed.set_result(None)

    async def wait(self, timeout: float) -> None:
        """Returns at the next change, or after `timeout` seconds."""
        await asyncio.wait([self._changed], timeout=timeout)


class Hub:
    """All topics. A job that nobody watches has none."""

    def __init__(self) -> None:
        self._topics: dict[str, Topic] = {}
        self.draining = False

    @property
    def watchers(self) -> int:
        """Watches that are open."""
        return sum(topic.watchers for topic in self._topics.values())

    @contextmanager
    def attach(self, job_id: str) -> Iterator[Topic]:
        """A topic for as long as the caller watches."""
        topic = self._topics.setdefault(job_id, Topic())
        topic.watchers += 1
        try:
            yield topic
        finally:
            topic.watchers -= 1
            if topic.watchers == 0:
                del self._topics[job_id]

    def announce(self, job_id: str, head: int, terminal: bool) -> None:
        """The job's log is committed up to `head`."""
        if topic := self._topics.get(job_id):
            topic.announce(head, terminal)

    def delete(self, job_id: str) -> None:
        """The job is gone: its watches end."""
        if topic := self._topics.get(job_id):
            topic.deleted = True
            topic.wake()

    def drain(self) -> None:
        """Every watch ends: the server is stopping."""
        self.draining = True
        for topic in self._topics.values():
            topic.wake()
