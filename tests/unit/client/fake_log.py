"""What the fake service's jobs do: a whole log from a stored row. The labels it obeys stand in `fake_service`."""

from typing import Any

from unit.client.fake_datasets import tokens_of

from luthier.v1 import event_pb2 as ev
from luthier.v1 import job_pb2 as jb
from luthier.v1.export_proof_pb2 import ExportProof


def log_of(job_id: str, row: dict[str, Any]) -> list[tuple[float, ev.JobEvent]]:
    """The whole log as (seconds after creation, event), each dense in its sequence."""
    labels = row["spec"].get("labels", {})
    pace, steps = float(labels.get("pace", 0)), int(labels.get("steps", 3))
    due, attempt, sequence = 0.0, 0, 0
    entries: list[tuple[float, ev.JobEvent]] = []

    def add(**payload: Any) -> None:
        nonlocal due, sequence
        sequence += 1
        event = ev.JobEvent(job_id=job_id, sequence=sequence, attempt=attempt, **payload)
        event.event_time.FromNanoseconds(int((row["created"] + due) * 1e9))
        entries.append((due, event))
        due += pace

    state = jb.JOB_STATE_UNSPECIFIED
    export = row["spec"].get("export")
    if export is not None:
        pace = float(export.get("proofRows", 0)) / 100

    def become(new: jb.JobState.ValueType, reason: str, **more: Any) -> None:
        nonlocal state
        add(state_changed=ev.StateChanged(from_state=state, state=new, reason=reason, **more))
        state = new

    def step(number: int) -> None:
        loss = 2.5 / number**0.5
        row = ev.StepCompleted(step=number, total_steps=steps, epoch=3 * number / steps, loss=loss + attempt / 1000)
        row.learning_rate, row.grad_norm, row.tokens_per_second = 2e-4 * (1 - number / steps), 1.0, 3000.0 + number
        row.trained_tokens = row.computed_tokens = 1000 * number
        add(step_completed=row)

    def evaluate(number: int, loss: float) -> None:
        row = ev.EvaluationCompleted(step=number, loss=loss, perplexity=2.7**loss, token_accuracy=0.5, rows=10)
        add(evaluation_completed=row)
        sample = ev.Sample(prompt="What is a lute?", completion="A" + "h" * number + " \x1b[31mstring")
        add(samples_generated=ev.SamplesGenerated(step=number, samples=[sample]))

    def check(number: int) -> None:
        loss = 2.5 / number**0.5
        found = ev.ResumeChecked(step=number, verified=True, recorded_loss=loss, message="resume verified")
        if labels.get("unequal"):
            found.verified, found.message = False, "the number of threads: 4, now 2"
        found.recomputed_loss = loss if found.verified else loss + 1e-6
        add(resume_checked=found)

    def start(number: int, from_step: int, reason: str) -> None:
        nonlocal attempt
        attempt = number
        add(
            attempt_started=ev.AttemptStarted(
                attempt=number, resumed_from_step=from_step, discarded_from_step=from_step, reason=reason
            )
        )

    def write_export(model: str) -> None:
        start(1, 0, "FIRST")
        become(jb.JOB_STATE_RUNNING, "STARTED")
        for done in range(3):
            add(phase_progressed=ev.PhaseProgressed(phase=ev.PHASE_EXPORTING, completed=done, total=2, unit="files"))
        add(phase_progressed=ev.PhaseProgressed(phase=ev.PHASE_PROVING, completed=8, total=16, unit="rows"))
        proof = ExportProof(loader="llama.cpp", loader_version="b1", passed=model != "unequal", rows=16, tokens=512)
        proof.checks.add(name="TEMPLATE", passed=True, value=1, limit=1)
        agreement = 0.99999 if proof.passed else 0.25
        told = "" if proof.passed else "row 3: \x1b[2J'lute', not 'harp'"
        proof.checks.add(name="TOP1_AGREEMENT", passed=proof.passed, value=agreement, limit=0.9, message=told)
        proof.checks.add(name="PERPLEXITY_RATIO", passed=True, value=1.01, limit=1.1, is_ceiling=True)
        add(export_proven=ev.ExportProven(proof=proof))
        if not proof.passed:
            error = jb.JobError(reason="EXPORT_NOT_EQUAL", message="It answers otherwise.", hint="Take more bits.")
            become(jb.JOB_STATE_FAILED, "EXPORT_NOT_EQUAL", error=error)
            return
        add(phase_progressed=ev.PhaseProgressed(phase=ev.PHASE_PUBLISHING, completed=1, total=2, unit="files"))
        become(jb.JOB_STATE_SUCCEEDED, "FINISHED", export_id=job_id.replace("job_", "export_"))

    become(jb.JOB_STATE_VALIDATING, "SUBMITTED")
    if export is not None:
        become(jb.JOB_STATE_QUEUED, "VALID")
        become(jb.JOB_STATE_PREPARING, "SLOT_FREE")
        write_export(export["model"])
        return entries
    if labels.get("checked"):
        add(datasets_checked=ev.DatasetsChecked(training=tokens_of("ds_1", "builtin/tiny")))
    become(jb.JOB_STATE_QUEUED, "VALID")
    due += float(labels.get("queued", 0))
    become(jb.JOB_STATE_PREPARING, "SLOT_FREE")
    start(1, 0, "FIRST")
    add(phase_progressed=ev.PhaseProgressed(phase=ev.PHASE_TOKENIZING, completed=50, total=100, unit="rows"))
    plan = ev.PlanResolved(device="cpu", dtype="float32", attention="documents-sdpa", total_steps=steps)
    add(plan_resolved=plan)
    become(jb.JOB_STATE_RUNNING, "STARTED")
    evaluate(0, 2.5)
    retry_at = int(labels.get("retry_at", 0))
    for number in range(1, (retry_at or steps) + 1):
        step(number)
    if retry_at:
        become(jb.JOB_STATE_QUEUED, "WORKER_LOST", message="the trainer was killed")
        due += float(labels.get("retry_wait", 0))
        become(jb.JOB_STATE_PREPARING, "SLOT_FREE")
        start(2, retry_at - 2, "WORKER_LOST")
        check(retry_at - 2)
        become(jb.JOB_STATE_RUNNING, "STARTED")
        for number in range(retry_at - 1, steps + 1):
            step(number)
    add(log_emitted=ev.LogEmitted(level=ev.LOG_LEVEL_WARNING, message="a row was cut \x1b]0;owned\x07"))
    add(checkpoint_saved=ev.CheckpointSaved(step=steps, name=f"{job_id}:step-{steps}", size_bytes=4096))
    if labels.get("outcome") == "failed":
        error = jb.JobError(
            reason="LOSS_NOT_FINITE", message="The loss became infinite.", hint="Lower the learning rate."
        )
        error.log_lines.extend(["step 3", "loss inf"])
        become(jb.JOB_STATE_FAILED, "LOSS_NOT_FINITE", error=error)
    else:
        evaluate(steps, 0.9)
        become(jb.JOB_STATE_SUCCEEDED, "FINISHED", model_id=job_id.replace("job_", "model_"))
    for began, ended in row.get("rests", []):
        entries = _rested(entries, row["created"], began, ended)
    cancelled = row.get("cancelled")
    if cancelled is not None:
        entries = [entry for entry in entries if entry[0] <= cancelled]
        last = next(e.state_changed.state for _, e in reversed(entries) if e.HasField("state_changed"))
        sequence, due, state, pace = len(entries), cancelled, last, 0.0
        become(jb.JOB_STATE_CANCELLING, "CANCEL_REQUESTED")
        become(jb.JOB_STATE_CANCELLED, "CANCEL_REQUESTED")
    return entries


