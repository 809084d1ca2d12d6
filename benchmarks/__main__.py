"""`python -m benchmarks`: measures everything in one run of about ten minutes and writes a result."""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import datasets, latency, machine, server, watch
from benchmarks.aims import Section
from benchmarks.console import say, table
from benchmarks.cuda import section as cuda
from benchmarks.engine import points_section as points
from benchmarks.engine import section as engine

_RESULTS = Path(__file__).parent / "results"
_PARTS = ("server", "latency", "watch", "datasets", "engine")
_APART = ("points", "cuda")
"""What is measured only when it is asked for."""

_LIMIT = 570.0
"""Seconds of a whole run; the engine's rounds, which come last, take what is left."""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--only",
        choices=_PARTS + _APART,
        action="append",
        help="this part; points and cuda are measured only when asked for",
    )
    parser.add_argument("--full", action="store_true", help="datasets of a million rows (1 GB): some minutes more")
    parser.add_argument("--quick", action="store_true", help="a minute or two; numbers are rough and not kept")
    parser.add_argument("--name", help="names the result: DATE-NAME.json (default: processor and cores)")
    parser.add_argument(
        "--out",
        type=Path,
        default=_RESULTS,
        metavar="DIR",
        help="where the result goes; one of some parts alone into its folder parts",
    )
    chosen = parser.parse_args()
    parts: dict[str, Callable[[], Section]] = {
        "server": lambda: server.measure(quick=chosen.quick),
        "latency": lambda: latency.measure(quick=chosen.quick),
        "watch": lambda: watch.measure(quick=chosen.quick),
        "datasets": lambda: datasets.measure(quick=chosen.quick, full=chosen.full),
        "engine": lambda: engine.measure(quick=chosen.quick, seconds=_LIMIT - (time.perf_counter() - begin)),
        "points": lambda: points.measure(quick=chosen.quick),
        "cuda": lambda: cuda.measure(quick=chosen.quick),
    }
    wanted = chosen.only or _PARTS
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
        if name not in wanted:
            continue
        found = measure()
        if not found.numbers:  # it said why
            continue
        result[name] = found.numbers
        aims += [each.to_json() for each in found.aims]
    if not any(name in result for name in parts):
        return
    result |= {"aims": aims, "load_after": machine.load_average(), "seconds": round(time.perf_counter() - begin)}
    _verdict(aims)
    if chosen.quick and chosen.out == _RESULTS:
        say(f"done in {result['seconds']} s; a quick run is not kept")
        return
    path = chosen.out / place(chosen.only, chosen.name or machine.slug(described), started)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    say(f"done in {result['seconds']} s; wrote {path.relative_to(chosen.out)}")


def place(only: Sequence[str] | None, name: str, started: datetime) -> Path:
    """Where a result goes inside the folder of results: whole runs beside each other, single parts into `parts`."""
    if not only:
        return Path(f"{started:%Y-%m-%d}-{name}.json")
    return Path("parts") / f"{started:%Y-%m-%d}-{'-'.join(sorted(set(only)))}-{name}.json"


def _verdict(aims: list[dict[str, Any]]) -> None:
    signs = {"higher": "at least", "lower": "at most"}
    rows = [
        (
            each["text"],
            f"{each['value']:.2f} {each['unit']}".strip(),
            ("wish: " if each["wish"] else "") + f"{signs[each['better']]} {each['aim']:g}",
            "yes" if each["met"] else "no" if each["wish"] else "NO",
        )
        for each in aims
    ]
    table(("aim", "measured", "aimed at", "met"), rows)


if __name__ == "__main__":
    main()
