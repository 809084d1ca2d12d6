"""What a person sees of the engine's numbers."""

from collections.abc import Sequence
from typing import Any

from benchmarks.console import say, table
from benchmarks.engine.standings import QUIET_CORES


def show(found: Sequence[dict[str, Any]]) -> None:
    """A line for each contestant."""
    rows = []
    for each in found:
        if not each["rounds"]:
            rows.append((each["name"], "did not run", "", "", "", "", "", ""))
            continue
        rows.append(
            (
                each["name"],
                f"{each['tokens_per_second']:,.0f}",
                f"{each['tokens_per_cpu_second']:,.0f}",
                f"{each['roofline_tokens_per_second']:,.0f}",
                f"{each['flops_utilisation']:.0%}",
                f"{each['flops_utilisation_cpu']:.0%}",
                mebibytes(each["peak_mib"]),
                _rounds(each),
            )
        )
    say()
    table(("", "tokens/s", "per CPU s", "roofline", "MFU", "in CPU time", "peak MiB", "rounds"), rows)


def show_ratios(comparisons: Sequence[dict[str, Any]]) -> None:
    """A line for each comparison."""
    table(
        ("Luthier against its peers' best", "ratio", "best passes", "in CPU time", "memory", "", "rounds"),
        [
            (
                f"{each['luthier']} / {each['peer']}",
                f"{each['ratio']:.2f}",
                f"{each['ratio_of_best_passes']:.2f}",
                f"{each['ratio_cpu_time']:.2f}",
                f"{each['ratio_memory']:.2f}" if each["ratio_memory"] else "?",
                "quiet" if each["quiet"] else "disturbed",
                " ".join(f"{one:.2f}" for one in each["ratio_rounds"]),
            )
            for each in comparisons
        ],
    )


def mebibytes(amount: float | None) -> str:
    """A question mark where it is not known."""
    return "?" if amount is None else f"{amount:,.0f}"


def _rounds(numbers: dict[str, Any]) -> str:
    """Tokens a second of each round; a star where other processes took part of the processor."""
    pairs = zip(numbers["rounds"], numbers["other_cores"], strict=True)
    return " ".join(f"{speed:.0f}{'*' if others > QUIET_CORES else ''}" for speed, others in pairs)
