"""What a person sees of the engine's numbers."""

from collections.abc import Sequence
from typing import Any

from benchmarks.console import say, table
from benchmarks.engine.standings import QUIET_CORES


def show(found: Sequence[dict[str, Any]]) -> None:
    """A line for each contestant."""
    rows: list[tuple[str, ...]] = []
    for each in found:
        if not each["rounds"]:
            rows.append((each["name"], "did not run", "", "", "", "", "", ""))
            continue
        rows.append(cells(each))
    say()
    table(("", "tokens/s", "per CPU s", "roofline", "MFU", "in CPU time", "peak MiB", "rounds"), rows)


def cells(numbers: dict[str, Any]) -> tuple[str, ...]:
    """A contestant's: name, tokens a second, a CPU second, roofline, MFU, in CPU time, peak MiB, rounds."""
    return (
        numbers["name"],
        f"{numbers['tokens_per_second']:,.0f}",
        f"{numbers['tokens_per_cpu_second']:,.0f}",
        f"{numbers['roofline_tokens_per_second']:,.0f}",
        f"{numbers['flops_utilisation']:.0%}",
        f"{numbers['flops_utilisation_cpu']:.0%}",
        mebibytes(numbers.get("peak_mib")),
        _rounds(numbers),
    )


def ratio_cells(numbers: dict[str, Any]) -> tuple[str, ...]:
    """A comparison's: who, ratio, of best passes, in CPU time, of memory, how quiet, rounds."""
    return (
        f"{numbers['luthier']} / {numbers['peer']}",
        f"{numbers['ratio']:.2f}",
        f"{numbers['ratio_of_best_passes']:.2f}",
        f"{numbers['ratio_cpu_time']:.2f}",
        f"{numbers['ratio_memory']:.2f}" if numbers.get("ratio_memory") else "?",
        "quiet rounds" if numbers["quiet"] else "disturbed",
        " ".join(f"{one:.2f}" for one in numbers["ratio_rounds"]),
    )


def show_ratios(comparisons: Sequence[dict[str, Any]]) -> None:
    """A line for each comparison."""
    table(
        ("Luthier against its peers' best", "ratio", "best passes", "in CPU time", "memory", "", "rounds"),
        [ratio_cells(each) for each in comparisons],
    )


def mebibytes(amount: float | None) -> str:
    """A question mark where it is not known."""
    return "?" if amount is None else f"{amount:,.0f}"


def _rounds(numbers: dict[str, Any]) -> str:
    """Tokens a second of each round; a star where other processes took part of the processor."""
    pairs = zip(numbers["rounds"], numbers["other_cores"], strict=True)
    return " ".join(f"{speed:.0f}{'*' if others > QUIET_CORES else ''}" for speed, others in pairs)
