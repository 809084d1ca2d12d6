"""Watchers, all in one process: `python -m benchmarks.load.watchers replay|live ...` prints what they saw as JSON.

Messages stay bytes while the clock runs, so that the client's work is gRPC's alone; equal bodies are parsed once,
afterwards.
"""

import argparse
import asyncio
import contextlib
import json
import resource
import time
from typing import Any

import grpc

from benchmarks.daemon import process_cpu_seconds
from benchmarks.numbers import quantile
from luthier.v1.fine_tuning_pb2 import WatchJobRequest, WatchJobResponse

_WATCH = "/luthier.v1.FineTuning/WatchJob"
_CHANNELS = 8
_SETTLE = 1.0
"""Seconds between the last watcher's first message and the window."""

_DRAIN = 3.0
"""Seconds after the window in which its events may still come."""

Log = list[tuple[float, bytes]]


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


@contextlib.asynccontextmanager
async def _channels(address: str) -> Any:
    """Channels with a connection each: without their own pool they would share one."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    opened = [grpc.aio.insecure_channel(address, options=options) for _ in range(_CHANNELS)]
    await asyncio.gather(*(each.channel_ready() for each in opened))
    yield opened
    await asyncio.gather(*(each.close() for each in opened))


async def _replay(address: str, method: str, request: bytes, watchers: int, times: int) -> dict[str, Any]:
    messages = size = 0

    async def watch(channel: Any) -> None:
        nonlocal messages, size
        call = channel.unary_stream(method)(request)
        async for body in call:
            messages += 1
            size += len(body)
        assert await call.code() == grpc.StatusCode.OK

    async with _channels(address) as channels:
        cpu = _cpu_seconds()
        begin = time.perf_counter()
        for _ in range(times):
            await asyncio.gather(*(watch(channels[number % _CHANNELS]) for number in range(watchers)))
        seconds = time.perf_counter() - begin
        cpu = _cpu_seconds() - cpu
    return {"seconds": seconds, "messages": messages, "bytes": size, "client_cpu_seconds": cpu}


async def _live(address: str, request: bytes, watchers: int, seconds: float, server_pid: int) -> dict[str, Any]:
    logs: list[Log] = [[] for _ in range(watchers)]
    bodies: dict[bytes, bytes] = {}

    async def watch(channel: Any, log: Log) -> None:
        async for body in channel.unary_stream(_WATCH)(request):
            log.append((time.time(), bodies.setdefault(body, body)))

    async with _channels(address) as channels:
        tasks = [asyncio.create_task(watch(channels[number % _CHANNELS], log)) for number, log in enumerate(logs)]
        while not all(logs):
            await asyncio.sleep(0.05)
            assert not any(task.done() for task in tasks), "a watch ended early"
        begin = time.time() + _SETTLE
        await asyncio.sleep(_SETTLE)
        cpu, server_cpu = _cpu_seconds(), process_cpu_seconds(server_pid)
        await asyncio.sleep(seconds)
        cpu, server_cpu = _cpu_seconds() - cpu, process_cpu_seconds(server_pid) - server_cpu
        await asyncio.sleep(_DRAIN)
        assert not any(task.done() for task in tasks), "the job ended too early"
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    shares = {"client_cores": round(cpu / seconds, 2), "server_cores": round(server_cpu / seconds, 2)}
    return _lags(logs, bodies, begin, begin + seconds) | shares


def _lags(logs: list[Log], bodies: dict[bytes, bytes], begin: float, end: float) -> dict[str, Any]:
    """Milliseconds from an event's own time, and from its first receipt by anybody, to each receipt, for the events
    whose own time lies in the window."""
    events = {
        body: [
            (event.sequence, event.event_time.ToNanoseconds() / 1e9)
            for event in WatchJobResponse.FromString(body).events
        ]
        for body in bodies
    }
    first: dict[int, float] = {}
    for log in logs:
        for received, body in log:
            for sequence, made in events[body]:
                if begin <= made < end:
                    first[sequence] = min(first.get(sequence, received), received)
    lags: list[float] = []
    spreads: list[float] = []
    messages = 0
    for log in logs:
        for received, body in log:
            messages += begin <= received < end
            for sequence, made in events[body]:
                if sequence in first:
                    lags.append((received - made) * 1000)
                    spreads.append((received - first[sequence]) * 1000)
    return {
        "events": len(first),
        "events_per_second": round(len(first) / (end - begin), 1),
        "deliveries": len(lags),
        "missing_deliveries": len(first) * len(logs) - len(lags),
        "messages_per_second": round(messages / (end - begin), 1),
        "report_to_receipt_ms": {name: round(quantile(lags, share), 1) for name, share in _SHARES.items()},
        "first_to_receipt_ms": {name: round(quantile(spreads, share), 1) for name, share in _SHARES.items()},
    }


_SHARES = {"p50": 0.5, "p99": 0.99, "most": 1.0}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("replay", "bare", "live"))
    parser.add_argument("address")
    parser.add_argument("--watchers", type=int, required=True)
    parser.add_argument("--job", default="")
    parser.add_argument("--after", type=int, default=0)
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--server-pid", type=int, default=0)
    chosen = parser.parse_args()
    request = WatchJobRequest(job_id=chosen.job, after_sequence=chosen.after).SerializeToString()
    if chosen.kind == "live":
        work = _live(chosen.address, request, chosen.watchers, chosen.seconds, chosen.server_pid)
    elif chosen.kind == "replay":
        work = _replay(chosen.address, _WATCH, request, chosen.watchers, chosen.times)
    else:
        work = _replay(chosen.address, "/bare/Watch", str(chosen.after).encode(), chosen.watchers, chosen.times)
    print(json.dumps(asyncio.run(work)))


if __name__ == "__main__":
    main()
