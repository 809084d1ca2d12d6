"""Reading the curve of a range test."""

import math
import random

import pytest

from luthier_trainer import rate_curve
from luthier_trainer.rate_finder import extent


def valley(turning: float, noise: float = 0.0, count: int = 60) -> tuple[list[float], list[float]]:
    """A loss of 3 that falls by 1 up to the turning rate and explodes behind it."""
    draw = random.Random(1)
    tried = rate_curve.rates(1e-6, 1.0, count)
    losses = []
    for rate in tried:
        x = math.log10(rate / turning)
        losses.append(3 - math.exp(-0.5 * (x / 0.8) ** 2) + 4 * max(0.0, x) ** 2 + draw.gauss(0, noise))
    return tried, losses


def test_rates_grow_by_the_same_factor() -> None:
    tried = rate_curve.rates(1e-5, 1.0, 6)
    assert tried == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0])


@pytest.mark.parametrize("turning", [1e-4, 3e-3, 2e-2])
@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize("count", [24, 80])
def test_the_rate_follows_the_valley(turning: float, noise: float, count: int) -> None:
    tried, losses = valley(turning, noise, count)
    reading = rate_curve.read(tried, losses, 3.0)
    assert reading.rate is not None
    assert turning / 30 < reading.rate < turning
    assert len(reading.losses) == count


def test_a_found_rate_has_three_digits() -> None:
    rate = rate_curve.read(*valley(3e-3), 3.0).rate
    assert rate is not None
    assert rate == float(f"{rate:.2e}")


@pytest.mark.parametrize(
    "losses",
    [[3.0] * 40, [3 + random.Random(each).gauss(0, 0.2) for each in range(40)], [3 + 0.1 * e for e in range(40)]],
    ids=["flat", "noise", "rising"],
)
def test_a_curve_without_a_clear_minimum_suggests_nothing(losses: list[float]) -> None:
    reading = rate_curve.read(rate_curve.rates(1e-5, 1.0, len(losses)), losses, 3.0)
    assert reading.rate is None
    assert reading.rule == "the loss has no clear minimum"


def test_a_loss_that_is_not_finite_at_once_suggests_nothing() -> None:
    reading = rate_curve.read([1e-5, 2e-5], [3.0, 2.9], 3.0)
    assert reading.rate is None
    assert reading.losses == (3.0, 2.9)
    assert rate_curve.read([], [], math.nan).rate is None


@pytest.mark.parametrize(
    ("steps", "batch", "expected"),
    [
        (10_000, 16, (80, 16)),
        (400, 16, (80, 16)),
        (200, 16, (40, 16)),
        (60, 16, (24, 8)),
        (10, 4, (24, 4)),
        (3, 1, (24, 1)),
    ],
)
def test_the_test_takes_a_fifth_of_the_job_or_24_mini_steps(steps: int, batch: int, expected: tuple[int, int]) -> None:
    assert extent(steps, batch) == expected
