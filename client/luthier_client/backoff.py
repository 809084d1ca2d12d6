"""How long to wait before the next try."""

import random
from dataclasses import dataclass, field


@dataclass
class Backoff:
    """Doubles from `first` to `limit` seconds; each wait is drawn from its upper half, so that clients spread."""

    first: float = 0.1
    limit: float = 5.0
    _bound: float = field(default=0.0, init=False)

    def next(self) -> float:
        """The seconds to wait now."""
        self._bound = min(self.limit, self._bound * 2 or self.first)
        return self._bound * random.uniform(0.5, 1.0)

    def reset(self) -> None:
        """Starts again from `first`: the other side works."""
        self._bound = 0.0
