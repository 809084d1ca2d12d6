"""What is aimed at, and what was reached."""

from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Aim:
    """One number that a section promises to reach: at least `aim`, or at most. A wish is no promise: what is hoped for
    beyond one."""

    key: str
    text: str
    value: float
    aim: float
    better: Literal["higher", "lower"]
    unit: str = ""
    wish: bool = False

    @property
    def met(self) -> bool:
        """Whether it was reached."""
        return self.value >= self.aim if self.better == "higher" else self.value <= self.aim

    def to_json(self) -> dict[str, Any]:
        """As it stands in a result."""
        return asdict(self) | {"met": self.met}


@dataclass(frozen=True)
class Section:
    """What one part of the benchmark found: `numbers` for the file, `aims` for the verdict."""

    numbers: dict[str, Any]
    aims: tuple[Aim, ...] = ()
