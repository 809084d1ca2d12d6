"""How fast training goes."""

import time
from collections import deque
from collections.abc import Callable


class Throughput:
    """Real tokens a second over the last `window` seconds of steps; evaluations and saves between steps do not
    count."""

    def __init__(self, window: float = 10.0, clock: Callable[[], float] = time.perf_counter) -> None:
        self._window = window
        self._clock = clock
        self._steps: deque[tuple[float, int, float]] = deque()
        self._started = 0.0

    def start(self) -> None:
        """A step begins."""
        self._started = self._clock()

    def stop(self, tokens: int, operations: float = 0.0) -> float:
        """A step of so many tokens and floating-point operations ends. Returns its seconds."""
        seconds = self._clock() - self._started
        self._steps.append((seconds, tokens, operations))
        while len(self._steps) > 1 and self._seconds - self._steps[0][0] >= self._window:
            self._steps.popleft()
        return seconds

    @property
    def _seconds(self) -> float:
        return sum(seconds for seconds, _, _ in self._steps)

    @property
    def tokens_per_second(self) -> float:
        """0 before the first step."""
        seconds = self._seconds
        return sum(tokens for _, tokens, _ in self._steps) / seconds if seconds else 0.0

    @property
    def operations_per_second(self) -> float:
        """0 before the first step."""
        seconds = self._seconds
        return sum(operations for _, _, operations in self._steps) / seconds if seconds else 0.0
