"""What is known of a job at one moment, folded from its events: the live view and the closing card draw this."""

import time
from collections import deque
from typing import Any

from luthier.v1.event_pb2 import (
    LOG_LEVEL_ERROR,
    LOG_LEVEL_WARNING,
    DatasetsChecked,
    JobEvent,
    LearningRateFound,
    Phase,
    PhaseProgressed,
    PlanResolved,
    ResumeChecked,
    SamplesGenerated,
    StepCompleted,
)
from luthier.v1.export_proof_pb2 import ExportProof
from luthier.v1.job_pb2 import JOB_STATE_PAUSED, JOB_STATE_QUEUED, Job, JobError, JobState
from luthier_client import enums
from luthier_client.cli import output
from luthier_client.exports import describe
from luthier_client.metrics import Metrics, MetricsFold
from luthier_client.watch import is_terminal

_RATE_STEPS = 20


class JobPicture:
    """Filled event by event in one thread; others may read it at any time."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.state: JobState.ValueType = job.state
        self.reason = ""
        self.message = ""
        self.error: JobError | None = None
        self.model_id = job.model_id
        self.export_id = job.export_id
        self.proof: ExportProof | None = None
        """Of an export job, once it was compared."""
        self.attempt = job.attempt
        self.queue_position = job.queue_position
        self.retry_at = float(job.retry_time.seconds)
        """When a lost attempt is tried again, in seconds since 1970; 0 when nothing is waited for."""
        self.discarded = 0
        """Steps that the newest attempt makes again."""
        self.resumed: ResumeChecked | None = None
        self.checked: DatasetsChecked | None = None
        self.plan: PlanResolved | None = None
        self.found_rate: LearningRateFound | None = None
        self.phase: PhaseProgressed | None = None
        self.samples: dict[int, SamplesGenerated] = {}
        self.notice = ""
        self.warning = ""
        self.sequence = 0
        self._folding = MetricsFold()
        self._times: deque[tuple[int, float]] = deque(maxlen=_RATE_STEPS)
        self._started: float | None = None
        self._last = 0.0
        self._last_seen = time.monotonic()
        self._metrics = Metrics([], [])

    @property
    def name(self) -> str:
        """What the job is called: what it exports, else its display name, else its id."""
        return self.exports or self.job.spec.display_name or self.job.id

    @property
    def exports(self) -> str:
        """Of an export job what it writes: `gguf q4_k_m of model_...`; else empty."""
        if not self.job.spec.HasField("export"):
            return ""
        return f"{describe(self.job.spec.export)} of {self.job.spec.export.model}"

    @property
    def state_name(self) -> str:
        """The state in lower case."""
        return enums.short(JobState.DESCRIPTOR, self.state)

    @property
    def ended(self) -> bool:
        """Whether nothing follows."""
        return is_terminal(self.state)

    @property
    def metrics(self) -> Metrics:
        """The rows so far, without those that a retry threw away."""
        return self._metrics

    @property
    def step(self) -> StepCompleted | None:
        """The newest step."""
        return self._metrics.steps[-1] if self._metrics.steps else None

    @property
    def total_steps(self) -> int:
        """Steps in all; 0 when unknown."""
        if self.step is not None:
            return self.step.total_steps
        return self.plan.total_steps if self.plan is not None else 0

    def add(self, event: JobEvent) -> None:
        """Takes the next event."""
        self.sequence = event.sequence
        self.notice = ""
        when = event.event_time.seconds + event.event_time.nanos / 1e9
        self._last, self._last_seen = when, time.monotonic()
        payload = event.WhichOneof("payload")
        if payload == "state_changed":
            self._change(event.state_changed)
        elif payload == "attempt_started":
            reached = self.step.step if self.step is not None else 0
            self.proof = None
            self.discarded = max(0, reached - event.attempt_started.discarded_from_step)
            self.attempt = event.attempt_started.attempt
            self.resumed = None
            self.queue_position = 0
            self.phase = None
            self._times.clear()
            self._started = self._started or when
        elif payload == "plan_resolved":
            self.plan = event.plan_resolved
        elif payload == "learning_rate_found":
            self.found_rate = event.learning_rate_found
            self.phase = None
        elif payload == "datasets_checked":
            self.checked = event.datasets_checked
        elif payload == "phase_progressed":
            self.phase = event.phase_progressed
        elif payload == "export_proven":
            self.proof = event.export_proven.proof
        elif payload == "resume_checked":
            self.resumed = event.resume_checked
        elif payload == "samples_generated":
            self.samples.pop(event.samples_generated.step, None)  # the newest is last, whatever its step
            self.samples[event.samples_generated.step] = event.samples_generated
        elif payload == "log_emitted" and event.log_emitted.level in (LOG_LEVEL_WARNING, LOG_LEVEL_ERROR):
            self.warning = event.log_emitted.message
        if payload == "step_completed":
            self.phase = None
            self._times.append((event.step_completed.step, when))
        if payload in ("step_completed", "evaluation_completed", "attempt_started"):
            self._folding.add(event)
            self._metrics = self._folding.metrics()

    def seconds(self) -> float:
        """Seconds since the first attempt started, by the server's clock and this one's since its last word."""
        if self._started is None:
            return 0.0
        since = 0.0 if self.ended else time.monotonic() - self._last_seen
        return self._last - self._started + since

    def eta(self) -> float | None:
        """Seconds until the last step at the pace of the newest ones; None when unknown."""
        if self.step is None or len(self._times) < 2 or self.ended or self.notice:
            return None
        (first, began), (last, ended) = self._times[0], self._times[-1]
        if last <= first or ended <= began:
            return None
        left = (self.total_steps - last) * (ended - began) / (last - first)
        return max(0.0, left - (time.monotonic() - self._last_seen))

    def activity(self) -> str:
        """What the job is busy with, in a few words."""
        if self.state == JOB_STATE_QUEUED and self.retry_at:
            left = self.retry_at - time.time()
            when = f"at {output.clock(self.retry_at)}" if left > 0 else "now"
            return f"tries again {when}" + (f", in {output.duration(left)}" if left > 0 else "")
        if self.state == JOB_STATE_PAUSED:
            return f"paused: {output.one_line(self.message, 100)}" if self.message else "paused until it is resumed"
        if self.state == JOB_STATE_QUEUED:
            place = f", position {self.queue_position}" if self.queue_position else ""
            return f"queued{place}"
        if self.phase is None or self.ended:
            return self.state_name
        name = enums.short(Phase.DESCRIPTOR, self.phase.phase).replace("_", " ")
        if not self.phase.total:
            return name
        return f"{name} {output.done_of(self.phase.completed, self.phase.total, self.phase.unit)}"

    def _change(self, change: Any) -> None:
        self.state = change.state
        self.reason, self.message = change.reason, change.message
        self.retry_at = 0.0
        self.phase = None
        if change.HasField("error"):
            self.error = change.error
        self.model_id = change.model_id or self.model_id
        self.export_id = change.export_id or self.export_id
