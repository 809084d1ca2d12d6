"""The server: how fast it is there, what it weighs, how fast it answers."""

import time
from typing import Any

from benchmarks import child
from benchmarks.aims import Aim, Section
from benchmarks.console import say, step, table
from benchmarks.daemon import daemon, memory_mib, puppet
from benchmarks.numbers import median, quantile

_CONCURRENCY = (1, 16)


def measure(*, quick: bool) -> Section:
    """Start and memory without a trainer host; the calls while one puppet job holds the only slot, so that the
    scheduler starts nothing."""
    say("Server: start, memory, calls")
    starts, memory = _starts(2 if quick else 5)
    with daemon(*puppet(1, 3600)) as server:
        server.upload("rows")
        holding = server.create("rows")
        calls = {
            f"{method}@{concurrency}": _calls(server.address, method, subject, count, concurrency)
            for method, subject, count in (
                ("CreateJob", "rows", 64 if quick else 480),
                ("GetJob", holding.id, 160 if quick else 1600),
            )
            for concurrency in _CONCURRENCY
        }
    table(
        ("", "median", "least", "most"),
        [("exec to SERVING", f"{median(starts):.2f} s", f"{min(starts):.2f}", f"{max(starts):.2f}")],
    )
    table(("idle memory, MiB", "RSS", "PSS", "USS"), [("luthierd", *(f"{memory[each]:.0f}" for each in memory))])
    table(
        ("call@concurrency", "p50", "p99", "calls/s"),
        [
            (name, f"{each['p50_ms']:.1f} ms", f"{each['p99_ms']:.1f} ms", f"{each['calls_per_second']:.0f}")
            for name, each in calls.items()
        ],
    )
    return Section(
        {"start_seconds": starts, "idle_memory_mib": memory, "calls": calls},
        (
            Aim("server_start", "exec to SERVING, median", median(starts), 1.0, "lower", "s"),
            Aim("server_memory", "resident memory when idle (RSS)", memory["rss"], 120.0, "lower", "MiB"),
        ),
    )


def _starts(times: int) -> tuple[list[float], dict[str, float]]:
    seconds: list[float] = []
    memory: dict[str, float] = {}
    for number in range(times):
        with step(f"start {number + 1} of {times}"), daemon("--warm", "off") as server:
            seconds.append(round(server.start_seconds, 3))
            if number == times - 1:
                time.sleep(2)
                memory = {name: round(value, 1) for name, value in memory_mib(server.process.pid).items()}
    return seconds, memory


def _calls(address: str, method: str, subject: str, count: int, concurrency: int) -> dict[str, Any]:
    with step(f"{count} x {method}, {concurrency} at a time"):
        samples = child.run("benchmarks.load.calls", address, method, subject, count, concurrency)
    p50 = quantile(samples, 0.5)
    return {
        "calls": len(samples),
        "p50_ms": round(p50, 2),
        "p99_ms": round(quantile(samples, 0.99), 2),
        "calls_per_second": round(concurrency * 1000 / (sum(samples) / len(samples)), 1),
    }
