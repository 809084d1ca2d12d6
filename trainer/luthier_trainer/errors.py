"""Why training cannot go on, for programs and for people."""

from luthier.trainer.v1 import report_pb2
from luthier.v1 import job_pb2


class TrainingError(Exception):
    """Ends an attempt with a Failed report.

    reason: a stable name in capitals, such as LOSS_NOT_FINITE; message: what happened, in a sentence; hint: what to try
    next; retryable: whether another attempt of the same task could do better. Picklable.
    """

    def __init__(self, reason: str, message: str, hint: str = "", retryable: bool = False) -> None:
        super().__init__(reason, message, hint, retryable)
        self.reason = reason
        self.message = message
        self.hint = hint
        self.retryable = retryable

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}" + (f" ({self.hint})" if self.hint else "")

    def to_failed(self) -> report_pb2.Failed:
        """The last report of an attempt that ended so."""
        error = job_pb2.JobError(reason=self.reason, message=self.message, hint=self.hint)
        return report_pb2.Failed(error=error, retryable=self.retryable)
