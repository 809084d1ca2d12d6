"""How long a transfer is tried again."""

import time
from collections.abc import Callable

from luthier_client import errors
from luthier_client.backoff import Backoff
from luthier_client.connection import TRIES

_AWAY = {"UNREACHABLE", "CONNECTION_LOST", "SERVER_DRAINING"}


def passes(error: errors.LuthierError) -> bool:
    """Whether a transfer that broke off with this may go on: the server is away, leaving, or the stream was cut."""
    if isinstance(error, errors.Unavailable | errors.CallCancelled):
        return True
    # A connection that breaks in the middle of a frame; a bug of the server carries an ErrorInfo.
    return isinstance(error, errors.Internal) and not error.reason and "RST_STREAM" in error.message


class Persistence:
    """Whether a transfer with a server that was met goes on after it broke off: for a few tries, and while the server
    is away for as long as `patience` seconds. Counts anew with every byte that has arrived."""

    def __init__(self, patience: float = 60.0, *, passing: Callable[[errors.LuthierError], bool] = passes) -> None:
        self._patience = patience
        self._passing = passing
        self._backoff = Backoff(first=0.1, limit=2.0)
        self._left = TRIES
        self._received = -1
        self._since: float | None = None

    def met(self, received: int) -> None:
        """So many bytes have arrived."""
        if received > self._received:
            self._received, self._left, self._since = received, TRIES, None
            self._backoff.reset()

    def pause_after(self, error: errors.LuthierError) -> float:
        """The seconds to wait before the next try. Raises the error when there is none."""
        if not self._passing(error) or self._received < 0:
            raise error
        if error.reason in _AWAY:
            now = time.monotonic()
            self._since = now if self._since is None else self._since
            if now - self._since >= self._patience:
                raise error
        else:
            self._left -= 1
            if self._left <= 0:
                raise error
        return max(self._backoff.next(), min(error.retry_delay or 0.0, 5.0))
