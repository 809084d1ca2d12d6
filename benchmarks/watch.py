"""Watching: how many events a second reach many watchers, and how late an event is.

The peer of the replay is a bare grpc.aio stream server in the same rounds: from memory, one message an event, the same
bytes. Client and servers share the processor, so the numbers are those of both together.
"""

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import child
from benchmarks.aims import Aim, Section
from benchmarks.console import say, step, table
from benchmarks.daemon import Daemon, daemon, process_cpu_seconds, puppet, until
from benchmarks.load.bare import write_events
from benchmarks.numbers import median
from luthier.v1 import fine_tuning_pb2 as ft

_STEPS = 5000
_ENDLESS = 1_000_000
_LIVE_WATCHERS = 1000
_LIVE_STEP_SECONDS = 0.0093  # with what a report takes, about 100 a second
_LIVE_AIM_MS = 250.0


@dataclass(frozen=True)
class Size:
    """How many watchers read how many events each, and how many times over, so that it takes long enough."""

    watchers: int
    events: int
    times: int = 1

    @property
    def deliveries(self) -> int:
        """Events that arrive somewhere."""
        return self.watchers * self.events * self.times


def measure(*, quick: bool) -> Section:
    """Replays of a finished job to 1, 100 and 1,000 watchers, then a running job live to 1,000."""
    say("Watching")
    sizes = (Size(1, 2000), Size(20, 200)) if quick else (Size(1, 5000, 5), Size(100, 600), Size(1000, 600))
    replay = _replays(sizes, 1 if quick else 3, 2000 if quick else _STEPS)
    live = _live(50 if quick else _LIVE_WATCHERS, 2 if quick else 8)
    table(
        ("replay, watchers x events", "Luthier, events/s", "bare stream", "ratio", "server CPU us/event", "bare"),
        [
            (
                f"{each['watchers']} x {each['events']}",
                f"{each['luthier']['events_per_second']:,.0f}",
                f"{each['bare']['events_per_second']:,.0f}",
                f"{each['ratio']:.1f}",
                f"{each['luthier']['server_cpu_us_per_event']:.1f}",
                f"{each['bare']['server_cpu_us_per_event']:.1f}",
            )
            for each in replay
        ],
    )
    lag, spread = live["report_to_receipt_ms"], live["first_to_receipt_ms"]
    table(
        (f"live, {live['watchers']} watchers, {live['events_per_second']:.0f} events/s", "p50", "p99", "most"),
        [
            ("report (before commit) to receipt", *(f"{lag[each]:.0f} ms" for each in lag)),
            ("first receipt to receipt", *(f"{spread[each]:.0f} ms" for each in spread)),
        ],
    )
    say(
        f"  {live['messages_per_second']:,.0f} messages/s; the server used {live['server_cores']:.2f} cores, "
        f"the watchers {live['client_cores']:.2f}; {live['missing_deliveries']} deliveries missing\n"
    )
    aims = [
        Aim(
            f"watch_replay_{each['watchers']}",
            f"events/s to {each['watchers']} watchers, times a bare stream's",
            each["ratio"],
            1.0,
            "higher",
        )
        for each in replay
    ]
    aims.append(
        Aim(
            "watch_live_p99",
            f"report to receipt, p99, {live['watchers']} watchers and {live['events_per_second']:.0f} events/s",
            lag["p99"],
            _LIVE_AIM_MS,
            "lower",
            "ms",
        )
    )
    return Section({"replay": replay, "live": live}, tuple(aims))


def _replays(sizes: tuple[Size, ...], rounds: int, steps: int) -> list[dict[str, Any]]:
    with daemon(*puppet(steps, 0)) as server:
        server.upload("rows")
        with step(f"a job of {steps} steps"):
            job = server.wait(server.create("rows", max_steps=steps).id)
        payloads = [
            event.SerializeToString()
            for response in server.fine_tuning.WatchJob(ft.WatchJobRequest(job_id=job.id), timeout=60)
            for event in response.events
        ]
        assert len(payloads) == job.last_sequence
        with _bare(payloads) as (port, process):
            return [_replay(server, job.id, payloads, port, process, size, rounds) for size in sizes]


def _replay(
    server: Daemon,
    job_id: str,
    payloads: list[bytes],
    port: int,
    bare: "subprocess.Popen[str]",
    size: Size,
    rounds: int,
) -> dict[str, Any]:
    after = len(payloads) - size.events
    samples: dict[str, list[dict[str, float]]] = {"luthier": [], "bare": []}
    least = sum(map(len, payloads[after:])) * size.watchers * size.times
    for number in range(rounds):
        with step(f"replay to {size.watchers} watchers, round {number + 1} of {rounds}"):
            for name, kind, address, pid in (
                ("luthier", "replay", server.address, server.process.pid),
                ("bare", "bare", f"127.0.0.1:{port}", bare.pid),
            ):
                cpu = process_cpu_seconds(pid)
                seen = child.run(
                    "benchmarks.load.watchers",
                    *(kind, address, "--watchers", size.watchers, "--job", job_id),
                    *("--after", after, "--times", size.times),
                )
                if seen["bytes"] < least:
                    raise RuntimeError(f"{name}: {seen['bytes']} bytes came, and the events alone have {least}")
                samples[name].append(seen | {"server_cpu_seconds": process_cpu_seconds(pid) - cpu})
    found = {name: _summary(each, size) for name, each in samples.items()}
    ratio = found["luthier"]["events_per_second"] / found["bare"]["events_per_second"]
    return {"watchers": size.watchers, "events": size.events, "times": size.times, **found, "ratio": round(ratio, 2)}


def _summary(samples: list[dict[str, float]], size: Size) -> dict[str, Any]:
    events = size.deliveries
    return {
        "events_per_second": round(events / median([each["seconds"] for each in samples])),
        "rounds": [round(events / each["seconds"]) for each in samples],
        "messages": int(samples[0]["messages"]),
        "server_cpu_us_per_event": round(median([each["server_cpu_seconds"] for each in samples]) / events * 1e6, 2),
        "client_cpu_us_per_event": round(median([each["client_cpu_seconds"] for each in samples]) / events * 1e6, 2),
    }


@contextlib.contextmanager
def _bare(payloads: list[bytes]) -> "Iterator[tuple[int, subprocess.Popen[str]]]":
    with tempfile.TemporaryDirectory(prefix="luthier-bench-") as folder:
        path = Path(folder) / "events"
        write_events(path, payloads)
        command = [sys.executable, "-m", "benchmarks.load.bare", str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                yield int(process.stdout.readline()), process
            finally:
                process.kill()


def _live(watchers: int, seconds: float) -> dict[str, Any]:
    """A puppet reports 100 steps a second. An event's own time is when the trainer made it, before its commit, so what
    is measured holds the spool, the wake-up and the commit too: an upper bound of commit to receipt."""
    with daemon(*puppet(_ENDLESS, _LIVE_STEP_SECONDS)) as server:
        server.upload("rows")
        job = server.create("rows", max_steps=_ENDLESS)
        until(lambda: server.get(job.id).progress.step > 0, 60, "a first step")
        after = server.get(job.id).last_sequence
        with step(f"{watchers} watchers of a job that makes 100 steps a second"):
            seen: dict[str, Any] = child.run(
                "benchmarks.load.watchers",
                *("live", server.address, "--watchers", watchers, "--job", job.id),
                *("--after", after, "--seconds", seconds, "--server-pid", server.process.pid),
            )
        server.fine_tuning.CancelJob(ft.CancelJobRequest(job_id=job.id))
    return seen | {"watchers": watchers}
