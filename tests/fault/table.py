"""The rows of the table: which fault, how many in CI, how many for N server kills, and how many in one run."""

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from fault import faults_server, faults_store, faults_trainer, faults_watch
from fault.scenario import Result

Row = Callable[[int, int, bool], Coroutine[Any, Any, Result]]
"""(seed, how many faults, whether with the real trainer) -> what came out."""


@dataclass(frozen=True, slots=True)
class Plan:
    """`ci`: one run each, as (seed, faults, with the real trainer); `per_kill`: faults for each server kill of a long
    run, `batch` in one run, of which every `real_every`-th (0: none) has the real trainer."""

    row: Row
    ci: tuple[tuple[int, int, bool], ...]
    per_kill: float
    batch: int
    real_every: int = 0


TABLE: dict[str, Plan] = {
    "server-kill": Plan(faults_server.kills, ((0, 8, False), (1, 2, True)), 1, 10, real_every=5),
    "trainer-death": Plan(faults_trainer.deaths, ((0, 5, False),), 0.4, 10, real_every=5),
    # Nine points in each run: they exit, sleep, raise.
    "failpoint": Plan(faults_server.failpoints, ((0, 9, False), (1, 9, False), (2, 9, False)), 0.9, 27, real_every=5),
    "database-call": Plan(faults_store.database_calls, ((0, 8, False),), 0.3, 25),
    "database-call-often": Plan(faults_store.database_calls_often, ((0, 10, False),), 0.3, 12),
    "disk-full": Plan(faults_store.disk_full, ((0, 2, False),), 1 / 15, 4, real_every=4),
    "database-locked": Plan(faults_store.locked, ((0, 2, False),), 1 / 15, 3),
    "corruption": Plan(faults_store.corruption, ((0, 5, False),), 1 / 6, 20),
    "clock": Plan(faults_store.clock_jumps, ((0, 5, False),), 1 / 30, 5),
    "stalled-watchers": Plan(faults_watch.stalled, ((0, 1, False),), 1 / 150, 1),
    "malformed": Plan(faults_watch.malformed, ((0, 1000, False),), 40, 5000),
    "many-watchers": Plan(faults_watch.many, ((0, 1000, False),), 2, 1000),
}
