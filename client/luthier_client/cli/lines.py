"""A watch as plain lines, for pipes and logs."""

import time
from collections.abc import Callable
from datetime import datetime

from luthier.v1.event_pb2 import AttemptStarted, JobEvent, LearningRateFound, LogLevel, Phase, ResumeChecked
from luthier.v1.job_pb2 import JobState
from luthier_client import enums
from luthier_client.cli import output, reports
from luthier_client.cli.picture import JobPicture
from luthier_client.cli.proof import proof_line


class LineWriter:
    """Writes an event a line; of steps and of a phase's progress one in `interval` seconds, and always the last."""

    def __init__(
        self,
        picture: JobPicture,
        write: Callable[[str], None],
        interval: float = 1.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._picture = picture
        self._write = write
        self._interval = interval
        self._now = now
        self._series = ""
        self._written_at = 0.0
        self._held: str | None = None

    def add(self, event: JobEvent) -> None:
        """Takes the next event, which the picture has taken already."""
        text = describe(event, self._picture)
        if text is None:
            return
        line = f"{_clock(event)}  {text}"
        series = _series(event)
        if series and series == self._series and self._now() - self._written_at < self._interval:
            self._held = line
            return
        if series != self._series:
            self.flush()
        self._held = None
        self._series, self._written_at = series, self._now()
        self._write(line)

    def flush(self) -> None:
        """Writes the line that was held back, if there is one."""
        if self._held is not None:
            self._write(self._held)
            self._held = None


def _series(event: JobEvent) -> str:
    """What the event is one of many of; empty for an event that stands alone."""
    kind = event.WhichOneof("payload")
    if kind == "phase_progressed":
        return f"phase {event.phase_progressed.phase}"
    return "steps" if kind == "step_completed" else ""


def describe(event: JobEvent, picture: JobPicture) -> str | None:
    """An event in one line; None for one that says nothing to people."""
    kind = event.WhichOneof("payload")
    if kind == "state_changed":
        change = event.state_changed
        text = enums.short(JobState.DESCRIPTOR, change.state)
        detail = change.message or change.reason
        return output.clean(f"{text}  ({detail})" if detail else text)
    if kind == "attempt_started":
        return _attempt(event.attempt_started, picture.discarded)
    if kind == "resume_checked":
        return resumed(event.resume_checked)
    if kind == "plan_resolved":
        plan = event.plan_resolved
        return output.clean(
            f"plan  {plan.device} {plan.dtype} {plan.attention}, {plan.total_steps:,} steps, "
            f"{plan.trained_parameters:,} of {plan.base_parameters + plan.trained_parameters:,} weights trained"
        )
    if kind == "phase_progressed":
        phase = event.phase_progressed
        done = ""
        if phase.total and phase.completed:
            done = f" {output.done_of(phase.completed, phase.total, phase.unit)}"
        return output.clean(enums.short(Phase.DESCRIPTOR, phase.phase).replace("_", " ") + done)
    if kind == "learning_rate_found":
        return f"learning rate  {found_rate(event.learning_rate_found)}"
    if kind == "step_completed":
        row = event.step_completed
        eta = picture.eta()
        return (
            f"step {row.step}/{row.total_steps}  epoch {row.epoch:.2f}  loss {output.number(row.loss)}  "
            f"lr {row.learning_rate:.1e}  {row.tokens_per_second:,.0f} tokens/s"
            + (f"  eta {output.duration(eta)}" if eta else "")
        )
    if kind == "evaluation_completed":
        result = event.evaluation_completed
        return (
            f"evaluation at step {result.step}  loss {output.number(result.loss)}  accuracy {result.token_accuracy:.1%}"
        )
    if kind == "samples_generated":
        count = len(event.samples_generated.samples)
        return f"{count} sample{'s' if count != 1 else ''} at step {event.samples_generated.step}"
    if kind == "checkpoint_saved":
        saved = event.checkpoint_saved
        return output.clean(f"checkpoint {saved.name}  {output.size(saved.size_bytes)}")
    if kind == "log_emitted":
        return log_line(event)
    if kind == "datasets_checked":
        return f"checked  {reports.checked_line(event.datasets_checked)}"
    if kind == "export_proven":
        return proof_line(event.export_proven.proof)
    return None


def resumed(check: ResumeChecked) -> str:
    """What the check of a training that goes on has found."""
    if check.verified:
        return (
            f"resume verified at step {check.step}  loss {output.number(check.recorded_loss)}, the same to the last bit"
        )
    return output.clean(
        f"resume NOT verified at step {check.step}  loss {check.recorded_loss:.9g} was saved, "
        f"{check.recomputed_loss:.9g} is computed now: {check.message}"
    )


def found_rate(found: LearningRateFound) -> str:
    """What a range test found, and how."""
    return output.clean(f"{found.learning_rate:.2e}: {found.rule}")


def _attempt(start: AttemptStarted, discarded: int) -> str:
    text = f"attempt {start.attempt}"
    if start.resumed_from_step:
        text += f" goes on from step {start.resumed_from_step}"
    elif start.attempt > 1:
        text += " starts from the beginning"
    if discarded:
        text += f", {discarded} step{'s' if discarded != 1 else ''} made again"
    return output.clean(f"{text}  ({start.reason})" if start.attempt > 1 else text)


def log_line(event: JobEvent) -> str:
    """A line for people, with its level unless it is merely informative."""
    level = enums.short(LogLevel.DESCRIPTOR, event.log_emitted.level)
    return output.clean(event.log_emitted.message if level == "info" else f"{level}: {event.log_emitted.message}")


def _clock(event: JobEvent) -> str:
    return datetime.fromtimestamp(event.event_time.seconds).strftime("%H:%M:%S")