def _rested(
    entries: list[tuple[float, ev.JobEvent]], created: float, began: float, ended: float | None
) -> list[tuple[float, ev.JobEvent]]:
    """A log with a pause in it: what came after it comes later, as the next attempt."""
    before = [entry for entry in entries if entry[0] <= began]
    last = before[-1][1]
    state = next(e.state_changed.state for _, e in reversed(before) if e.HasField("state_changed"))

    def event(when: float, attempt: int, **payload: Any) -> tuple[float, ev.JobEvent]:
        made = ev.JobEvent(job_id=last.job_id, attempt=attempt, **payload)
        made.event_time.FromNanoseconds(int((created + when) * 1e9))
        return when, made

    def change(when: float, attempt: int, old: Any, new: Any, reason: str) -> tuple[float, ev.JobEvent]:
        return event(when, attempt, state_changed=ev.StateChanged(from_state=old, state=new, reason=reason))

    log = [
        *before,
        change(began, last.attempt, state, jb.JOB_STATE_PAUSING, "PAUSE_REQUESTED"),
        change(began, last.attempt, jb.JOB_STATE_PAUSING, jb.JOB_STATE_PAUSED, "PAUSE_REQUESTED"),
    ]
    if ended is not None:
        step = max((e.step_completed.step for _, e in before if e.HasField("step_completed")), default=0)
        number = last.attempt + 1
        start = ev.AttemptStarted(attempt=number, resumed_from_step=step, discarded_from_step=step, reason="RESUMED")
        log += [
            change(ended, last.attempt, jb.JOB_STATE_PAUSED, jb.JOB_STATE_QUEUED, "RESUME_REQUESTED"),
            change(ended, last.attempt, jb.JOB_STATE_QUEUED, jb.JOB_STATE_PREPARING, "SLOT_FREE"),
            event(ended, number, attempt_started=start),
            event(ended, number, resume_checked=ev.ResumeChecked(step=step, verified=True, message="resume verified")),
            change(ended, number, jb.JOB_STATE_PREPARING, jb.JOB_STATE_RUNNING, "STARTED"),
        ]
        for due, each in entries[len(before) :]:
            each.attempt = number
            when = due + ended - began
            each.event_time.FromNanoseconds(int((created + when) * 1e9))
            log.append((when, each))
    for sequence, (_, each) in enumerate(log, 1):
        each.sequence = sequence
    return log
