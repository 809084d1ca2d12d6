"""One writer at a time, where the system has advisory locks."""

from typing import IO

try:
    import fcntl
except ImportError:  # Windows, which refuses a second writer by itself in most cases
    fcntl = None  # type: ignore[assignment]


def lock_or_refuse(file: IO[bytes], message: str) -> None:
    """Takes the lock of an open file, for as long as it is open. Raises FileExistsError with the message when another
    has it."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FileExistsError(message) from None
