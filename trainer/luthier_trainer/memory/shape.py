"""What a budget of tokens makes of a job's rows."""

import numpy as np
import numpy.typing as npt

from luthier_trainer.memory.fit import Largest
from luthier_trainer.order import RowOrder

_MOST_ROWS, _MOST_STEPS = 20_000, 200
"""Up to so many rows and steps the order itself is gone through; else a bound is taken that holds for any order."""


class Rows:
    """The sizes of the rows that are trained on, in their order: int64 [rows] each.

    `lengths`: tokens of a row's longest example; `tokens`: of all its examples, several where it is split; `scored`:
    its targets.
    """

    def __init__(
        self,
        lengths: npt.NDArray[np.int64],
        tokens: npt.NDArray[np.int64],
        scored: npt.NDArray[np.int64],
        order: RowOrder,
        steps: int,
        padded: bool,
    ) -> None:
        self._lengths, self._tokens, self._scored = lengths, tokens, scored
        self._padded = padded
        self._steps = [order.batch(step) for step in range(steps)] if self._is_short(order, steps) else []
        self._batch_size = order.batch_size
        self._rows = order.rows

    @staticmethod
    def _is_short(order: RowOrder, steps: int) -> bool:
        return len(order.rows) <= _MOST_ROWS and steps <= _MOST_STEPS

    def largest(self, budget: int) -> Largest:
        """The most tokens and targets of any micro-batch of at most `budget` tokens, a longer row alone; the longest
        row."""
        longest = int(self._lengths[self._rows].max(initial=1))
        if self._padded or not self._steps:
            most = np.sort(self._tokens[self._rows])[-self._batch_size :]
            tokens = max(min(budget, longest * len(most) if self._padded else int(most.sum())), longest)
            targets = int(np.sort(self._scored[self._rows])[-self._batch_size :].sum())
            return Largest(tokens, min(tokens, targets), longest)
        found = [self._cut(rows, budget) for rows in self._steps]
        tokens, scored, pairs = (max(each[part] for each in found) for part in range(3))
        return Largest(tokens, scored, longest, pairs)

    def _cut(self, rows: npt.NDArray[np.int64], budget: int) -> tuple[int, int, int]:
        """(tokens, targets, squares of lengths), each the most, as `flatten.cut` cuts an optimizer step."""
        most_tokens = most_scored = most_pairs = tokens = scored = pairs = 0
        sizes = (each[rows].tolist() for each in (self._lengths, self._tokens, self._scored))
        for length, whole, targets in zip(*sizes, strict=True):
            if tokens and tokens + whole > budget:
                tokens = scored = pairs = 0
            tokens += min(whole, max(budget, length))
            scored += min(targets, tokens)
            pairs += length * min(whole, max(budget, length))
            most_pairs = max(most_pairs, pairs)
            most_tokens, most_scored = max(most_tokens, tokens), max(most_scored, scored)
        return most_tokens, most_scored, most_pairs
