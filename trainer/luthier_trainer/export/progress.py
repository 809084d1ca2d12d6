"""How far an export is."""

from luthier.v1 import event_pb2
from luthier_trainer.report import Reporter

_STEPS = 100


class Progress:
    """Reports what is done of a phase, at its start and end and each hundredth between."""

    def __init__(self, reporter: Reporter, phase: event_pb2.Phase.ValueType, unit: str = "bytes") -> None:
        self._reporter = reporter
        self._phase = phase
        self._unit = unit
        self._told = -1

    def __call__(self, completed: int, total: int) -> None:
        """`completed` of `total` are done; 0 for a total that is not known."""
        share = completed * _STEPS // total if total else completed
        if share == self._told and completed != total:
            return
        if completed == total and self._told == _STEPS:
            return
        self._told = share
        self._reporter.report(
            event_pb2.PhaseProgressed(phase=self._phase, completed=completed, total=total, unit=self._unit)
        )
