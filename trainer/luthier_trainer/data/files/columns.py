"""Columns under the names that formats have for them."""

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping

from luthier_trainer.data.files.row import Row, shown
from luthier_trainer.data.problem import Problem

# Looking for near names takes longer than reading a row.
_SUGGESTIONS = 1000
_NAMES = 10


def renamed(rows: Iterable[Row], columns: Mapping[str, str]) -> Iterator[Row]:
    """The rows with each target field (`prompt`) in place of its source column (`question`). A source keeps its old
    name only where that is a target too; a row without one of the sources is a problem."""
    sources = set(columns.values())
    suggestions = 0
    for row in rows:
        value = row.value
        if isinstance(value, Problem):
            yield row
        elif sources <= value.keys():
            kept = {name: item for name, item in value.items() if name not in sources}
            yield Row(row.line, kept | {target: value[source] for target, source in columns.items()})
        else:
            suggestions += 1
            problem = missing(columns, value.keys() if suggestions <= _SUGGESTIONS else ())
            yield Row(row.line, problem) if problem else row


def missing(columns: Mapping[str, str], names: Collection[str]) -> Problem | None:
    """What is wrong when a source column is not among the names."""
    for target, source in columns.items():
        if source not in names:
            message = f"There is no column {shown(source)}, which {shown(target)} is to be taken from."
            return Problem("COLUMN_MISSING", message, _suggestion(source, names))
    return None


def _suggestion(source: str, names: Collection[str]) -> str:
    short = [name for name in names if len(name) <= 256][:1000]
    if near := difflib.get_close_matches(source.strip().lower(), [name.lower() for name in short], 3, 0.6):
        near = [next(name for name in short if name.lower() == lower) for lower in near]
        return f"Did you mean {' or '.join(shown(name) for name in near)}?"
    if not short:
        return "Map a column that every row has."
    more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return f"The columns are {', '.join(shown(name) for name in short[:_NAMES])}{more}."
