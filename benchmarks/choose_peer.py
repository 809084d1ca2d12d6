"""Finds TRL's best settings: `python -m benchmarks.choose_peer`, about half an hour on two cores.

In float32 all of {default, group_by_length, packing} x batch {1, 2, 4, 8} x checkpointing {off, on}, each a whole pass
over the same rows. In TRL's three ways to bfloat16 those that can win: no checkpointing, which buys memory with time
in any dtype, and no large batches of padded rows or of packed ones under a dense mask.

The best of each dtype then run in interleaved rounds. Processor time decides, which other work on the machine disturbs
least; where it leaves two within a few percent, pin both. Writes results/peer-search.json after every pass and goes on
from it with --go-on; what it names is pinned by hand in engine/peer.py.
"""

import argparse
import json
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.console import say, step, table
from benchmarks.engine.contestant import Contestant, Strategy
from benchmarks.engine.field import CannotRun, Field, field
from benchmarks.numbers import median

RESULT = Path(__file__).parent / "results" / "peer-search.json"
_DTYPES = ("float32", "autocast", "bfloat16", "bfloat16-autocast")
_ALL: dict[Strategy, tuple[int, ...]] = {
    "default": (1, 2, 4, 8),
    "group_by_length": (1, 2, 4, 8),
    "packing": (1, 2, 4, 8),
}
_LIKELY: dict[Strategy, tuple[int, ...]] = {"default": (1, 2), "group_by_length": (1, 2, 4, 8), "packing": (1, 2)}
_FIELDS = ("engine", "dtype", "strategy", "batch", "checkpointing")


def candidates() -> list[Contestant]:
    """Everything that is tried."""
    everything = [
        Contestant("trl", "float32", strategy, batch, checkpointing)
        for checkpointing in (False, True)
        for strategy, batches in _ALL.items()
        for batch in batches
    ]
    return everything + [
        Contestant("trl", dtype, strategy, batch)
        for dtype in _DTYPES[1:]
        for strategy, batches in _LIKELY.items()
        for batch in batches
    ]


class Search:
    """The search so far: for each contestant its passes as (tokens a second, tokens a CPU second)."""

    def __init__(self) -> None:
        self.first: dict[Contestant, list[tuple[float, float]]] = {}
        self.final: dict[Contestant, list[tuple[float, float]]] = {}
        self._started = datetime.now(UTC).isoformat(timespec="seconds")
        self._load = machine.load_average()

    def go_on(self) -> None:
        """Takes up the first round of an earlier start."""
        for entry in json.loads(RESULT.read_text())["first_round"]:
            contestant = Contestant(**{name: entry[name] for name in _FIELDS})
            self.first[contestant] = [tuple(each) for each in entry["passes"]]

    def run(self, runs: Field, into: dict[Contestant, list[tuple[float, float]]], each: Contestant, rows: int) -> None:
        """One pass, told and written."""
        try:
            done = runs.run(each, rows)
        except CannotRun as error:
            say(f"    cannot run: {error}")
            return
        one = (round(done.tokens_per_second, 1), round(done.tokens / done.cpu_seconds, 1))
        say(f"    {one[0]:.0f} tokens/s, {one[1]:.0f} a CPU second")
        into.setdefault(each, []).append(one)
        self._write()

    def finalists(self, count: int) -> list[Contestant]:
        """The best of each dtype by processor time."""
        found: list[Contestant] = []
        for dtype in _DTYPES:
            ranked = sorted(
                (each for each in self.first if each.dtype == dtype), key=lambda each: -self.first[each][0][1]
            )
            found += ranked[:count]
        return found

    def ranking(self) -> list[tuple[Contestant, float, float]]:
        """The finalists by dtype, the best first, with their median tokens a second and a CPU second."""
        medians = [
            (each, median([one[0] for one in passes]), median([one[1] for one in passes]))
            for each, passes in self.final.items()
        ]
        return sorted(medians, key=lambda entry: (_DTYPES.index(entry[0].dtype), -entry[2]))

    def _write(self) -> None:
        def entries(of: dict[Contestant, list[tuple[float, float]]]) -> list[dict[str, Any]]:
            return [asdict(each) | {"passes": passes} for each, passes in of.items()]

        result = {
            "date": self._started,
            "machine": machine.describe(),
            "load_before": self._load,
            "load_after": machine.load_average(),
            "passes": ["tokens a second", "tokens a CPU second"],
            "first_round": entries(self.first),
            "final": entries(self.final),
        }
        RESULT.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.choose_peer", description=__doc__)
    parser.add_argument("--rows", type=int, default=24, help="rows of a pass in the first round")
    parser.add_argument("--final-rows", type=int, default=40, help="rows of a pass in the final rounds")
    parser.add_argument("--finalists", type=int, default=2, help="settings of each dtype that reach the final")
    parser.add_argument("--rounds", type=int, default=3, help="final rounds")
    parser.add_argument("--go-on", action="store_true", help="keep the first round that the result file has")
    chosen = parser.parse_args()
    search = Search()
    if chosen.go_on:
        search.go_on()
    todo = [each for each in candidates() if each not in search.first]
    with tempfile.TemporaryDirectory(prefix="luthier-peer-") as work, field(Path(work)) as runs:
        for number, each in enumerate(todo, 1):
            with step(f"{number}/{len(todo)} {each.name}"):
                search.run(runs, search.first, each, chosen.rows)
        for number in range(chosen.rounds):
            for each in search.finalists(chosen.finalists):
                with step(f"final round {number + 1}: {each.name}"):
                    search.run(runs, search.final, each, chosen.final_rows)
    rows = [(each.name, f"{speed:.0f}", f"{by_cpu:.0f}") for each, speed, by_cpu in search.ranking()]
    table(("TRL", "tokens/s", "a CPU second"), rows)


if __name__ == "__main__":
    main()
