"""Judges a recording, after etcd's robustness suite: ordered, unique, reliable, resumable, atomic, and a job's rules.

It shares no rule with the server: the table of states is its own, and events are compared with the reports that they
came of.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fault.recording import Answer, AttemptRow, Death, JobRow, Recording, Rows, Sightings, read_spool

from luthier.trainer.v1.report_pb2 import TrainerReport
from luthier.v1.event_pb2 import JobEvent
from luthier.v1.job_pb2 import JobState

_NEXT: Mapping[str, str] = {
    "UNSPECIFIED": "VALIDATING QUEUED",
    "VALIDATING": "QUEUED CANCELLED FAILED",
    "QUEUED": "PREPARING PAUSED CANCELLED FAILED",
    "PREPARING": "RUNNING QUEUED PAUSING CANCELLING FAILED",
    "RUNNING": "SUCCEEDED QUEUED PAUSING CANCELLING FAILED",
    "PAUSING": "PAUSED CANCELLING SUCCEEDED FAILED",
    "PAUSED": "QUEUED CANCELLED",
    "CANCELLING": "CANCELLED SUCCEEDED FAILED",
}
_ENDS = frozenset({"SUCCEEDED", "FAILED", "CANCELLED"})
_LAST_REPORTS = frozenset({"finished", "failed", "stopped"})


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was judged, and what was wrong. An event counts once in the log and once in each client's hands."""

    events: int
    violations: tuple[str, ...]


def judge(recording: Recording) -> Verdict:
    """Judges a recording whose last death was an orderly stop with every job at its end."""
    violations = list(recording.complaints)
    for death in recording.deaths:
        violations += (f"life {death.life}: {each}" for each in _rows_agree(death.rows, recording))
    violations += _append_only(recording)
    final = recording.deaths[-1].rows
    violations += _settled(final, recording)
    for watcher in recording.watchers:
        violations += (f"{watcher.watcher} of {watcher.job_id}: {each}" for each in _sightings(watcher, recording))
    violations += _answers(recording)
    events = sum(map(len, final.events.values())) + sum(len(each.seen) for each in recording.watchers)
    return Verdict(events, tuple(violations))


def _name(state: JobState.ValueType) -> str:
    return JobState.Name(state).removeprefix("JOB_STATE_")


# The rows of one moment


def _rows_agree(rows: Rows, recording: Recording) -> Iterator[str]:
    if rows.integrity != "ok":
        yield f"integrity: {rows.integrity}"
    repeated = [key for key, count in Counter(j.request_id for j in rows.jobs.values()).items() if key and count > 1]
    yield from (f"request_id {each} made several jobs" for each in repeated)
    for job in rows.jobs.values():
        log = rows.events[job.id]
        yield from (f"{job.id}: {each}" for each in _log_is_sound(job, log))
        yield from (f"{job.id}: {each}" for each in _attempts_are_sound(job, rows, log, recording))
    succeeded = [job for job in rows.jobs.values() if _name(job.state) == "SUCCEEDED"]
    models = {job.model_id: job.id for job in succeeded if not job.export_id}
    if models != rows.models:
        yield f"atomic: models {rows.models} are not those of the jobs that succeeded, {models}"
    exports = {job.export_id: job.id for job in succeeded if job.export_id}
    if exports != rows.exports:
        yield f"atomic: exports {rows.exports} are not those of the jobs that succeeded, {exports}"


def _log_is_sound(job: JobRow, log: Mapping[int, JobEvent]) -> Iterator[str]:
    if list(log) != list(range(1, len(log) + 1)):
        yield f"dense: sequences {_short(list(log))}"
    if job.last_sequence != max(log, default=0):
        yield f"atomic: the row says last_sequence {job.last_sequence}, the log {max(log, default=0)}"
    state, attempt, computed, step = "UNSPECIFIED", 0, 0, 0
    for sequence, event in log.items():
        if (event.sequence, event.job_id) != (sequence, job.id):
            yield f"row {sequence} holds event {event.sequence} of {event.job_id}"
        if state in _ENDS:
            yield f"terminal: {sequence} follows {state}"
        if event.attempt < attempt:
            yield f"ordered: {sequence} belongs to attempt {event.attempt} after one of {attempt}"
        attempt = event.attempt
        if event.HasField("state_changed"):
            before, after = _name(event.state_changed.from_state), _name(event.state_changed.state)
            if before != state:
                yield f"states: {sequence} leaves {before}, but the job was {state}"
            if after not in _NEXT.get(before, "").split():
                yield f"states: {sequence} goes from {before} to {after}"
            state = after
        elif event.HasField("step_completed"):
            if state in ("QUEUED", "PREPARING", "PAUSED"):
                yield f"states: {sequence} is a step while {state}"
            if event.step_completed.computed_tokens < computed:
                yield f"computed_tokens: {sequence} goes back to {event.step_completed.computed_tokens} from {computed}"
            computed, step = event.step_completed.computed_tokens, event.step_completed.step
    if _name(job.state) != state:
        yield f"atomic: the row is {_name(job.state)}, the log says {state}"
    if job.ended != (state in _ENDS):
        yield f"atomic: {state} with{'' if job.ended else 'out'} an end time"
    if job.progress.step != step:
        yield f"atomic: the row is at step {job.progress.step}, the log at {step}"
    if job.attempt < attempt:
        yield f"atomic: the row is at attempt {job.attempt}, the log at {attempt}"
    yield from _retries_discard(log)


