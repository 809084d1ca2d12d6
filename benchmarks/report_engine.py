"""The engine's sections of the report: passes against the peers, what each point brings, CUDA. Results of before memory
was measured are read too."""

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.engine.tables import cells, mebibytes, ratio_cells
from benchmarks.numbers import median


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose columns after the first stand to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def origin(found: dict[str, Any]) -> str:
    """Where a section comes from that was not measured in the page's run."""
    return f", measured apart ({found['origin']})" if "origin" in found else ""


def engine(found: dict[str, Any]) -> str:
    """Against the peers."""
    work = found["work"]
    rows = []
    for each in found["contestants"]:
        if not each["rounds"]:
            rows.append((each["name"], f"did not run: {each['problem']}", *[""] * 6))
            continue
        rows.append(cells(each))
    ratios = [ratio_cells(each) for each in found["comparisons"]]
    return (
        "## Engine\n\n"
        f"A random 28M-parameter Llama, LoRA r16 on all linears, whole passes over {work['rows']} of 600 chats "
        f"({work['tokens']:,} tokens, {work['scored_tokens']:,} scored, {work['flops_per_token'] / 1e6:.0f} MFLOP a "
        "token), 16 examples an optimizer step; medians of interleaved rounds, of the quiet ones if there are two (a "
        "star: other processes used more than 0.2 cores meanwhile). Who could not be the best after the first round "
        "has that one alone. Real tokens a second, padding not counted; set-up, tokenising and a warm-up pass are not "
        "timed. The roofline is the speed at which the needed operations would run as one large matrix product, "
        "measured just before each pass in the dtype that computes; MFU is the share of it. Peak memory is what the "
        "first pass had resident at its most, the weights included, beyond the process that had imported "
        "everything.\n\n"
        + markdown(("", "tokens/s", "per CPU second", "roofline", "MFU", "in CPU time", "peak MiB", "rounds"), rows)
        + "\n"
        + markdown(
            ("Luthier against the best", "ratio", "best passes", "in CPU time", "memory", "median over", "rounds"),
            ratios,
        )
    )


def points(found: dict[str, Any]) -> str:
    """What each point brings."""
    work, rows, missing = found["work"], [], []
    for each in found["points"]:
        if each["problem"]:
            missing.append(f"- {each['number']}, {each['engine']}: {each['problem']}\n")
            continue
        rows.append(
            (
                f"{each['number']}. {each['engine']}",
                each["instead"],
                *(f"{one:,.0f}" for one in each["tokens_per_second"]),
                f"{each['ratio']:.2f}",
                f"{each['ratio_cpu_time']:.2f}" + ("" if each["quiet"] else "*"),
                " / ".join(mebibytes(one) for one in each["peak_mib"]),
                " ".join(f"{one:.2f}" for one in each["ratio_rounds"]),
            )
        )
    text = (
        "## What each point of the engine brings\n\n"
        f"The engine as it is, and with one thing switched off from outside, in one process{origin(found)}: pairs of "
        f"passes over {work['rows']} of the chats ({work['tokens']:,} tokens), interleaved, medians; a ratio above 1 "
        "speaks for the engine (a star: other processes used part of the processor).\n\n"
        + markdown(
            ("engine", "instead", "engine, tokens/s", "instead", "ratio", "in CPU time", "peak MiB", "pairs"), rows
        )
    )
    if "warm_start" in found:
        warm, cold = (median(found["warm_start"][key]) for key in ("warm_seconds", "cold_seconds"))
        text += (
            f"\n5, the warm start: CreateJob to the first step takes {warm:.2f} s in a trainer forked from the warm "
            f"host and {cold:.2f} s in a cold process, {cold / warm:.1f} times as long (medians of "
            f"{len(found['warm_start']['warm_seconds'])}, in turn).\n"
        )
    return text + ("\nNot measured:\n\n" + "".join(missing) if missing else "")


def cuda(found: dict[str, Any]) -> str:
    """On a CUDA device."""
    rows, problems = [], []
    for each in found["cells"]:
        for name, answer in each["engines"].items():
            if answer["problem"]:
                problems.append(f"- {each['name']}, {name}: {answer['problem']}\n")
                continue
            rows.append(
                (
                    each["name"],
                    name,
                    answer["setting"],
                    f"{answer['tokens_per_second']:,.0f}",
                    f"{answer['flops_utilisation']:.0%}",
                    f"{answer['peak_gib']:.1f}",
                )
            )
    present = ", ".join(name for name, there in found["libraries"].items() if there) or "none"
    return (
        "## CUDA\n\n"
        f"{found['device']}{origin(found)}. Llamas of random weights in bfloat16, LoRA r16 on all linears, frozen "
        "weights in nf4 where it says QLoRA; each engine in a process of its own, TRL in the fastest of its settings "
        "in a short pass. Full: every row has all the tokens; chats: log-normal lengths. MFU is of a bfloat16 product "
        "measured in the same process, memory the allocator's peak, weights included. Installed of the optional "
        f"packages: {present}."
        "\n\n" + markdown(("", "engine", "setting", "tokens/s", "MFU", "peak GiB"), rows)
    ) + ("\nDid not run:\n\n" + "".join(problems) if problems else "")
