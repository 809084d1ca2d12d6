"""What is measured: a shape, a method, a length and the kind of rows; and TRL's settings there."""

from dataclasses import dataclass
from typing import Literal

Method = Literal["lora", "qlora"]
Kind = Literal["full", "chats"]

_CHATS_IN_A_ROW = 4
"""Chats that a row of the full length would hold, on average."""

WARM_STEPS, STEPS = 2, 6


@dataclass(frozen=True)
class Cell:
    """full: every row has `length` tokens, so that nobody pads; chats: rows of log-normal length, at most so long.
    step_tokens: tokens of an optimizer step, about."""

    shape: str
    method: Method
    length: int
    kind: Kind = "full"
    step_tokens: int = 32_768

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.shape}, {'LoRA' if self.method == 'lora' else 'QLoRA'} r16, {self.length:,} tokens, {self.kind}"

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step."""
        return self.full_rows * _CHATS_IN_A_ROW if self.kind == "chats" else self.full_rows

    @property
    def full_rows(self) -> int:
        """Rows of the full length that an optimizer step's tokens fill."""
        return max(1, self.step_tokens // self.length)


@dataclass(frozen=True)
class Setting:
    """How a peer trains. packing: rows of whole documents up to the length, attention apart by flash-attention."""

    batch: int
    checkpointing: bool
    packing: bool = False

    @property
    def name(self) -> str:
        """For tables."""
        recompute = ", checkpointing" if self.checkpointing else ""
        return f"{'packing' if self.packing else 'grouped by length'}, batch {self.batch}{recompute}"


def cells() -> list[Cell]:
    """All of them, the most telling first."""
    found = []
    for method in ("lora", "qlora"):
        for shape in ("8B", "1B"):
            found += [Cell(shape, method, length) for length in (4096, 8192, 2048)]
            if method == "lora":
                found.append(Cell(shape, method, 4096, "chats"))
    return found


def settings(cell: Cell, *, flash: bool) -> list[Setting]:
    """TRL's contenders: small and larger batches without checkpointing, a larger one with it where memory asks for it,
    packing where flash-attention is there to keep documents apart."""
    found = [Setting(batch, False) for batch in (1, 2, 4)] + [Setting(4, True)]
    if flash and cell.kind == "chats":
        found += [Setting(1, False, packing=True), Setting(2, True, packing=True)]
    return [each for each in found if each.batch <= cell.rows_per_step]


def accumulation(cell: Cell, setting: Setting) -> int:
    """Batches of an optimizer step, packed rows counted by their tokens."""
    rows = cell.full_rows if setting.packing else cell.rows_per_step
    return max(1, rows // setting.batch)
