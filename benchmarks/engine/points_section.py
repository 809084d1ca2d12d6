"""The table of what each point of the engine brings: passes with and without it, interleaved in one process."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import latency
from benchmarks.aims import Section
from benchmarks.console import say, step, table
from benchmarks.engine import workload
from benchmarks.engine.contestant import Contestant
from benchmarks.engine.field import CannotRun, Field
from benchmarks.engine.field import field as open_field
from benchmarks.engine.passes import Pass
from benchmarks.engine.points import POINTS, Point
from benchmarks.engine.standings import QUIET_CORES
from benchmarks.numbers import median

_WITH = Contestant("luthier", "auto")
_ROWS, _ROUNDS = 16, 5
_WARM_START = "warm-start"


def measure(*, quick: bool, keys: Sequence[str] = (), rows: int = 0, rounds: int = 0) -> Section:
    """All points, or those of `keys`, `rows` rows a pass (0: 16) in `rounds` pairs (0: 5). No aims: what one brings is
    told, not promised."""
    rows, rounds = rows or (4 if quick else _ROWS), rounds or (1 if quick else _ROUNDS)
    sample = workload.sample(rows)
    tokens = sum(each.tokens for each in sample)
    say(f"What each point brings: {rows} chats, {tokens} tokens a pass, {rounds} interleaved pairs in one process")
    found: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory(prefix="luthier-bench-", ignore_cleanup_errors=True) as work,
        open_field(Path(work), together=True) as runs,
    ):
        found += [_measured(runs, each, rows, rounds) for each in POINTS if _is_wanted(each, keys)]
    show(found)
    numbers: dict[str, Any] = {
        "work": {"rows": rows, "tokens": tokens, "scored_tokens": sum(each.scored for each in sample)},
        "points": found,
    }
    if not keys or _WARM_START in keys:
        numbers["warm_start"] = _warm_start(rounds)
    return Section(numbers)


def _is_wanted(point: Point, keys: Sequence[str]) -> bool:
    return point.key in keys if keys else not point.asked_for


def _measured(runs: Field, point: Point, rows: int, rounds: int) -> dict[str, Any]:
    described = {"number": point.number, "key": point.key, "engine": point.engine, "instead": point.instead}
    if problem := point.unavailable():
        return described | {"problem": problem}
    without = replace(_WITH, without=point.key)
    pairs: list[tuple[Pass, Pass]] = []
    try:
        for number in range(rounds):
            with step(f"{point.number}. {point.key}, pair {number + 1} of {rounds}"):
                if number % 2:  # who goes first changes, so that a machine that slows down favours nobody
                    off = runs.run(without, rows)
                    pairs.append((runs.run(_WITH, rows), off))
                else:
                    pairs.append((runs.run(_WITH, rows), runs.run(without, rows)))
    except CannotRun as error:
        say(f"    cannot run: {error}")
        return described | {"problem": str(error)}
    return described | compared(pairs)


def compared(pairs: Sequence[tuple[Pass, Pass]]) -> dict[str, Any]:
    """A point's numbers from its pairs of a pass with it and one without; ratios above 1 speak for the point."""
    ratios = [off.seconds / on.seconds for on, off in pairs]
    cpu = [off.cpu_seconds / on.cpu_seconds for on, off in pairs]
    return {
        "problem": "",
        "tokens_per_second": [round(median([each[side].tokens_per_second for each in pairs]), 1) for side in (0, 1)],
        "ratio": round(median(ratios), 2),
        "ratio_rounds": [round(each, 2) for each in ratios],
        "ratio_cpu_time": round(median(cpu), 2),
        "quiet": all(each.other_cores <= QUIET_CORES for pair in pairs for each in pair),
        "peak_mib": [_peak_mib([each[side] for each in pairs]) for side in (0, 1)],
        "computed_in": pairs[0][0].dtype,
        "loss": [round(each.loss, 4) for each in pairs[0]],
    }


def _peak_mib(passes: Sequence[Pass]) -> float | None:
    """The median of the passes' peaks; None when they are not known."""
    known = [each.peak_bytes for each in passes if each.peak_bytes > 0]
    return round(median(known) / 2**20, 1) if known else None


def _warm_start(rounds: int) -> dict[str, Any]:
    """CreateJob to the first step, from a warm trainer host and from nothing, in turn."""
    say("5. Warm start: CreateJob to the first step, builtin/tiny")
    warm, cold = latency.interleaved(rounds)
    ratio = round(median(cold) / median(warm), 1)
    rows = [("forked from the warm host", f"{median(warm):.2f} s", ""), ("cold", f"{median(cold):.2f} s", f"{ratio}")]
    table(("", "median", "ratio"), rows)
    return {"warm_seconds": warm, "cold_seconds": cold, "ratio": ratio}


def show(found: Sequence[dict[str, Any]]) -> None:
    """The table."""
    rows = []
    for each in found:
        name = f"{each['number']}. {each['engine']} / {each['instead']}"
        if each["problem"]:
            rows.append((name, each["problem"][:40], "", "", "", ""))
            continue
        memory = " / ".join("?" if one is None else f"{one:,.0f}" for one in each["peak_mib"])
        speeds = " / ".join(f"{one:,.0f}" for one in each["tokens_per_second"])
        rows.append(
            (
                name,
                speeds,
                f"{each['ratio']:.2f}",
                f"{each['ratio_cpu_time']:.2f}" + ("" if each["quiet"] else "*"),
                memory,
                " ".join(f"{one:.2f}" for one in each["ratio_rounds"]),
            )
        )
    say()
    table(("engine / instead", "tokens/s", "ratio", "in CPU time", "peak MiB", "pairs"), rows)


def main() -> None:
    """`python -m benchmarks.engine.points_section KEY ...`: some of the points; nothing is written."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine.points_section", description=main.__doc__)
    parser.add_argument("keys", nargs="*", choices=[*(each.key for each in POINTS), _WARM_START], metavar="KEY")
    parser.add_argument("--rows", type=int, default=_ROWS, help="chats of a pass")
    parser.add_argument("--rounds", type=int, default=_ROUNDS, help="interleaved pairs")
    chosen = parser.parse_args()
    measure(quick=False, keys=chosen.keys, rows=chosen.rows, rounds=chosen.rounds)


if __name__ == "__main__":
    main()
