"""Which rows go where, by a hash of each: in memory are 8 bytes a row and a bounded number of Python objects."""

from array import array
from collections import Counter
from collections.abc import Callable, Iterator

MAX_COUNTED_AT_ONCE = 500_000
MAX_SKIPPED = 1_000

_BINS = 65_536
_SHIFT = 48


def smallest(keys: "array[int]", count: int) -> Callable[[int], bool]:
    """Says of each key in turn whether it is among the `count` smallest; of equal keys the first ones are. Keys are 64
    bits, and count is at most their number."""
    last, spare = -1, 0
    taken = 0
    for key, size in _groups(keys):
        last, spare = key, count - taken
        taken += size
        if taken >= count:
            break

    def take(key: int) -> bool:
        nonlocal spare
        if key == last and spare > 0:
            spare -= 1
            return True
        return key < last

    return take


def smallest_groups(keys: "array[int]", count: int) -> Callable[[int], bool] | None:
    """Says of a key whether it is among about `count` small ones, where equal keys stay together: group by group, from
    the smallest key, as long as they fit; those that are too large are passed over (MAX_SKIPPED at most). At least one
    group is in and one is out; None when all keys are equal. Keys are 64 bits, and there are two or more."""
    last = -1
    taken = groups = 0
    skipped: set[int] = set()
    least = (len(keys) + 1, -1)  # the smallest of those that were passed over: its size and key
    for key, size in _groups(keys):
        groups += 1
        if taken + size <= count:
            taken += size
            last = key
            if taken == count:
                break
        else:
            skipped.add(key)
            least = min(least, (size, key))
            if len(skipped) == MAX_SKIPPED:
                break
    if not taken:
        _, only = least
        return None if groups == 1 else lambda key: key == only
    return lambda key: key <= last and key not in skipped


def _groups(keys: "array[int]") -> Iterator[tuple[int, int]]:
    """Each key and how often it is there, ascending."""
    bins = Counter(key >> _SHIFT for key in keys)
    low = size = 0
    for high in range(1, _BINS + 1):
        size += bins[high - 1]
        if size and (high == _BINS or size + bins[high] > MAX_COUNTED_AT_ONCE):
            yield from sorted(Counter(key for key in keys if low <= key >> _SHIFT < high).items())
            low, size = high, 0
