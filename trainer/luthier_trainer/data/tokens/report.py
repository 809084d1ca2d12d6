"""What the rows of a dataset are as tokens: a TokenReport, made while they are tokenised."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from luthier.v1 import dataset_report_pb2, tokenization_pb2
from luthier_trainer.data.doctor.findings import Findings
from luthier_trainer.data.problem import Level, Problem
from luthier_trainer.data.tokens.overlong import Overlong

TEMPLATE = "template"
_SHORTEST_BUCKET = 16
_LINES_NAMED = 10
_MESSAGES_NAMED = 3


class Tally:
    """Counts rows as they are tokenised."""

    def __init__(self) -> None:
        self.findings = Findings()
        self.methods: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.images = 0
        self.rows = 0
        self.tokens = 0
        self.trained_tokens = 0
        self.overlong_rows = 0
        self.lost_tokens = 0
        self.examples = 0
        self.longest = 0
        self._roles: list[str] = [TEMPLATE]
        self._by_role = np.zeros(1, np.int64)
        self._buckets = np.zeros(64, np.int64)

    def add_lengths(self, lengths: npt.NDArray[np.int64]) -> None:
        """Rows of these lengths in tokens, before anything is cut. A row of none is in error: it is a row, and has no
        length."""
        self.rows += len(lengths)
        lengths = lengths[lengths > 0]
        if len(lengths):
            self.longest = max(self.longest, int(lengths.max()))
            bits = np.ceil(np.log2(lengths)).astype(np.int64)
            self._buckets += np.bincount(bits, minlength=len(self._buckets))

    def number_of(self, role: str) -> int:
        """The number that `add_roles` counts a role under; 0 is `template`."""
        if role not in self._roles:
            self._roles.append(role)
        return self._roles.index(role)

    def add_roles(self, numbers: npt.NDArray[np.int64]) -> None:
        """Tokens, each by the number of its role."""
        counts = np.bincount(numbers, minlength=len(self._roles))
        counts[: len(self._by_role)] += self._by_role
        self._by_role = counts

    def report(self) -> dataset_report_pb2.TokenReport:
        """The counts, and the findings of single rows and of all of them."""
        supervised = self.kinds.keys() <= {"chat", "text"}
        if self.rows and supervised and not self.examples and not self.findings.errors:
            message = "No row trains anything."
            fix = "Raise max_length, shorten the prompts, or train other tokens (train_on)."
            self.findings.add(0, Problem("NOTHING_TRAINED", message, fix))
        by_role = zip(self._roles, self._by_role.tolist(), strict=False)
        return dataset_report_pb2.TokenReport(
            mask_method=self.methods.most_common(1)[0][0] if self.methods else "",
            findings=self.findings.listed(),
            counts=self.findings.counts(),
            statistics=dataset_report_pb2.TokenStatistics(
                rows=self.rows,
                tokens=self.tokens,
                trained_tokens=self.trained_tokens,
                lengths=self._lengths(),
                longest=self.longest,
                overlong_rows=self.overlong_rows,
                lost_tokens=self.lost_tokens,
                examples=self.examples,
                tokens_by_role={role: count for role, count in by_role if count},
            ),
        )

    def _lengths(self) -> list[dataset_report_pb2.LengthBucket]:
        """Powers of two, from the shortest rows' (16 at least) to the longest's; none when no row has a length."""
        first = _SHORTEST_BUCKET.bit_length() - 1
        counts = self._buckets[first:].copy()
        counts[0] += self._buckets[:first].sum()
        filled = np.flatnonzero(counts).tolist()
        if not filled:
            return []
        return [
            dataset_report_pb2.LengthBucket(up_to=_SHORTEST_BUCKET << n, rows=int(counts[n]))
            for n in range(filled[0], filled[-1] + 1)
        ]


def too_long(tokens: int, max_length: int, policy: Overlong, pieces: int, lost: int) -> Problem:
    """The finding of a row over the limit: what happens to it, in numbers."""
    over = f"The row has {tokens:,} tokens, {tokens - max_length:,} more than max_length ({max_length:,})"
    fix = "Raise max_length, or choose another `overlong` policy (truncate, drop, split)."
    match policy:
        case Overlong.TRUNCATE:
            return Problem("ROW_TOO_LONG", f"{over}: its end is cut off.", fix, Level.WARNING)
        case Overlong.DROP:
            return Problem("ROW_TOO_LONG", f"{over}: it is left out.", fix, Level.WARNING)
        case Overlong.SPLIT:
            gone = f", and {lost:,} tokens in pieces that train nothing are left out" if lost else ""
            message = f"{over}: it becomes {pieces} {'example' if pieces == 1 else 'examples'}{gone}."
            return Problem("ROW_TOO_LONG", message, fix, Level.WARNING)
        case Overlong.ERROR:
            return Problem("ROW_TOO_LONG", f"{over}.", fix)


def errors(report: dataset_report_pb2.TokenReport) -> int:
    """How many of the findings, listed or not, are errors."""
    error = dataset_report_pb2.FINDING_LEVEL_ERROR
    return sum(each.count for each in report.counts if each.level == error)


def first_errors(report: dataset_report_pb2.TokenReport) -> tuple[str, str]:
    """The errors in a sentence, lines with the same message together, and how many there are; and what to do about
    them."""
    listed = [each for each in report.findings if each.level == dataset_report_pb2.FINDING_LEVEL_ERROR]
    groups: dict[str, list[int]] = {}
    for each in listed:
        groups.setdefault(each.message, []).append(each.line)
    said = "; ".join(f"{_places(lines)}{message}" for message, lines in list(groups.items())[:_MESSAGES_NAMED])
    count = errors(report)
    shown = sum(len(lines) for lines in list(groups.values())[:_MESSAGES_NAMED])
    if count > shown:
        said = f"{count:,} errors, the first of them: {said}"
    fixes = {each.fix for each in listed if each.fix}
    fix = fixes.pop() if len(fixes) == 1 else "Correct these rows."
    command = f"luthier dataset doctor {report.dataset_id or 'DATASET'} --base-model {report.base_model or 'MODEL'}"
    return said, fix if count == 1 else f"{fix} `{command}` lists everything that was found."


def _places(lines: Sequence[int]) -> str:
    """`line 3: ` or `12 rows (lines 1, 4, ...): `; nothing for what is wrong with the whole file."""
    if len(lines) == 1:
        return f"line {lines[0]}: " if lines[0] else ""
    more = ", ..." if len(lines) > _LINES_NAMED else ""
    return f"{len(lines):,} rows (lines {', '.join(str(line) for line in lines[:_LINES_NAMED])}{more}): "


def warnings(report: dataset_report_pb2.TokenReport) -> list[str]:
    """What a job's log says about rows that are not trained as they are."""
    statistics = report.statistics
    said: list[str] = []
    if statistics.overlong_rows and report.tokenization.overlong != tokenization_pb2.OVERLONG_ERROR:
        happens = {
            tokenization_pb2.OVERLONG_DROP: "are left out",
            tokenization_pb2.OVERLONG_SPLIT: "are split",
        }.get(report.tokenization.overlong, "are cut off at their end")
        said.append(
            f"{statistics.overlong_rows} of {statistics.rows} rows are longer than {report.max_length} tokens"
            f" (max_length) and {happens}: {statistics.lost_tokens:,} tokens are lost."
            f" Lines {_lines(report, 'ROW_TOO_LONG')}."
        )
    untrained = _count(report, "NOTHING_TRAINED")
    if untrained:
        lines = _lines(report, "NOTHING_TRAINED")
        said.append(f"{untrained} of {statistics.rows} rows train nothing. Lines {lines}.")
    return said


def _count(report: dataset_report_pb2.TokenReport, code: str) -> int:
    return sum(each.count for each in report.counts if each.code == code)


def _lines(report: dataset_report_pb2.TokenReport, code: str) -> str:
    lines: Sequence[int] = [each.line for each in report.findings if each.code == code and each.line]
    more = ", ..." if _count(report, code) > len(lines[:_LINES_NAMED]) else ""
    return ", ".join(str(line) for line in lines[:_LINES_NAMED]) + more
