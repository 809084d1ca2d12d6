"""What a trainer reports, in lines: an attempt's `trainer.log`, whose end explains a trainer that was lost."""

import sys
import time

from luthier.trainer.v1.report_pb2 import Failed, Finished, Heartbeat, Stopped
from luthier.v1.event_pb2 import EvaluationCompleted, LogEmitted, StepCompleted
from luthier_trainer.report import Payload, Reporter

_STEP_SECONDS = 1.0


class Logbook:
    """A Reporter that passes everything on and writes a line about it to standard error, of steps one a second."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._last_step = 0.0

    def report(self, payload: Payload, *, durable: bool = False) -> None:
        """Reports the payload, then writes its line: what the log shows is in the spool."""
        self._reporter.report(payload, durable=durable)
        now = time.monotonic()
        if isinstance(payload, Heartbeat):
            return
        if isinstance(payload, StepCompleted):
            if now - self._last_step < _STEP_SECONDS:
                return
            self._last_step = now
        sys.stderr.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {_line(payload)}\n")
        sys.stderr.flush()


def _line(payload: Payload) -> str:
    if isinstance(payload, StepCompleted):
        speed = f"{payload.tokens_per_second:.0f} tokens/s"
        return f"step {payload.step}/{payload.total_steps} loss {payload.loss:.4f} {speed}"
    if isinstance(payload, EvaluationCompleted):
        return f"evaluation at step {payload.step}: loss {payload.loss:.4f}"
    if isinstance(payload, LogEmitted):
        return payload.message[:500]
    if isinstance(payload, Failed):
        return f"failed: {payload.error.reason}: {payload.error.message}"
    if isinstance(payload, Finished | Stopped):
        return f"{type(payload).__name__.lower()} at step {payload.step}"
    text = " ".join(str(payload).split())
    return f"{type(payload).__name__} {text}"[:200]
