"""What the checks of a dataset found, for people: findings, statistics, lengths."""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import click

from luthier.v1.dataset_pb2 import DatasetFormat, FileFormat
from luthier.v1.dataset_report_pb2 import FINDING_LEVEL_ERROR, FindingLevel
from luthier.v1.tokenization_pb2 import Overlong, TrainOn
from luthier_client import enums
from luthier_client.cli import output

if TYPE_CHECKING:
    from luthier.v1.dataset_pb2 import DatasetReading
    from luthier.v1.dataset_report_pb2 import DatasetReport, Finding, FindingCount, LengthBucket, TokenReport
    from luthier.v1.event_pb2 import DatasetsChecked

_COLOURS = {"error": "red", "warning": "yellow", "note": "blue"}
_ROLES = ("system", "user", "assistant", "tool", "text", "template")
_OVERLONG = {"truncate": "cut", "drop": "dropped", "split": "split"}
_BAR = 40
# Lines named one by one of findings that are the same.
_LINES = 5
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def has_errors(*reports: "DatasetReport | TokenReport") -> bool:
    """Whether training on it would be wrong."""
    return any(count.level == FINDING_LEVEL_ERROR and count.count for report in reports for count in report.counts)


def print_report(report: "DatasetReport", shown: int) -> None:
    """Prints a structural report: its findings, `shown` of each level at most, then what the rows are made of."""
    print_findings(report.findings, report.counts, shown)
    statistics = report.statistics
    heading("rows")
    output.pairs(
        _filled(
            [
                ("read as", reading(report.reading)),
                ("rows", f"{report.rows:,}"),
                ("turns", _by_role(statistics.turns)),
                ("characters", _by_role(statistics.characters)),
                ("images", f"{statistics.images:,}" if statistics.images else ""),
                ("with tools", f"{statistics.rows_with_tools:,} rows" if statistics.rows_with_tools else ""),
            ]
        ),
        indent="  ",
    )
    print_lengths(statistics.lengths, "characters")


def print_tokens(report: "TokenReport", title: str, shown: int) -> None:
    """Prints what a dataset is for a base model."""
    statistics = report.statistics
    heading(f"{title} for {output.one_line(report.base_model, 80)}")
    rows = f"{statistics.rows:,}"
    if statistics.examples != statistics.rows:
        rows += f", which become {statistics.examples:,} examples"
    longest = f"{statistics.longest:,} tokens, the limit is {report.max_length:,}"
    pace = f", about {output.duration(statistics.estimated_seconds)}" if statistics.estimated_seconds else ""
    output.pairs(
        _filled(
            [
                ("template", _template(report)),
                ("trained", _trains(report)),
                ("rows", rows),
                ("tokens", f"{statistics.tokens:,}, {_share(report)} trained ({statistics.trained_tokens:,})"),
                ("by role", _by_role(statistics.tokens_by_role)),
                ("longest", longest),
                ("overlong", _overlong(report)),
                ("steps", f"{statistics.estimated_steps:,}{pace}" if statistics.estimated_steps else ""),
            ]
        ),
        indent="  ",
    )
    print_lengths(statistics.lengths, "tokens", report.max_length)
    print_findings(report.findings, report.counts, shown)


def print_findings(findings: Sequence["Finding"], counts: Iterable["FindingCount"], shown: int) -> None:
    """Prints findings grouped by level, errors first, `shown` of each at most, and the counts of the rest.

    Those that differ in nothing but their line are one."""
    totals = {(each.level, each.code): each.count for each in counts}
    for level in sorted({each.level for each in findings} | {level for level, _ in totals}):
        name = enums.short(FindingLevel.DESCRIPTOR, level)
        groups = folded(each for each in findings if each.level == level)[:shown]
        total = sum(count for (of, _), count in totals.items() if of == level) or sum(map(len, groups))
        heading(f"{total:,} {name}{'s' if total != 1 else ''}", _COLOURS.get(name))
        for group, following in itertools.zip_longest(groups, groups[1:]):
            # What to do is said once for neighbours of a kind.
            alike = following is not None and (group[0].code, group[0].fix) == (following[0].code, following[0].fix)
            _print_folded(group, with_fix=not alike)
        seen = Counter(each.code for group in groups for each in group)
        rest = {code: count - seen[code] for (of, code), count in totals.items() if of == level}
        for code, count in sorted(rest.items(), key=lambda item: -item[1]):
            if count > 0:
                click.echo(f"  and {count:,} more {output.one_line(code, 60)}")


