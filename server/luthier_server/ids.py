"""Ids that sort by time: a prefix and a ULID (https://github.com/ulid/spec), never below the last one handed out."""

import os
from collections.abc import Callable

from luthier_server import failpoints

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_LENGTH = 26


def _encode(value: int) -> str:
    digits = []
    for _ in range(_LENGTH):
        value, digit = divmod(value, 32)
        digits.append(_ALPHABET[digit])
    return "".join(reversed(digits))


def _decode(text: str) -> int:
    value = 0
    for char in text:
        value = value * 32 + _ALPHABET.index(char)
    return value


class Ids:
    """Hands out ids that grow, also when the clock jumps back or two fall into one millisecond."""

    def __init__(self, last: str = "", clock: Callable[[], float] = failpoints.wall_clock) -> None:
        """`last` is the newest id that the store holds, with or without its prefix."""
        self._last = _decode(last.rpartition("_")[2]) if last else 0
        self._clock = clock

    def new(self, prefix: str) -> str:
        """A new id such as `job_01J...`."""
        value = (int(self._clock() * 1000) << 80) | int.from_bytes(os.urandom(10))
        self._last = value if value > self._last else self._last + 1
        return f"{prefix}_{_encode(self._last)}"
