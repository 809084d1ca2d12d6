"""What came of the mutants, a line for each batch, and the page that sums it up."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from mutations.mutant import Template
from mutations.site import CHILD_MIB, SECONDS, SERVER_MIB, WORKER_MIB, Outcome, Site
from mutations.table import TABLE

Line: TypeAlias = dict[str, Any]


def line_of(batch: int, outcomes: Sequence[Outcome], sites: Iterable[Site], seconds: float) -> Line:
    """A batch as it is recorded. `violations` have the mutant's number: with it, the mutant is made again."""
    mutations: dict[str, Line] = {}
    for each in outcomes:
        of = mutations.setdefault(each.mutant.mutation, {"outcomes": {}, "seconds": 0.0, "slowest": 0, "memory_mib": 0})
        name = f"{each.kind} {each.reason}".strip()
        of["outcomes"][name] = of["outcomes"].get(name, 0) + 1
        of["memory_mib"] = max(of["memory_mib"], round(each.memory_mib))
        if each.seconds > of["seconds"]:
            of |= {"seconds": round(each.seconds, 2), "slowest": each.mutant.number}
    violations = [
        f"{each.mutant.number} ({each.mutant.mutation}, {each.mutant.what.base}): {text}"
        for each in outcomes
        for text in each.violations
    ]
    watches = [site.watch for site in sites]
    violations += [f"after batch {batch}: {text}" for site in sites for text in site.settled()]
    return {
        "batch": batch,
        "mutants": len(outcomes),
        "templates": sum(isinstance(each.mutant.what, Template) for each in outcomes),
        "seconds": round(seconds, 1),
        "load": round(os.getloadavg()[0], 1),
        "machine": machine(),
        "server_mib": round(max(watch.most_server_mib for watch in watches)),
        "check_mib": round(max(watch.most_check_mib for watch in watches)),
        "preview_mib": round(max(watch.most_other_mib for watch in watches)),
        "mutations": mutations,
        "violations": violations,
    }


def machine() -> str:
    """The processor and the cores; no host name, no path."""
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return f"{names[0] if names else 'a processor'}, {len(os.sched_getaffinity(0))} cores"


def read(path: Path) -> list[Line]:
    """The batches that are recorded."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, line: Line) -> None:
    """Records a batch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


def page(lines: Sequence[Line]) -> str:
    """All that was recorded, as docs/mutations.md."""
    total = sum(line["mutants"] for line in lines)
    templates = sum(line["templates"] for line in lines)
    violations = [text for line in lines for text in line["violations"]]
    machines = " and ".join(sorted({line["machine"] for line in lines}))
    least_load = min((line["load"] for line in lines), default=0)
    bound = (
        f", which bounds the chance of one at {3 / total:.1g} with 95 % confidence" if total and not violations else ""
    )
    return "\n".join(
        [
            _HEAD.format(seconds=SECONDS, server=SERVER_MIB, check=WORKER_MIB, child=CHILD_MIB),
            f"## {total:,} mutants\n",
            f"{total - templates:,} files and {templates:,} templates, in {len(lines)} batches of together "
            f"{sum(line['seconds'] for line in lines) / 60:.0f} minutes, on {machines} (load average {least_load} to "
            f"{_most(lines, 'load')}, with what else ran).\n",
            f"- violations: {len(violations)}{bound}",
            f"- longest call: {max(_of_all(lines, 'seconds'), default=0):.1f} s",
            f"- most memory: luthierd {_most(lines, 'server_mib')} MiB, a check {_most(lines, 'check_mib')} MiB, a "
            f"preview or its host {_most(lines, 'preview_mib')} MiB, shared pages not counted\n",
            *([f"- {text[:600]}\n" for text in violations]),
            _table(
                ("mutation", "thrown", "no error", "findings", "refused", "most seconds", "most MiB"),
                _rows(lines),
                "lrrrrrr",
            ),
            "\nRefused means by a status with a reason; uploads that are to be kept are refused for findings too. A "
            "preview without an error counts as *no error*. The memory of previews is not told apart by mutation.\n",
            "## What was said\n",
            _table(("findings, by the first error of a file or preview", "files"), _reasons(lines, "findings"), "lr"),
            "",
            _table(("refused because of", "calls"), _reasons(lines, "refused"), "lr"),
        ]
    )


_HEAD = """# Mutations: what no file and no template may do

Written by `python -m mutations --report` in `tests`; do not edit. `make mutate N=10000` throws N mutants at a real
luthierd: files that were cut, changed, packed to blow up, mistyped or led astray, and chat templates that never end,
grow without bound or reach for what is not theirs. Each is made from its number alone (`python -m mutations --number
4711` makes and throws it again). The run goes on where it was stopped, and records each batch in
`benchmarks/results/mutation-runs.jsonl`; a short one is part of `make test`.

Of every call it is asked that

- it ends within {seconds} s, with a report or preview that is complete, or with a status that has a reason, and that is
  not INTERNAL, UNKNOWN or UNAVAILABLE (but for a preview whose process had to be ended: `DATA_WORK_TOO_LONG`);
- the server's health is SERVING afterwards, and it still knows its datasets;
- nothing is read or written outside of the data directory: canaries lie beside it and where the server runs, names
  that lead out of archives carry a mark that is looked for, and links lead to a secret that no answer may hold;
- when all is quiet nothing is left in `blobs/incoming`, in `work` or of temporary files, and the log has no traceback
  and no worker that failed;
- memory stays bounded: luthierd takes at most {server} MiB for itself, a check {check} MiB, a preview {child} MiB.
"""


def _rows(lines: Sequence[Line]) -> list[list[str]]:
    rows = []
    for name in TABLE:
        parts = [line["mutations"][name] for line in lines if name in line["mutations"]]
        if not parts:
            continue
        kinds: Counter[str] = Counter()
        for part in parts:
            for outcome, count in part["outcomes"].items():
                kinds[outcome.partition(" ")[0]] += count
        memory = max(part["memory_mib"] for part in parts)
        rows.append(
            [
                name,
                f"{kinds.total():,}",
                f"{kinds['sound'] + kinds['shown']:,}",
                f"{kinds['findings']:,}",
                f"{kinds['refused']:,}",
                f"{max(part['seconds'] for part in parts):.1f}",
                f"{memory:,}" if memory else "",
            ]
        )
    return rows


def _reasons(lines: Sequence[Line], kind: str) -> list[list[str]]:
    counts: Counter[str] = Counter()
    for line in lines:
        for part in line["mutations"].values():
            for outcome, count in part["outcomes"].items():
                first, _, reason = outcome.partition(" ")
                if first == kind:
                    counts[reason] += count
    return [[f"`{reason}`", f"{count:,}"] for reason, count in counts.most_common()]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], sides: str) -> str:
    marks = ["---" if side == "l" else "---:" for side in sides]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, marks, *rows))


def _of_all(lines: Sequence[Line], key: str) -> list[float]:
    return [part[key] for line in lines for part in line["mutations"].values()]


def _most(lines: Sequence[Line], key: str) -> Any:
    return max((line[key] for line in lines), default=0)


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