def _retries_discard(log: Mapping[int, JobEvent]) -> Iterator[str]:
    """Each attempt goes on from a checkpoint that the log has, and makes the steps after it in order."""
    kept: list[int] = []
    saved = {"": 0}
    goes_on = 0
    for event in log.values():
        if event.HasField("attempt_started"):
            goes_on = event.attempt_started.resumed_from_step
            if saved.get(event.attempt_started.checkpoint) != goes_on:
                yield f"retry: attempt {event.attempt} resumes {event.attempt_started.checkpoint!r} at step {goes_on}"
            if event.attempt_started.discarded_from_step != goes_on:
                yield f"retry: attempt {event.attempt} discards from {event.attempt_started.discarded_from_step}"
            kept = [step for step in kept if step <= goes_on]
        elif event.HasField("step_completed"):
            if event.step_completed.step != goes_on + 1:
                yield f"steps: {event.sequence} is step {event.step_completed.step}, not {goes_on + 1}"
            goes_on = event.step_completed.step
            kept.append(goes_on)
        elif event.HasField("checkpoint_saved"):
            saved[event.checkpoint_saved.directory] = event.checkpoint_saved.step
            if event.checkpoint_saved.step != goes_on:
                yield f"checkpoint: {event.sequence} is of step {event.checkpoint_saved.step} at step {goes_on}"
    if kept != list(range(1, len(kept) + 1)):
        yield f"steps: those that count are {_short(kept)}"


def _attempts_are_sound(job: JobRow, rows: Rows, log: Mapping[int, JobEvent], recording: Recording) -> Iterator[str]:
    attempts = [each for each in rows.attempts if each.job_id == job.id]
    if [each.number for each in attempts] != list(range(1, job.attempt + 1)):
        yield f"atomic: attempts {[each.number for each in attempts]}, the row says {job.attempt}"
    if any(not each.ended for each in attempts[:-1]):
        yield "atomic: an attempt is open beside a newer one"
    resting = _name(job.state) in (*_ENDS, "QUEUED", "PAUSED")
    if attempts and attempts[-1].ended != resting:
        yield f"atomic: {_name(job.state)} with attempt {attempts[-1].number} {'ended' if not resting else 'open'}"
    for attempt in attempts:
        yield from (f"attempt {attempt.number}: {each}" for each in _ingested_once(attempt, log, recording))


def _ingested_once(attempt: AttemptRow, log: Mapping[int, JobEvent], recording: Recording) -> Iterator[str]:
    """Every report up to the committed offset is one event, in order; of an attempt that ended, every report is."""
    spool = read_spool(recording.jobs_dir / attempt.job_id / f"attempt-{attempt.number}")
    taken = [report for report, end in spool.reports if end <= attempt.spool_offset]
    offsets = {0, *(end for _, end in spool.reports)}
    if attempt.spool_offset not in offsets:
        yield f"atomic: spool_offset {attempt.spool_offset} is not the end of a report"
    if [each.sequence for each in taken] != list(range(1, len(taken) + 1)):
        yield f"the spool numbers its reports {_short([each.sequence for each in taken])}"
    if attempt.reports != len(taken):
        yield f"atomic: {attempt.reports} reports are counted, {len(taken)} lie before the offset"
    if attempt.ended and len(taken) < len(spool.reports):
        yield f"reliable: {len(spool.reports) - len(taken)} reports of the spool were never read"
    last = [each for each in taken if each.WhichOneof("payload") in _LAST_REPORTS]
    if last != ([TrainerReport.FromString(attempt.outcome)] if attempt.outcome else []):
        yield "atomic: the outcome is not the last report"
    expected = [each for each in taken if each.WhichOneof("payload") not in (_LAST_REPORTS | {"heartbeat"})]
    found = [each for each in log.values() if each.attempt == attempt.number and not each.HasField("state_changed")]
    if len(found) != len(expected):
        yield f"reliable: {len(expected)} reports became {len(found)} events"
    for event, report in zip(found, expected, strict=False):
        if not _same(event, report):
            yield f"reliable: event {event.sequence} is not report {report.sequence}"
            break


def _same(event: JobEvent, report: TrainerReport) -> bool:
    kind = report.WhichOneof("payload")
    if kind is None or event.event_time != report.time:
        return False
    if kind != "started":
        return event.WhichOneof("payload") == kind and bool(getattr(event, kind) == getattr(report, kind))
    started = event.attempt_started
    return event.HasField("attempt_started") and (
        (started.pid, started.resumed_from_step, started.checkpoint, started.attempt)
        == (report.started.pid, report.started.resumed_from_step, report.started.checkpoint, event.attempt)
    )


