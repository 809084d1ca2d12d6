"""What the curve of a learning-rate range test says about the learning rate. Loads no torch.

The rule: a tenth of the rate at which the smoothed loss is lowest. Smith (2017, arXiv 1506.01186, section 3.3) reads
the largest useful rate off the place where the curve turns; a cyclical or decaying schedule may touch it, but AdamW at
a peak that is held for hundreds of steps may not, so Howard and Gugger ("Deep Learning for Coders", chapter 5; fastai's
`minimum` suggestion) go back by one order of magnitude.

A curve is not usable when its fall is not clearly more than its noise: then nothing is suggested.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_MARGIN = 10.0
_WIDTH = 0.15
_FEWEST = 8
_LEAST_FALL = 0.01
_NOISES = 2.0

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Reading:
    """The smoothed losses, one for each rate, and the rate that they suggest; None where they suggest nothing, for the
    reason that `rule` tells then."""

    losses: tuple[float, ...]
    rate: float | None
    rule: str


def rates(lowest: float, highest: float, count: int) -> list[float]:
    """`count` rates from the lowest to the highest, each the same factor above the one before."""
    return [lowest * (highest / lowest) ** (index / (count - 1)) for index in range(count)]


def smoothed(tried: Sequence[float], losses: Sequence[float]) -> Numbers:
    """The losses, each averaged with its neighbours by a Gaussian of 0.15 decades of the rate, at least the distance of
    two rates. Symmetric, so that it moves no minimum, unlike a running mean."""
    place: Numbers = np.log10(np.asarray(tried, np.float64))
    values: Numbers = np.asarray(losses, np.float64)
    width = max(_WIDTH, float(place[1] - place[0])) if len(place) > 1 else _WIDTH
    weights: Numbers = np.exp(-0.5 * ((place[:, None] - place[None, :]) / width) ** 2)
    result: Numbers = (weights @ values) / weights.sum(1)
    return result


def read(tried: Sequence[float], losses: Sequence[float], start: float) -> Reading:
    """What a range test from the loss `start` on says; `losses` are finite, one for each of `tried`."""
    if len(losses) < _FEWEST:
        return Reading(tuple(losses), None, "the loss was not finite almost at once")
    curve = smoothed(tried, losses)
    lowest = int(curve.argmin())
    fall = start - float(curve[lowest])
    noise = float(np.std(np.asarray(losses)[: lowest + 1] - curve[: lowest + 1]))
    if fall < max(_LEAST_FALL * abs(start), _NOISES * noise):
        return Reading(tuple(curve.tolist()), None, "the loss has no clear minimum")
    turning = float(tried[lowest])
    rate = float(f"{turning / _MARGIN:.2e}")  # three digits, so that people can write it down
    rule = f"a tenth of {turning:.2e}, where the smoothed loss is lowest ({start:.3f} to {float(curve[lowest]):.3f})"
    return Reading(tuple(curve.tolist()), rate, rule)
