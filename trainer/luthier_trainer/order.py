"""The order of the rows, a function of the seed alone: nothing about it needs to be saved."""

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]

_HOLDOUT_STREAM = 2**64 - 1
"""The stream of the held-out rows: no epoch has this number."""


def _draws(seed: int, stream: int, count: int) -> npt.NDArray[np.uint64]:
    """`count` raw 64-bit draws. Philox's raw stream is guaranteed by numpy never to change, `permutation` is not."""
    draws: npt.NDArray[np.uint64] = np.random.Philox(key=np.array([seed, stream], np.uint64)).random_raw(count)
    return draws


@functools.lru_cache(maxsize=2)  # every step of an epoch asks for the same one
def epoch_order(seed: int, epoch: int, rows: int) -> Indices:
    """A permutation of `range(rows)` that depends on (seed, epoch) alone. Not to be written to."""
    order = np.argsort(_draws(seed, epoch, rows), kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order


def hold_out(seed: int, rows: int, fraction: float) -> tuple[Indices, Indices]:
    """Splits `range(rows)` into (training, validation), each ascending.

    The rows with the smallest draws of the seed are held out: `fraction * rows` of them, rounded down, but at least one
    row on each side when `fraction` is above 0 and there are two rows or more.
    """
    if fraction <= 0 or rows < 2:
        return np.arange(rows, dtype=np.int64), np.empty(0, dtype=np.int64)
    count = min(max(int(fraction * rows), 1), rows - 1)
    order = np.argsort(_draws(seed, _HOLDOUT_STREAM, rows), kind="stable").astype(np.int64)
    return np.sort(order[count:]), np.sort(order[:count])


@dataclass(frozen=True)
class RowOrder:
    """Which rows each optimizer step trains on. A batch is `batch_size` row slots; an epoch's last may have fewer."""

    rows: Indices
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def batch(self, step: int) -> Indices:
        """Row indices of optimizer step `step`, counted from 0."""
        epoch, index = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.seed, epoch, len(self.rows))
        return self.rows[order[index * self.batch_size : (index + 1) * self.batch_size]]