# Several moments


def _append_only(recording: Recording) -> Iterator[str]:
    """What one server left is what the next one found."""
    for earlier, later in zip(recording.deaths, recording.deaths[1:], strict=False):
        for job_id, log in earlier.rows.events.items():
            after = later.rows.events.get(job_id)
            if after is None:
                yield f"reliable: {job_id} was there after life {earlier.life} and not after {later.life}"
                continue
            lost = [sequence for sequence, event in log.items() if after.get(sequence) != event]
            if lost:
                yield f"reliable: {job_id} lost or changed {_short(lost)} between lives {earlier.life} and {later.life}"


def _settled(rows: Rows, recording: Recording) -> Iterator[str]:
    """At the end every job has ended once, as its last attempt did, and its trainers never ran at the same time."""
    for job in rows.jobs.values():
        state = _name(job.state)
        ends = [
            event.sequence
            for event in rows.events[job.id].values()
            if event.HasField("state_changed") and _name(event.state_changed.state) in _ENDS
        ]
        if ends != [job.last_sequence]:
            yield f"terminal: {job.id} is {state} at {job.last_sequence} and has terminal events {ends}"
        attempts = [each for each in rows.attempts if each.job_id == job.id]
        outcome = TrainerReport.FromString(attempts[-1].outcome).WhichOneof("payload") if attempts else None
        if (state == "SUCCEEDED") != (outcome == "finished"):
            yield f"{job.id} is {state}, but the last report of its last attempt is {outcome}"
        if state == "SUCCEEDED":
            made = recording.exports_dir / job.export_id if job.export_id else recording.models_dir / job.model_id
            if not made.is_dir():
                yield f"{job.id} succeeded without {made.name} on the disk"
            total = max(
                (e.step_completed.total_steps for e in rows.events[job.id].values() if e.HasField("step_completed")),
                default=0,
            )
            if job.progress.step != total:
                yield f"{job.id} succeeded at step {job.progress.step} of {total}"
        yield from _fenced(job, attempts, recording)


def _fenced(job: JobRow, attempts: list[AttemptRow], recording: Recording) -> Iterator[str]:
    ended = 0
    for attempt in attempts:
        spool = read_spool(recording.jobs_dir / job.id / f"attempt-{attempt.number}").reports
        times = [report.time.ToNanoseconds() for report, _ in spool]
        if times and times[0] < ended:
            yield f"fenced: {job.id} began attempt {attempt.number} while the one before still reported"
        ended = max([ended, *times])


# What clients saw


def _sightings(watcher: Sightings, recording: Recording) -> Iterator[str]:
    yield from watcher.complaints
    sequences = [each.event.sequence for each in watcher.seen]
    expected = list(range(watcher.after + 1, watcher.after + 1 + len(sequences)))
    if sequences != expected:
        yield f"ordered, unique: saw {_short(sequences)} after {watcher.after}"
    log = recording.deaths[-1].rows.events.get(watcher.job_id, {})
    if watcher.complete and watcher.position != max(log, default=0):
        yield f"reliable: ended with OK at {watcher.position} of {max(log, default=0)}"
    foreign = [each.event.sequence for each in watcher.seen if log.get(each.event.sequence) != each.event]
    if foreign:
        yield f"reliable: saw what is not in the log, {_short(foreign)}"
    left = {death.life: death.rows.events.get(watcher.job_id, {}) for death in recording.deaths}
    early = [
        each.event.sequence
        for each in watcher.seen
        if each.life in left and left[each.life].get(each.event.sequence) != each.event
    ]
    if early:
        yield f"durable before visible: saw {_short(early)} before they were committed"


def _answers(recording: Recording) -> Iterator[str]:
    final = recording.deaths[-1].rows
    left: dict[int, Death] = {death.life: death for death in recording.deaths}
    ids: dict[str, str] = {}
    for answer in recording.answers:
        job = answer.job
        if answer.request_id and ids.setdefault(answer.request_id, job.id) != job.id:
            yield f"request_id {answer.request_id} was answered with {ids[answer.request_id]} and {job.id}"
        if answer.life in left and not _was(left[answer.life].rows, answer):
            yield f"durable before visible: {job.id} was {_name(job.state)} at {job.last_sequence}, life {answer.life}"
        elif not _was(final, answer):
            yield f"reliable: {job.id} was {_name(job.state)} at {job.last_sequence} for a client, not in the log"


def _was(rows: Rows, answer: Answer) -> bool:
    """Whether the log, up to the sequence that the answer names, ends in the state that it names."""
    log = rows.events.get(answer.job.id, {})
    if answer.job.last_sequence not in log:
        return False
    for sequence in range(answer.job.last_sequence, 0, -1):
        if sequence in log and log[sequence].HasField("state_changed"):
            return log[sequence].state_changed.state == answer.job.state
    return False


def _short(numbers: list[int]) -> str:
    return str(numbers) if len(numbers) <= 12 else f"[{', '.join(map(str, numbers[:6]))}, ... {numbers[-1]}]"
