"""Numbers from samples."""

import statistics
from collections.abc import Sequence


def quantile(samples: Sequence[float], share: float) -> float:
    """The smallest sample that at least `share` of all do not exceed (nearest rank). Raises ValueError for none."""
    if not samples:
        raise ValueError("no samples")
    ordered = sorted(samples)
    rank = -(-share * len(ordered) // 1)
    return ordered[min(max(int(rank), 1), len(ordered)) - 1]


def median(samples: Sequence[float]) -> float:
    """The middle sample, or the mean of the middle two."""
    return statistics.median(samples)
