"""Enum values as people write them: `cosine` for LR_SCHEDULER_COSINE."""

import re
from typing import Any

_WORD = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


def prefix(enum: Any) -> str:
    """What all names of an enum begin with: `LrScheduler` gives `LR_SCHEDULER_`."""
    return _WORD.sub("_", enum.name).upper() + "_"


def short(enum: Any, number: int) -> str:
    """The short name of a value; its number when this client is older than the value."""
    value = enum.values_by_number.get(number)
    return value.name.removeprefix(prefix(enum)).lower() if value is not None else str(number)


def choices(enum: Any) -> list[str]:
    """Every short name but `unspecified`."""
    return [short(enum, value.number) for value in enum.values if value.number != 0]


def number(enum: Any, text: str) -> int:
    """The value of a short or full name, in any case, with `-` for `_`. Raises ValueError that lists the names."""
    name = text.strip().upper().replace("-", "_").removeprefix(prefix(enum))
    value = enum.values_by_name.get(prefix(enum) + name)
    if value is None or value.number == 0:
        raise ValueError(f"{text!r} is none of {', '.join(choices(enum))}")
    return int(value.number)
