"""`python -m benchmarks`: measures everything in one run of at most ten minutes and writes a result."""

import argparse
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import datasets, latency, machine, server, watch
from benchmarks.aims import Section
from benchmarks.console import say, table
from benchmarks.engine import section as engine

_RESULTS = Path(__file__).parent / "results"
_PARTS = ("server", "latency", "watch", "datasets", "engine")
_LIMIT = 570.0
"""Seconds of a whole run; the engine's rounds, which come last, take what is left."""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", choices=_PARTS, action="append", help="this part")
    parser.add_argument("--full", action="store_true", help="datasets of a million rows (1 GB): some minutes more")
    parser.add_argument("--quick", action="store_true", help="a minute or two; numbers are rough and not kept")
    parser.add_argument("--name", help="names the result: DATE-NAME.json (default: processor and cores)")
    parser.add_argument("--out", type=Path, default=_RESULTS, metavar="DIR", help="where the result goes")
    chosen = parser.parse_args()
    parts: dict[str, Callable[[], Section]] = {
        "server": lambda: server.measure(quick=chosen.quick),
        "latency": lambda: latency.measure(quick=chosen.quick),
        "watch": lambda: watch.measure(quick=chosen.quick),
        "datasets": lambda: datasets.measure(quick=chosen.quick, full=chosen.full),
        "engine": lambda: engine.measure(quick=chosen.quick, seconds=_LIMIT - (time.perf_counter() - begin)),
    }
    started, begin = datetime.now(UTC), time.perf_counter()
    described = machine.describe()
    load = machine.load_average()
    say(f"{described['cpu']}, {described['cores']} cores, {described['memory_gib']} GiB; load average {load[0]}\n")
    result: dict[str, Any] = {
        "format": 1,
        "date": started.isoformat(timespec="seconds"),
        "quick": chosen.quick,
        "machine": described,
        "load_before": load,
    }
    aims: list[dict[str, Any]] = []
    for name, measure in parts.items():
        if chosen.only and name not in chosen.only:
            continue
        found = measure()
        result[name] = found.numbers
        aims += [each.to_json() for each in found.aims]
    result |= {"aims": aims, "load_after": machine.load_average(), "seconds": round(time.perf_counter() - begin)}
    _verdict(aims)
    if chosen.quick and chosen.out == _RESULTS:
        say(f"done in {result['seconds']} s; a quick run is not kept")
        return
    name = chosen.name or machine.slug(described)
    path = chosen.out / f"{started:%Y-%m-%d}-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    say(f"done in {result['seconds']} s; wrote {path.parent.name}/{path.name}")


def _verdict(aims: list[dict[str, Any]]) -> None:
    signs = {"higher": "at least", "lower": "at most"}
    rows = [
        (
            each["text"],
            f"{each['value']:.2f} {each['unit']}".strip(),
            f"{signs[each['better']]} {each['aim']:g}",
            "yes" if each["met"] else "NO",
        )
        for each in aims
    ]
    table(("aim", "measured", "aimed at", "met"), rows)


if __name__ == "__main__":
    main()
