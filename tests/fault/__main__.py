"""`python -m fault`: the long run, which can be interrupted and goes on; its report; or one run of one row.

python -m fault N [--results FILE] [--parallel P]     N server kills and the other rows in proportion
python -m fault --report [--results FILE]             the summed table
python -m fault --row ROW --seed S --count C [--real] one run, a line of JSON on standard output
"""

import argparse
import asyncio
import contextlib
import json
import math
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fault.faults_server import known_bad
from fault.table import TABLE

_RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "fault-runs.jsonl"
_RUN_SECONDS = 600


@dataclass(frozen=True, slots=True)
class Task:
    """One run that is still to be made."""

    row: str
    seed: int
    count: int
    real: bool


def tasks(kills: int, done: set[tuple[str, int]]) -> Iterator[Task]:
    """The runs for so many server kills, the rows mixed, without those (row, seed) that are done."""
    runs = {name: max(1, math.ceil(kills * plan.per_kill / plan.batch)) for name, plan in TABLE.items()}
    places = sorted(((seed + 0.5) / total, name, seed) for name, total in runs.items() for seed in range(total))
    for _, name, seed in places:
        plan = TABLE[name]
        if (name, seed) not in done:
            real = plan.real_every > 0 and seed % plan.real_every == min(1, runs[name] - 1)
            yield Task(name, seed, plan.batch, real)


async def one(task: Task) -> dict[str, Any]:
    """Makes a run in a process of its own, with a folder of its own."""
    with tempfile.TemporaryFile() as errors:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "fault", "--row", task.row, "--seed", str(task.seed), "--count", str(task.count)),
            *(["--real"] if task.real else []),
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            start_new_session=True,  # an interrupt at the keyboard is for us, and we end it in order
        )
        try:
            output, _ = await asyncio.wait_for(process.communicate(), _RUN_SECONDS)
            result: dict[str, Any] = json.loads(output.splitlines()[-1])
        except (TimeoutError, IndexError, ValueError) as error:
            errors.seek(0)
            words = f"the run broke: {error!r}: {errors.read()[-1500:].decode(errors='replace')}"
            result = {"row": task.row, "seed": task.seed, "real": task.real, "faults": 0, "events": 0, "seconds": 0}
            result |= {"violations": [words], "notes": {}}
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
                await process.wait()
    return result


async def collect(kills: int, results: Path, parallel: int) -> int:
    """Makes the runs that are missing and appends a line for each; returns how many violated something."""
    done = {(line["row"], line["seed"]) for line in _lines(results)}
    waiting = tasks(kills, done)
    bad = 0

    async def work() -> None:
        nonlocal bad
        for task in waiting:
            result = await one(task)
            bad += bool(result["violations"])
            _append(results, json.dumps(result))
            words = f"{len(result['violations'])} VIOLATIONS" if result["violations"] else "sound"
            sys.stdout.write(
                f"{task.row} {task.seed}{' real' if task.real else ''}: {result['faults']} faults,"
                f" {result['events']} events, {result['seconds']} s, {words}\n"
            )
            sys.stdout.flush()

    results.parent.mkdir(parents=True, exist_ok=True)
    async with asyncio.TaskGroup() as group:
        for _ in range(parallel):
            group.create_task(work())
    return bad


def _append(results: Path, line: str) -> None:
    with open(results, "a") as file:
        file.write(line + "\n")


def _lines(results: Path) -> list[dict[str, Any]]:
    if not results.exists():
        return []
    return [json.loads(line) for line in results.read_text().splitlines()]


def report(results: Path) -> str:
    """The table of all that was collected. Nothing lost in n faults bounds the chance of a loss at 3/n with 95 %."""
    lines = _lines(results)
    rows = [
        f"{'fault':<22}{'runs':>6}{'real':>6}{'faults':>9}{'events checked':>16}{'violations':>12}{'bound 95 %':>12}"
    ]
    total: Counter[str] = Counter()
    for name in [*TABLE, "total"]:
        of_row = [line for line in lines if name in (line["row"], "total")]
        count = {key: sum(line[key] for line in of_row) for key in ("faults", "events", "real")}
        wrong = sum(len(line["violations"]) for line in of_row)
        bound = f"{3 / count['faults']:.2g}" if count["faults"] and not wrong else "-"
        rows.append(
            f"{name:<22}{len(of_row):>6}{count['real']:>6}{count['faults']:>9}{count['events']:>16}{wrong:>12}{bound:>12}"
        )
        for line in of_row if name == "total" else ():
            total.update(line["notes"])
    rows.append("of these: " + ", ".join(f"{name} {number}" for name, number in sorted(total.items())))
    rows += [f"VIOLATION {line['row']} {line['seed']}: {text[:400]}" for line in lines for text in line["violations"]]
    return "\n".join(rows)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m fault", description=__doc__)
    parser.add_argument("kills", type=int, nargs="?", default=500)
    parser.add_argument("--results", type=Path, default=_RESULTS)
    parser.add_argument("--parallel", type=int, default=6)
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--row", choices=[*TABLE, "known-bad"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--real", action="store_true")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a run that is ended ends its servers and trainers
    if options.row:
        row = known_bad if options.row == "known-bad" else TABLE[options.row].row
        result = asyncio.run(row(options.seed, options.count, options.real))
        sys.stdout.write(json.dumps(result.as_json()) + "\n")
        return bool(result.violations)
    bad = 0
    try:
        bad = 0 if options.report else asyncio.run(collect(options.kills, options.results, options.parallel))
    except KeyboardInterrupt:
        sys.stdout.write("interrupted: start it again and it goes on\n")
    sys.stdout.write(report(options.results) + "\n")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
