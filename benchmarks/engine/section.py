"""Luthier's engine and TRL's best, in interleaved rounds over the same rows."""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.aims import Aim, Section
from benchmarks.console import say, step, table
from benchmarks.engine import peer, workload
from benchmarks.engine.contestant import Contestant
from benchmarks.engine.field import CannotRun, Field
from benchmarks.engine.field import field as open_field
from benchmarks.engine.flops import training_flops
from benchmarks.engine.passes import Pass, Products
from benchmarks.numbers import median

FLOAT32 = Contestant("luthier", "float32")
AUTO = Contestant("luthier", "auto")
_AIM = 1.2
_ROWS = 40
_QUIET_CORES = 0.2
"""A pass is quiet when other processes used at most so much of the processor meanwhile."""

_QUIET_ROUNDS = 2
"""Medians are over the quiet rounds, if there are so many; else over all."""

_MOST_ROUNDS = 7


@dataclass
class _Entry:
    """What a contestant did: its passes by round, and how fast a product was just before each."""

    contestant: Contestant
    passes: dict[int, Pass] = field(default_factory=dict)
    products: dict[int, Products] = field(default_factory=dict)
    problem: str = ""


def measure(*, quick: bool, seconds: float) -> Section:
    """Rounds until the next would last beyond `seconds`, at least one and at most seven; default and packing run once,
    to be known, if the first round leaves time."""
    rows = 8 if quick else _ROWS
    sample = workload.sample(rows)
    tokens = sum(each.tokens for each in sample)
    say(f"Engine: 28M Llama, LoRA r{workload.RANK}, {rows} of {workload.CHATS} chats, {tokens} tokens a pass")
    in_float32 = [_Entry(each) for each in (FLOAT32, *peer.FLOAT32)]
    in_auto = [_Entry(each) for each in (AUTO, *peer.BFLOAT16)]
    entries = [*in_float32, *in_auto]
    information = [] if quick else [_Entry(each) for each in peer.FOR_INFORMATION]
    begin = time.perf_counter()
    with (
        tempfile.TemporaryDirectory(prefix="luthier-bench-", ignore_cleanup_errors=True) as work,
        open_field(Path(work)) as runs,
    ):
        for number in range(1, 2 if quick else _MOST_ROUNDS + 1):
            started = time.perf_counter()
            _round(runs, entries, number, rows)
            now = time.perf_counter()
            if number == 1 and now - begin < seconds / 2:
                _round(runs, information, 0, rows)
            elif now - begin + (now - started) > seconds:
                break
    flops = training_flops(sample)
    found = [_numbers(each, flops) for each in (*entries, *information)]
    _print(found)
    against = {
        "float32": _against(in_float32, "float32"),
        "auto": _against([in_auto[0], *in_float32[1:], *in_auto[1:]], "auto"),
    }
    comparisons = [each for each in against.values() if each]
    _print_ratios(comparisons)
    numbers = {
        "work": {
            "rows": rows,
            "tokens": tokens,
            "scored_tokens": sum(each.scored for each in sample),
            "flops_per_token": round(flops / tokens / 1e6, 1) * 1e6,
        },
        "contestants": found,
        "comparisons": comparisons,
    }
    return Section(numbers, tuple(_aim(name, each) for name, each in against.items()))


def _round(runs: Field, entries: Sequence[_Entry], number: int, rows: int) -> None:
    for entry in entries:
        if entry.problem:
            continue
        label = f"round {number}: {entry.contestant.name}" if number else f"for information: {entry.contestant.name}"
        with step(label):
            try:
                entry.products[number] = runs.products("float32" if entry.contestant.dtype == "float32" else "bfloat16")
                entry.passes[number] = done = runs.run(entry.contestant, rows)
                if done.dtype == "float32" and entry.contestant.dtype != "float32":
                    entry.products[number] = runs.products("float32")
            except CannotRun as error:
                entry.problem = str(error)
                say(f"    cannot run: {error}")
                for line in runs.last_words(entry.contestant.engine):
                    say(f"    {line}")
                continue
        say(f"    {done.tokens_per_second:,.0f} tokens/s")


def _numbers(entry: _Entry, flops: float) -> dict[str, Any]:
    result: dict[str, Any] = {"name": entry.contestant.name, **asdict(entry.contestant), "problem": entry.problem}
    if not entry.passes:
        return result | {"rounds": [], "problem": entry.problem or "no time was left"}
    chosen = _counted([entry])
    passes = [entry.passes[number] for number in chosen]
    products = [entry.products[number] for number in chosen]
    gflops = median([each.per_second for each in products])
    pairs = list(zip(passes, products, strict=True))
    return result | {
        "computed_in": passes[0].dtype,
        "tokens_per_second": round(median([each.tokens_per_second for each in passes]), 1),
        "rounds": [round(each.tokens_per_second, 1) for each in entry.passes.values()],
        "cpu_rounds": [round(each.tokens / each.cpu_seconds, 1) for each in entry.passes.values()],
        "other_cores": [round(each.other_cores, 2) for each in entry.passes.values()],
        "quiet": _is_quiet([entry]),
        "best_tokens_per_second": round(max(each.tokens_per_second for each in entry.passes.values()), 1),
        "tokens_per_cpu_second": round(median([each.tokens / each.cpu_seconds for each in passes]), 1),
        "products_gflops": round(gflops, 1),
        "roofline_tokens_per_second": round(gflops * 1e9 / (flops / passes[0].tokens), 1),
        "flops_utilisation": round(median([flops / a.seconds / b.per_second / 1e9 for a, b in pairs]), 3),
        "flops_utilisation_cpu": round(median([flops / a.cpu_seconds / b.per_cpu_second / 1e9 for a, b in pairs]), 3),
        "loss": round(passes[0].loss, 4),
    }


def _against(entries: Sequence[_Entry], name: str) -> dict[str, Any] | None:
    """Luthier, the first entry, against the fastest of the others; None when a side did not run."""
    ours, *others = entries
    rivals = [each for each in others if each.passes]
    if not ours.passes or not rivals:
        return None
    best = max(rivals, key=_strength(rivals))
    both = _counted([ours, best])
    ratios = [ours.passes[n].tokens_per_second / best.passes[n].tokens_per_second for n in both]
    cpu = [
        (best.passes[n].cpu_seconds / best.passes[n].tokens) / (ours.passes[n].cpu_seconds / ours.passes[n].tokens)
        for n in both
    ]
    return {
        "name": name,
        "luthier": ours.contestant.name,
        "peer": best.contestant.name,
        "ratio": round(median(ratios), 2),
        "quiet": _is_quiet([ours, best]),
        "ratio_of_best_passes": round(_fastest(ours) / _fastest(best), 2),
        "ratio_rounds": [round(each, 2) for each in ratios],
        "ratio_cpu_time": round(median(cpu), 2),
    }


def _strength(rivals: Sequence[_Entry]) -> Callable[[_Entry], float]:
    """What the best is best in: the clock when all of them had quiet rounds, else processor time."""
    by_clock = all(_is_quiet([each]) for each in rivals)

    def speed(entry: _Entry) -> float:
        passes = [entry.passes[number] for number in _counted([entry])]
        return median([each.tokens / (each.seconds if by_clock else each.cpu_seconds) for each in passes])

    return speed


def _quiet_rounds(entries: Sequence[_Entry]) -> list[int]:
    """The rounds that all of the entries ran, and ran alone."""
    shared = set.intersection(*(set(each.passes) for each in entries))
    return [n for n in sorted(shared) if all(each.passes[n].other_cores <= _QUIET_CORES for each in entries)]


def _is_quiet(entries: Sequence[_Entry]) -> bool:
    return len(_quiet_rounds(entries)) >= _QUIET_ROUNDS


def _counted(entries: Sequence[_Entry]) -> list[int]:
    """The rounds that count: the quiet ones, or all that the entries share."""
    if _is_quiet(entries):
        return _quiet_rounds(entries)
    return sorted(set.intersection(*(set(each.passes) for each in entries)))


def _fastest(entry: _Entry) -> float:
    return max(each.tokens_per_second for each in entry.passes.values())


def _aim(name: str, comparison: dict[str, Any] | None) -> Aim:
    """A comparison that a side could not run for is an aim missed, not one forgotten."""
    if comparison is None:
        return Aim(f"engine_{name}", f"Luthier, {name}, against TRL: one of them did not run", 0.0, _AIM, "higher")
    text = f"{comparison['luthier']}: tokens/s, times those of {comparison['peer']}"
    if comparison["quiet"]:
        return Aim(f"engine_{name}", text, comparison["ratio"], _AIM, "higher")
    text += " (in CPU time: the machine was never quiet)"
    return Aim(f"engine_{name}", text, comparison["ratio_cpu_time"], _AIM, "higher")


def _print(found: Sequence[dict[str, Any]]) -> None:
    rows = []
    for each in found:
        if not each["rounds"]:
            rows.append((each["name"], "did not run", "", "", "", "", ""))
            continue
        rows.append(
            (
                each["name"],
                f"{each['tokens_per_second']:,.0f}",
                f"{each['tokens_per_cpu_second']:,.0f}",
                f"{each['roofline_tokens_per_second']:,.0f}",
                f"{each['flops_utilisation']:.0%}",
                f"{each['flops_utilisation_cpu']:.0%}",
                _rounds(each),
            )
        )
    say()
    table(("", "tokens/s", "per CPU s", "roofline", "reached", "in CPU time", "rounds"), rows)


def _rounds(numbers: dict[str, Any]) -> str:
    """Tokens a second of each round; a star where other processes took part of the processor."""
    pairs = zip(numbers["rounds"], numbers["other_cores"], strict=True)
    return " ".join(f"{speed:.0f}{'*' if others > _QUIET_CORES else ''}" for speed, others in pairs)


def _print_ratios(comparisons: Sequence[dict[str, Any]]) -> None:
    table(
        ("Luthier against TRL's best", "ratio", "best passes", "in CPU time", "", "rounds"),
        [
            (
                f"{each['luthier']} / {each['peer']}",
                f"{each['ratio']:.2f}",
                f"{each['ratio_of_best_passes']:.2f}",
                f"{each['ratio_cpu_time']:.2f}",
                "quiet" if each["quiet"] else "disturbed",
                " ".join(f"{one:.2f}" for one in each["ratio_rounds"]),
            )
            for each in comparisons
        ],
    )