def print_finding(finding: "Finding", indent: str = "  ") -> None:
    """Prints one finding: where, what, and what to do."""
    _print_folded([finding], indent)


def folded(findings: Iterable["Finding"]) -> "list[list[Finding]]":
    """Findings that differ in nothing but their line, together; in the order of the first ones."""
    groups: dict[tuple[str, str, str, bool], list[Finding]] = {}
    for each in findings:
        groups.setdefault((each.code, _without_line(each), each.fix, each.line > 0), []).append(each)
    return list(groups.values())


def _without_line(finding: "Finding") -> str:
    """The message with `this line` in place of its own line's number."""
    if not finding.line:
        return finding.message
    number = rf"(?:{finding.line}|{finding.line:,})"
    text = re.sub(rf"\b([Ll]ine|[Rr]ow) {number}\b", lambda found: f"this {found[1].lower()}", finding.message)
    return text[:1].upper() + text[1:] if finding.message[:1].isupper() else text


def _print_folded(group: "Sequence[Finding]", indent: str = "  ", *, with_fix: bool = True) -> None:
    first = group[0]
    name = enums.short(FindingLevel.DESCRIPTOR, first.level)
    code = output.colour(output.one_line(first.code, 60), _COLOURS.get(name))
    message = first.message if len(group) == 1 else _without_line(first)
    click.echo(f"{indent}{_where(group)}  {code}  {output.one_line(message, 1000)}")
    if first.fix and with_fix:
        click.echo(f"{indent}  {output.colour('fix:', dim=True)} {output.one_line(first.fix, 1000)}")


def _where(group: "Sequence[Finding]") -> str:
    """`line 7`, `lines 7, 9`, `lines 2, 3, 4, ... (2,000)`, or `file`."""
    lines = list(dict.fromkeys(each.line for each in group))
    if not lines[0]:
        return "file"
    if len(lines) == 1:
        return f"line {lines[0]:,}"
    if len(lines) <= _LINES:
        return "lines " + ", ".join(map(str, lines))
    return f"lines {', '.join(map(str, lines[:3]))}, ... ({len(lines):,})"


def print_lengths(buckets: Sequence["LengthBucket"], unit: str, limit: int = 0) -> None:
    """Prints rows by their length as bars; those past the limit stand out."""
    if not any(bucket.rows for bucket in buckets):
        return
    click.echo(f"  {output.colour(f'rows by length in {unit}', dim=True)}")
    top = max(bucket.rows for bucket in buckets)
    wide = max(len(f"{bucket.up_to:,}") for bucket in buckets)
    count_wide = max(len(f"{bucket.rows:,}") for bucket in buckets)
    upto = "≤" if output.speaks_unicode() else "<="
    for bucket in buckets:
        over = 0 < limit < bucket.up_to
        drawn = output.colour(bar(bucket.rows / top, _BAR), "yellow" if over else "cyan")
        mark = output.colour("  over the limit", "yellow") if over and bucket.rows else ""
        click.echo(f"    {upto} {bucket.up_to:>{wide},}  {bucket.rows:>{count_wide},}  {drawn}{mark}".rstrip())


def bar(share: float, width: int) -> str:
    """A share of 1 as a bar; anything above nothing can be seen."""
    if not output.speaks_unicode():
        return "#" * (max(1, round(share * width)) if share > 0 else 0)
    eighths = max(1, round(share * width * 8)) if share > 0 else 0
    return "█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")


