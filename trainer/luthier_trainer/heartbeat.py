"""The heartbeat: a thread that reports life while the main thread is busy."""

import sys
import threading
from types import TracebackType

from luthier.trainer.v1 import report_pb2
from luthier_trainer.errors import TrainingError
from luthier_trainer.report import Reporter


class Heartbeat:
    """Reports a Heartbeat every `seconds` inside the `with`; none after it, so that the last report stays last."""

    def __init__(self, reporter: Reporter, seconds: float) -> None:
        self._reporter = reporter
        self._seconds = seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._over.wait(self._seconds):
            try:
                self._reporter.report(report_pb2.Heartbeat())
            except TrainingError as error:  # a full disk; the training thread meets it with its own next report
                sys.stderr.write(f"heartbeat not reported: {error}\n")
