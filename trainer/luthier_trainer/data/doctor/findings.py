"""What was found in a dataset: exact counts of everything, and the findings that a person gets to see."""

from collections import Counter
from collections.abc import Iterator
from heapq import heappush, heappushpop

from luthier.v1 import dataset_report_pb2
from luthier_trainer.data.problem import Level, Problem

MAX_LISTED = 1_000
MAX_LISTED_OF_ONE_CODE = 200
"""For warnings and notes: those of one kind never crowd out the others. Errors are listed up to MAX_LISTED."""
MAX_TEXT = 1_000
"""Characters of a message or a fix; more is cut."""

_LEVELS = {
    Level.ERROR: dataset_report_pb2.FINDING_LEVEL_ERROR,
    Level.WARNING: dataset_report_pb2.FINDING_LEVEL_WARNING,
    Level.NOTE: dataset_report_pb2.FINDING_LEVEL_NOTE,
}
_Kind = tuple[Level, str]


class Findings:
    """Collects problems in any order, in bounded memory: of each kind (level and code) those of the lowest lines."""

    def __init__(self) -> None:
        self._counts: Counter[_Kind] = Counter()
        self._kept: dict[_Kind, list[tuple[int, int, Problem]]] = {}

    def add(self, line: int, problem: Problem) -> None:
        """Counts a problem of a line (0: of the whole file), and keeps it while it is among the first of its kind."""
        kind = problem.level, problem.code
        self._counts[kind] += 1
        kept = self._kept.setdefault(kind, [])
        # The root of the heap is the last one kept: the highest line, and on one line the one added last.
        entry = -line, -self._counts[kind], problem
        if len(kept) < (MAX_LISTED if problem.level is Level.ERROR else MAX_LISTED_OF_ONE_CODE):
            heappush(kept, entry)
        elif entry > kept[0]:
            heappushpop(kept, entry)

    @property
    def errors(self) -> int:
        """How many of all problems are errors."""
        return sum(count for (level, _), count in self._counts.items() if level is Level.ERROR)

    def listed(self) -> list[dataset_report_pb2.Finding]:
        """Errors first, then by line; at most MAX_LISTED. Where not all fit, every kind gets its share."""
        chosen = sorted(self._ranked(), key=lambda one: (not one[0], one[1]))[:MAX_LISTED]
        chosen.sort(key=lambda one: (not one[0], one[2], one[3].level is Level.NOTE))
        return [
            dataset_report_pb2.Finding(
                level=_LEVELS[problem.level],
                code=problem.code,
                line=line,
                message=_shortened(problem.message),
                fix=_shortened(problem.fix),
            )
            for _, _, line, problem in chosen
        ]

    def counts(self) -> list[dataset_report_pb2.FindingCount]:
        """How often each kind was found: errors first, then warnings, then notes; the most frequent first."""
        kinds = sorted(self._counts.items(), key=lambda one: (_LEVELS[one[0][0]], -one[1], one[0][1]))
        return [
            dataset_report_pb2.FindingCount(level=_LEVELS[level], code=code, count=count)
            for (level, code), count in kinds
        ]

    def _ranked(self) -> Iterator[tuple[bool, int, int, Problem]]:
        """All that are kept: whether it is an error, its rank among those of its kind, its line, the problem."""
        for (level, _), kept in self._kept.items():
            for rank, (line, _, problem) in enumerate(sorted(kept, key=lambda entry: entry[:2], reverse=True)):
                yield level is Level.ERROR, rank, -line, problem


def _shortened(text: str) -> str:
    """Bounded, and what a protobuf string takes: a lone surrogate becomes a question mark."""
    short = text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 3] + "..."
    return short.encode(errors="replace").decode()