def count_words(counts: Iterable["FindingCount"]) -> str:
    """`3 errors, 2 warnings`; empty when nothing was found."""
    totals: Counter[int] = Counter()
    for each in counts:
        totals[each.level] += each.count
    names = {level: enums.short(FindingLevel.DESCRIPTOR, level) for level in totals}
    return ", ".join(f"{totals[level]:,} {names[level]}{'s' if totals[level] != 1 else ''}" for level in sorted(totals))


def token_line(report: "TokenReport") -> str:
    """What a dataset is for a base model, in one line."""
    statistics = report.statistics
    parts = [f"{statistics.rows:,} rows", f"{statistics.tokens:,} tokens", f"{_share(report)} trained"]
    if statistics.longest:
        parts.append(f"longest {statistics.longest:,}")
    if overlong := _overlong(report):
        parts.append(overlong)
    if found := count_words(report.counts):
        parts.append(found)
    return output.clean(", ".join(parts))


def checked_line(checked: "DatasetsChecked") -> str:
    """The check of a job's datasets, in one line: numbers, and the first two findings that matter."""
    text = token_line(checked.training)
    if checked.HasField("validation"):
        statistics = checked.validation.statistics
        text += f"; validation: {statistics.rows:,} rows, {statistics.tokens:,} tokens"
        if found := count_words(checked.validation.counts):
            text += f", {found}"
    if first := "; ".join(telling(checked, 2)):
        text += f": {first}"
    return text


def telling(checked: "DatasetsChecked", most: int) -> list[str]:
    """The first errors and warnings of a check, a sentence each."""
    found = [*checked.training.findings, *checked.validation.findings]
    serious = sorted((each for each in found if enums.short(FindingLevel.DESCRIPTOR, each.level) != "note"),
                     key=lambda each: each.level)  # fmt: skip
    return [
        (f"line {each.line}: " if each.line else "") + output.one_line(each.message, 300) for each in serious[:most]
    ]


def reading(read: "DatasetReading") -> str:
    """How a file is read: `jsonl, prompt_completion, prompt=question`."""
    parts = [enums.short(FileFormat.DESCRIPTOR, read.file_format)] if read.file_format else []
    parts += [enums.short(DatasetFormat.DESCRIPTOR, read.format)] if read.format else []
    parts += [f"{field}={column}" for field, column in sorted(read.columns.items())]
    return ", ".join(parts)


def heading(text: str, colour: str | None = None) -> None:
    """Prints the heading of a part."""
    click.echo(output.colour(text, colour, bold=True))


def _filled(rows: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(label, value) for label, value in rows if value]


def _by_role(counts: Mapping[str, int]) -> str:
    known = [role for role in _ROLES if role in counts]
    others = sorted(set(counts) - set(known))
    return ", ".join(f"{output.one_line(role, 40)} {counts[role]:,}" for role in [*known, *others])


def _share(report: "TokenReport") -> str:
    statistics = report.statistics
    return f"{statistics.trained_tokens / statistics.tokens:.1%}" if statistics.tokens else "none"


def _template(report: "TokenReport") -> str:
    given = report.tokenization
    if not report.template_sha256:
        return ""
    what = given.chat_template_name or ("the given one" if given.chat_template else "the model's own")
    return f"{what}  ({report.template_sha256[:12]})"


def _trains(report: "TokenReport") -> str:
    given = report.tokenization
    what = "what follows the response template" if given.response_template else ""
    if not what and given.train_on:
        what = enums.short(TrainOn.DESCRIPTOR, given.train_on).replace("_", " ")
    return ", ".join(part for part in (what, f"known by {report.mask_method}" if report.mask_method else "") if part)


def _overlong(report: "TokenReport") -> str:
    statistics = report.statistics
    if not statistics.overlong_rows:
        return ""
    policy = report.tokenization.overlong
    done = _OVERLONG.get(enums.short(Overlong.DESCRIPTOR, policy), "too long")
    lost = f", {statistics.lost_tokens:,} tokens lost" if statistics.lost_tokens else ""
    return f"{statistics.overlong_rows:,} row{'s' if statistics.overlong_rows != 1 else ''} {done}{lost}"
