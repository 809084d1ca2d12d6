"""How many tokens go through a model together: as many as memory has room for."""

from collections.abc import Callable
from dataclasses import dataclass

from luthier_trainer.memory.need import Need

SMALLEST = 64
_STEP = 64


@dataclass(frozen=True)
class Largest:
    """The largest micro-batch that a budget of tokens makes of a job's rows: its tokens, its targets, the tokens of
    the longest row, and the sum of the squares of its documents' lengths, None for the most that it can be."""

    tokens: int
    scored: int
    longest: int
    pairs: int | None = None


@dataclass(frozen=True)
class Fit:
    """A way to train within a limit. budget_tokens: of a micro-batch, an example longer than that goes alone;
    predicted_bytes: the peak over the loaded process; fits: whether that is within the limit."""

    budget_tokens: int
    checkpointing: bool
    predicted_bytes: int
    limit_bytes: int

    @property
    def fits(self) -> bool:
        """Whether there is room; else this is the way that takes least. A limit of 0 is none."""
        return self.limit_bytes <= 0 or self.predicted_bytes <= self.limit_bytes


def fit(
    need_of: Callable[[bool], Need | None],
    largest: Callable[[int], Largest] | int,
    limit: int,
    most: int,
) -> Fit:
    """The largest budget of tokens up to `most` that fits into `limit` bytes; without activation checkpointing if a row
    of the longest alone fits so.

    `need_of(checkpointing)` is asked for what is looked at alone, and tells None where there is no checkpointing;
    `largest` tells what a budget makes of the rows, or is the tokens of the longest row, all of whose tokens are taken
    for targets. Where nothing fits, the result `fits` not, and is the smallest.
    """
    shape = largest if callable(largest) else _full(largest)
    smallest: Fit | None = None
    for checkpointing in (False, True):
        need = need_of(checkpointing)
        if need is None:
            continue

        def at(budget: int, need: Need = need) -> Fit:
            found = shape(budget)
            return Fit(
                budget, need.checkpointing, need.peak(found.tokens, found.scored, found.longest, found.pairs), limit
            )

        top = at(most)
        if top.fits:
            return top
        low = at(min(SMALLEST, most))
        if low.fits:
            return _bisected(at, low, top)
        if smallest is None or low.predicted_bytes < smallest.predicted_bytes:
            smallest = low
    assert smallest is not None
    return smallest


def _bisected(at: Callable[[int], Fit], low: Fit, high: Fit) -> Fit:
    """The largest that fits, to `_STEP` tokens; `low` fits, `high` does not."""
    while high.budget_tokens - low.budget_tokens > _STEP:
        middle = at((low.budget_tokens + high.budget_tokens) // 2 // _STEP * _STEP)
        if middle.fits:
            low = middle
        else:
            high = middle
    return low


def _full(longest: int) -> Callable[[int], Largest]:
    def shape(budget: int) -> Largest:
        tokens = max(budget, longest)
        return Largest(tokens, tokens, longest)

    return shape
