"""The one tree of errors that the domain raises; `grpc/boundary.py` maps it to status codes.

LuthierError
+-- InvalidArgument          what was asked breaks a rule
|   +-- MalformedRequest     the bytes do not decode
|   +-- DatasetInvalid       the rows of a dataset break a rule
+-- NotFound                 no such thing, or another tenant's
+-- AlreadyExists            the name or id is taken
+-- FailedPrecondition       not in this state
|   +-- ForeignHistory       a position of another store
+-- OutOfRange               a position that does not exist (any more)
+-- Exhausted                a limit is reached
|   +-- StorageFull          the disk is
+-- Aborted
|   +-- SlowConsumer         a watcher did not read
+-- Unavailable              try again
|   +-- StoreBusy
|   +-- Draining
+-- Unauthenticated          no token where one is needed
|   +-- BadToken             one that opens nothing
+-- StoreCorrupt             the database is damaged
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


def sentences(message: str, advice: str) -> str:
    """A message and what to do about it, as one text."""
    if not advice:
        return message
    return f"{message}{'' if message.endswith(('.', '!', '?', ':')) else '.'} {advice[0].upper()}{advice[1:]}"


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken rule: the path of the field, and what is wrong with it."""

    field: str
    description: str


@dataclass(frozen=True, slots=True)
class Obstacle:
    """One thing that is in the way: a stable name for what it is, which one, and what to do about it."""

    kind: str
    subject: str
    description: str


class LuthierError(Exception):
    """An error that its reader can act on. `reason` is stable, `message` is for people."""

    reason = "INTERNAL"

    def __init__(self, message: str, *, reason: str = "", metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or type(self).reason
        self.metadata = dict(metadata or {})


class InvalidArgument(LuthierError):
    """What was asked breaks a rule; `violations` names every one."""

    reason = "INVALID_ARGUMENT"

    def __init__(
        self,
        message: str,
        violations: Sequence[Violation] = (),
        *,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, reason=reason, metadata=metadata)
        self.violations = tuple(violations)


class MalformedRequest(InvalidArgument):
    """The bytes do not decode as the request's message."""

    reason = "MALFORMED_REQUEST"


class DatasetInvalid(InvalidArgument):
    """Rows of a dataset break a rule."""

    reason = "DATASET_INVALID"


class NotFound(LuthierError):
    """There is no such thing, or it belongs to another tenant."""

    reason = "NOT_FOUND"

    def __init__(self, kind: str, name: str, hint: str = "") -> None:
        super().__init__(f"there is no {kind} '{name}'" + (f": {hint}" if hint else ""))
        self.reason = f"{kind.upper().replace(' ', '_')}_NOT_FOUND"
        self.kind = kind
        self.name = name


class AlreadyExists(LuthierError):
    """The name or id is taken by something else."""

    reason = "ALREADY_EXISTS"

    def __init__(self, message: str, *, kind: str, name: str, reason: str = "") -> None:
        super().__init__(message, reason=reason)
        self.kind = kind
        self.name = name


class FailedPrecondition(LuthierError):
    """Not possible in this state; `subject` names what is in the way, or `obstacles` all that is."""

    reason = "FAILED_PRECONDITION"

    def __init__(
        self,
        message: str,
        *,
        subject: str,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        obstacles: Sequence[Obstacle] = (),
    ) -> None:
        super().__init__(message, reason=reason, metadata=metadata)
        self.subject = subject
        self.obstacles = tuple(obstacles) or (Obstacle(self.reason, subject, message),)


class ForeignHistory(FailedPrecondition):
    """A resume position that belongs to another incarnation of the store."""

    reason = "FOREIGN_HISTORY"


class OutOfRange(LuthierError):
    """A position that does not exist, or exists no more."""

    reason = "OUT_OF_RANGE"


class Exhausted(LuthierError):
    """A limit is reached; `subject` is what is limited."""

    reason = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, *, subject: str, reason: str = "", retry_seconds: float = 0) -> None:
        super().__init__(message, reason=reason)
        self.subject = subject
        self.retry_seconds = retry_seconds


class StorageFull(Exhausted):
    """There is no room on the disk."""

    reason = "STORAGE_FULL"

    def __init__(self, message: str = "the disk of the data directory is full: make room and try again") -> None:
        super().__init__(message, subject="disk", retry_seconds=30)


class Aborted(LuthierError):
    """Ended by the server, can be tried again from where it ended."""

    reason = "ABORTED"


class SlowConsumer(Aborted):
    """A watcher did not read for too long."""

    reason = "SLOW_CONSUMER"


class Unavailable(LuthierError):
    """Not now; try again after `retry_seconds`."""

    reason = "UNAVAILABLE"

    def __init__(self, message: str, *, reason: str = "", retry_seconds: float = 1) -> None:
        super().__init__(message, reason=reason)
        self.retry_seconds = retry_seconds


class StoreBusy(Unavailable):
    """The database stayed locked past its timeout."""

    reason = "STORE_BUSY"


class Draining(Unavailable):
    """The server is stopping."""

    reason = "SERVER_DRAINING"

    def __init__(self) -> None:
        super().__init__("the server is stopping: try again in a moment", retry_seconds=1)


class Unauthenticated(LuthierError):
    """Who asks has not shown a token."""

    reason = "UNAUTHENTICATED"


class BadToken(Unauthenticated):
    """The token is none of this server's."""

    reason = "BAD_TOKEN"


class StoreCorrupt(LuthierError):
    """The database is damaged."""

    reason = "STORE_CORRUPT"
