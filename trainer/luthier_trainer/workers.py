"""Threads that each compute on their own: for work in independent parts whose single operations are too small to be
shared well.

An operation that torch spreads over its threads ends when the slowest of them ends, so a chain of short operations
waits at every one of them, the more so on a busy machine. Parts that share nothing need to wait once.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import TypeVar

import torch

Part = TypeVar("Part")


def each_alone(work: Callable[[Iterable[Part]], None], parts: list[Part]) -> None:
    """Calls `work` in as many threads as torch computes with, each with an iterator that takes the next of the `parts`
    that no thread took yet; returns when all are done. In those threads torch computes with one thread and without
    gradients. Raises what the first `work` that failed raised."""
    threads = min(torch.get_num_threads(), len(parts))
    if threads <= 1:
        with torch.no_grad():
            work(parts)
        return
    left = iter(parts)  # a list's iterator hands an item to one thread alone
    running = [_pool(torch.get_num_threads()).submit(torch.no_grad()(work), left) for _ in range(threads)]
    failures = [failure for each in running if (failure := each.exception()) is not None]
    if failures:
        raise failures[0]


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    ready = Barrier(threads + 1)

    def compute_alone() -> None:
        torch.get_num_threads()  # takes torch's default for this thread, which would else undo the next line later
        torch.set_num_threads(1)
        ready.wait()

    pool = ThreadPoolExecutor(threads, "luthier-compute", initializer=compute_alone)
    for _ in range(threads):
        pool.submit(int)
    ready.wait()
    torch.set_num_threads(threads)  # the default that threads to come take, which the workers changed
    return pool


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads
