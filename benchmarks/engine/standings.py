"""How the contestants of a run stand: what each reached, who goes on after the first round, and Luthier against the
best."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.engine.contestant import Contestant
from benchmarks.engine.passes import Pass, Products
from benchmarks.numbers import median

QUIET_CORES = 0.2
"""A pass is quiet when other processes used at most so much of the processor meanwhile."""

_QUIET_ROUNDS = 2
"""Medians are over the quiet rounds, if there are so many; else over all."""

_WITHIN = 0.1
"""Who is slower than the best by more than this share after the first round does not go on."""


@dataclass
class Entry:
    """What a contestant did: its passes by round, and how fast a product was just before each."""

    contestant: Contestant
    passes: dict[int, Pass] = field(default_factory=dict)
    products: dict[int, Products] = field(default_factory=dict)
    problem: str = ""


def going_on(rivals: Sequence[Entry], most: int) -> list[Entry]:
    """The best of the rivals by processor time, which other work disturbs least: at most `most`, within 10 % of the
    first."""

    def speed(entry: Entry) -> float:
        return median([each.tokens / each.cpu_seconds for each in entry.passes.values()])

    ranked = sorted((each for each in rivals if each.passes and not each.problem), key=speed, reverse=True)
    return [each for each in ranked[:most] if speed(each) >= (1 - _WITHIN) * speed(ranked[0])]


def numbers(entry: Entry, flops: float) -> dict[str, Any]:
    """What a contestant reached, for the result; `flops`: operations of a pass."""
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
        "quiet": is_quiet([entry]),
        "best_tokens_per_second": round(max(each.tokens_per_second for each in entry.passes.values()), 1),
        "tokens_per_cpu_second": round(median([each.tokens / each.cpu_seconds for each in passes]), 1),
        "products_gflops": round(gflops, 1),
        "roofline_tokens_per_second": round(gflops * 1e9 / (flops / passes[0].tokens), 1),
        "flops_utilisation": round(median([flops / a.seconds / b.per_second / 1e9 for a, b in pairs]), 3),
        "flops_utilisation_cpu": round(median([flops / a.cpu_seconds / b.per_cpu_second / 1e9 for a, b in pairs]), 3),
        "peak_mib": _peak_mib(entry),
        "loss": round(passes[0].loss, 4),
    }


def _peak_mib(entry: Entry) -> float | None:
    """Of the first pass, whose process had done nothing else but a short warm-up; None when it is not known."""
    first = entry.passes[min(entry.passes)].peak_bytes
    return round(first / 2**20, 1) if first else None


def against(ours: Entry, others: Sequence[Entry], name: str) -> dict[str, Any] | None:
    """Luthier against the fastest of those of the others that ran in as many rounds as any; None when a side did not
    run."""
    rounds = max((len(each.passes) for each in others), default=0)
    rivals = [each for each in others if each.passes and len(each.passes) == rounds]
    if not ours.passes or not rivals:
        return None
    best = max(rivals, key=_strength(rivals))
    both = _counted([ours, best])
    ratios = [ours.passes[n].tokens_per_second / best.passes[n].tokens_per_second for n in both]
    cpu = [
        (best.passes[n].cpu_seconds / best.passes[n].tokens) / (ours.passes[n].cpu_seconds / ours.passes[n].tokens)
        for n in both
    ]
    memory = _peak_mib(ours), _peak_mib(best)
    return {
        "name": name,
        "luthier": ours.contestant.name,
        "peer": best.contestant.name,
        "ratio": round(median(ratios), 2),
        "quiet": is_quiet([ours, best]),
        "ratio_of_best_passes": round(_fastest(ours) / _fastest(best), 2),
        "ratio_rounds": [round(each, 2) for each in ratios],
        "ratio_cpu_time": round(median(cpu), 2),
        "peak_mib": list(memory),
        "ratio_memory": round(memory[0] / memory[1], 2) if memory[0] and memory[1] else None,
    }


def is_quiet(entries: Sequence[Entry]) -> bool:
    """Whether enough rounds of all of the entries had the machine to themselves."""
    return len(_quiet_rounds(entries)) >= _QUIET_ROUNDS


def _strength(rivals: Sequence[Entry]) -> Callable[[Entry], float]:
    """What the best is best in: the clock when all of them had quiet rounds, else processor time."""
    by_clock = all(is_quiet([each]) for each in rivals)

    def speed(entry: Entry) -> float:
        passes = [entry.passes[number] for number in _counted([entry])]
        return median([each.tokens / (each.seconds if by_clock else each.cpu_seconds) for each in passes])

    return speed


def _quiet_rounds(entries: Sequence[Entry]) -> list[int]:
    """The rounds that all of the entries ran, and ran alone."""
    shared = set.intersection(*(set(each.passes) for each in entries))
    return [n for n in sorted(shared) if all(each.passes[n].other_cores <= QUIET_CORES for each in entries)]


def _counted(entries: Sequence[Entry]) -> list[int]:
    """The rounds that count: the quiet ones, or all that the entries share."""
    if is_quiet(entries):
        return _quiet_rounds(entries)
    return sorted(set.intersection(*(set(each.passes) for each in entries)))


def _fastest(entry: Entry) -> float:
    return max(each.tokens_per_second for each in entry.passes.values())
