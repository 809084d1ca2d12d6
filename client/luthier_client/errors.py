"""What can go wrong, as one tree.

    LuthierError
    ├── InvalidSpec            INVALID_ARGUMENT: something in the request breaks a rule; see `violations`
    │   └── InvalidDataset     the rows of an upload were refused; see `findings` and `lines`
    ├── SpecFileError          a job file or a --set that does not fit the contract (found here, nothing was sent)
    ├── NotFound               NOT_FOUND
    ├── AlreadyExists          ALREADY_EXISTS
    ├── FailedPrecondition     FAILED_PRECONDITION: not in this state
    ├── ResourceExhausted      RESOURCE_EXHAUSTED: a queue, a quota or a disk is full
    ├── Unavailable            UNAVAILABLE: nobody answers, or the server is leaving
    ├── TlsFailed              no connection that can be trusted: the certificate, its name, or no TLS at all
    ├── DeadlineExceeded       DEADLINE_EXCEEDED: no answer within the timeout
    ├── OutOfRange             OUT_OF_RANGE: a position below retention or past head
    ├── Aborted                ABORTED
    ├── CallCancelled          CANCELLED by the other side
    ├── Unimplemented          UNIMPLEMENTED: the server is older than this client
    ├── Unauthenticated        UNAUTHENTICATED: the server wants a token, or another one
    ├── PermissionDenied       PERMISSION_DENIED
    ├── DataLoss               DATA_LOSS: the server's store is damaged
    ├── Internal               INTERNAL and everything else
    ├── SequenceGap            a watch that is not dense: never seen with a sound server
    ├── DownloadDamaged        a download that is not what its manifest says
    ├── JobFailed              raised by `wait(check=True)`
    └── JobCancelled           raised by `wait(check=True)`

This module imports neither grpc nor generated code, so that catching an error costs nothing. Every
error can be pickled.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from luthier.v1.job_pb2 import Job


class LuthierError(Exception):
    """An error with a stable name.

    message: a sentence for people. reason: the stable name, such as `REQUEST_ID_REUSED`. code: the gRPC status name, or
    empty when the error was found on this side. metadata: the server's further facts. violations: (field or subject,
    description). retry_delay: seconds after which the server suggests to try again, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        code: str = "",
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[tuple[str, str]] = (),
        retry_delay: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.code = code
        self.metadata = dict(metadata or {})
        self.violations = list(violations)
        self.retry_delay = retry_delay

    @property
    def hint(self) -> str:
        """What to try next; empty when nobody knows."""
        return self.metadata.get("hint", "")


class InvalidSpec(LuthierError):
    """Something in the request breaks a rule; `violations` names every one at once."""


class InvalidDataset(InvalidSpec):
    """The rows of an upload were refused. `violations` describes the first of them."""

    @property
    def findings(self) -> int:
        """How many findings there are in all."""
        return int(self.metadata.get("findings") or len(self.violations))

    @property
    def lines(self) -> list[int]:
        """The numbers of the lines with findings, from 1; the server names the first hundred at most."""
        return [int(number) for number in self.metadata.get("lines", "").split(",") if number.strip().isdigit()]


class SpecFileError(LuthierError):
    """A job file or a `--set` does not fit the contract; `violations` holds (place, description)."""


class NotFound(LuthierError):
    """There is no such thing."""


class AlreadyExists(LuthierError):
    """It exists with another content."""


class FailedPrecondition(LuthierError):
    """It is not in a state that allows this."""


class ResourceExhausted(LuthierError):
    """A queue, a quota or a disk is full."""


class Unavailable(LuthierError):
    """Nobody answers at the endpoint, or the server is leaving."""


class TlsFailed(LuthierError):
    """There is no connection that can be trusted: trying again does not help."""


class DeadlineExceeded(LuthierError):
    """No answer within the timeout."""


class OutOfRange(LuthierError):
    """The position is below retention or past the head."""


class Aborted(LuthierError):
    """The server gave the call up, for example because its reader was too slow."""


class CallCancelled(LuthierError):
    """The other side cancelled the call."""


class Unimplemented(LuthierError):
    """The server does not know this method."""


class Unauthenticated(LuthierError):
    """The server does not know who asks: it wants a token, or another one. `hint` says how to give it."""


class PermissionDenied(LuthierError):
    """Whoever asks may not."""


class DataLoss(LuthierError):
    """The server's store is damaged."""


class Internal(LuthierError):
    """A bug or an unknown failure of the server."""


class SequenceGap(LuthierError):
    """A watch brought another sequence than the next one."""

    def __init__(self, message: str, *, expected: int = 0, received: int = 0) -> None:
        super().__init__(message, reason="SEQUENCE_GAP")
        self.expected = expected
        self.received = received


class DownloadDamaged(LuthierError):
    """A download is not what its manifest says, or its manifest names a path that no download may write."""


class JobFailed(LuthierError):
    """The job ended with an error; `job` is its last state."""

    def __init__(self, job: "Job") -> None:
        text = job.error.message or "the job failed"
        super().__init__(f"{job.id} failed: {text}", reason=job.error.reason, metadata={"hint": job.error.hint})
        self.job = job

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.job,))


class JobCancelled(LuthierError):
    """The job was cancelled; `job` is its last state."""

    def __init__(self, job: "Job") -> None:
        super().__init__(f"{job.id} was cancelled", reason="CANCELLED")
        self.job = job

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.job,))
