"""Progress for a person at a terminal, a line an event."""

import sys
import threading
from typing import TextIO

from luthier.v1 import event_pb2, export_proof_pb2
from luthier_trainer.report import Payload

_LEVELS = {event_pb2.LOG_LEVEL_WARNING: "warning: ", event_pb2.LOG_LEVEL_ERROR: "error: "}


class ConsoleReporter:
    """Writes what matters of each report as a line. Safe to call from several threads."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._lock = threading.Lock()

    def report(self, payload: Payload, *, durable: bool = False) -> None:
        line = _line(payload)
        if line:
            with self._lock:
                self._stream.write(line + "\n")
                self._stream.flush()


def _line(payload: Payload) -> str:
    """The payload in a line; empty for what a person does not wait for."""
    if isinstance(payload, event_pb2.PlanResolved):
        return (
            f"training {payload.trained_parameters:,} weights on {payload.training_rows} rows, {payload.total_steps} "
            f"steps ({payload.device}, {payload.dtype}, {payload.attention})"
        )
    if isinstance(payload, event_pb2.StepCompleted):
        return (
            f"step {payload.step}/{payload.total_steps}  loss {payload.loss:.4f}  rate {payload.learning_rate:.2e}  "
            f"{payload.tokens_per_second:,.0f} tokens/s"
        )
    if isinstance(payload, event_pb2.EvaluationCompleted):
        return (
            f"evaluation at step {payload.step}: loss {payload.loss:.4f}, perplexity {payload.perplexity:.2f}, "
            f"accuracy {payload.token_accuracy:.1%}"
        )
    if isinstance(payload, event_pb2.SamplesGenerated):
        return "\n".join(f"  {each.prompt!r} -> {each.completion!r}" for each in payload.samples)
    if isinstance(payload, event_pb2.LearningRateFound):
        return f"learning rate {payload.learning_rate:.2e}: {payload.rule}"
    if isinstance(payload, event_pb2.CheckpointSaved):
        return f"checkpoint {payload.directory} saved"
    if isinstance(payload, event_pb2.ExportProven):
        return "\n".join(_check(each) for each in payload.proof.checks)
    if isinstance(payload, event_pb2.LogEmitted):
        return _LEVELS.get(payload.level, "") + payload.message
    return ""


def _check(check: export_proof_pb2.ProofCheck) -> str:
    return f"{'ok' if check.passed else 'FAILED'}  {check.name.lower()}: {check.message}"


class SilentReporter:
    """For those who look at the result alone."""

    def report(self, payload: Payload, *, durable: bool = False) -> None:
        return None
