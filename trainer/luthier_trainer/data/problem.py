"""What can be wrong with a row, or worth knowing about it."""

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How much a finding matters: errors refuse the dataset, warnings and notes do not."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with a row. code: a stable name; message: a sentence that a person can act on; fix: what to do,
    where the message does not say it."""

    code: str
    message: str
    fix: str = ""
    level: Level = Level.ERROR
