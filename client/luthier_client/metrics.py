"""What a job's log says about its losses, once the steps that a retry threw away are gone."""

from collections.abc import Iterable
from dataclasses import dataclass

from luthier.v1.event_pb2 import EvaluationCompleted, JobEvent, StepCompleted


@dataclass(frozen=True)
class Metrics:
    """The rows of a training, each series ordered by step."""

    steps: list[StepCompleted]
    evaluations: list[EvaluationCompleted]


class MetricsFold:
    """Folds a log, event by event.

    A retry goes on from a checkpoint: its `AttemptStarted.discarded_from_step` takes back every later step, and the
    rows of the new attempt take their place.
    """

    def __init__(self) -> None:
        self._steps: dict[int, StepCompleted] = {}
        self._evaluations: dict[int, EvaluationCompleted] = {}

    def add(self, event: JobEvent) -> None:
        """Takes the next event."""
        kind = event.WhichOneof("payload")
        if kind == "step_completed":
            self._steps[event.step_completed.step] = event.step_completed
        elif kind == "evaluation_completed":
            self._evaluations[event.evaluation_completed.step] = event.evaluation_completed
        elif kind == "attempt_started":
            last = event.attempt_started.discarded_from_step
            self._steps = {step: row for step, row in self._steps.items() if step <= last}
            self._evaluations = {step: row for step, row in self._evaluations.items() if step <= last}

    def metrics(self) -> Metrics:
        """The rows so far."""
        return Metrics(
            steps=[self._steps[step] for step in sorted(self._steps)],
            evaluations=[self._evaluations[step] for step in sorted(self._evaluations)],
        )


def fold(events: Iterable[JobEvent]) -> Metrics:
    """The rows of a whole log."""
    folding = MetricsFold()
    for event in events:
        folding.add(event)
    return folding.metrics()
