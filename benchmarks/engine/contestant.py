"""Who trains, and how."""

from dataclasses import dataclass
from typing import Literal

Engine = Literal["luthier", "trl", "transformers"]
Strategy = Literal["", "default", "group_by_length", "packing"]

EXAMPLES_PER_STEP = 16
"""Rows of an optimizer step, for everybody: a peer reaches it by accumulating, packed rows by their share of it."""

PACKED_EXAMPLES = 4
"""Chats that a packed row of 1,024 tokens holds on average, so 4 packed rows are a step."""

_NAMES = {"trl": "TRL", "transformers": "Trainer"}


@dataclass(frozen=True)
class Contestant:
    """A way to train.

    dtype: `float32`; `auto` (Luthier's probe); `autocast` (a peer's bf16=True on 32-bit weights); `bfloat16` (the
    weights are loaded so); `bfloat16-autocast` (both). strategy, batch and checkpointing are the peers': rows that go
    through the model together, how they are chosen, and whether activations are computed twice. without: the key of the
    one of `points.POINTS` that is switched off in Luthier.
    """

    engine: Engine
    dtype: str
    strategy: Strategy = ""
    batch: int = 0
    checkpointing: bool = False
    without: str = ""

    @property
    def name(self) -> str:
        """For tables."""
        if self.engine == "luthier":
            return f"Luthier, {self.dtype}" + (f", without {self.without}" if self.without else "")
        recompute = ", checkpointing" if self.checkpointing else ""
        return f"{_NAMES[self.engine]} {self.strategy}, batch {self.batch}{recompute}, {self.dtype}"

    @property
    def ordered(self) -> bool:
        """Whether it gets its rows from the longest to the shortest. `group_by_length` does, in place of transformers'
        own sampler: that one sorts within 50 batches, which over all 600 rows pads like this or a little more."""
        return self.strategy == "group_by_length"

    @property
    def accumulation(self) -> int:
        """Batches of an optimizer step."""
        rows = EXAMPLES_PER_STEP // PACKED_EXAMPLES if self.strategy == "packing" else EXAMPLES_PER_STEP
        return max(1, rows // self.batch)
