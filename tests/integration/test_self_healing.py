"""Real trainers that meet damage: a checkpoint with flipped bytes, a killed process, a full disk."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

from daemon import Daemon, dense, kinds, small, until

from luthier.v1 import fine_tuning_pb2 as ft
from luthier.v1.event_pb2 import AttemptStarted, JobEvent, ResumeChecked
from luthier.v1.job_pb2 import Checkpoints, Dtype, Full, Hyperparameters, Job, JobSpec, JobState, Lora

Start = Callable[..., Daemon]
FLAGS = ("--threads", "1", "--retry-seconds", "0.1")
ROWS = b"".join(
    json.dumps({"prompt": f"What follows {n}?", "completion": f"After {n} comes {n + 1}."}).encode() + b"\n"
    for n in range(60)
)


def spec(steps: int, every: int, **task: object) -> JobSpec:
    numbers = Hyperparameters(max_steps=steps, batch_size=4, learning_rate=1e-3, dtype=Dtype.DTYPE_FLOAT32)
    how = task or {"lora": Lora(rank=4, dropout=0.1)}
    return small(hyperparameters=numbers, checkpoints=Checkpoints(every_steps=every, keep=3), **how)


def seen(daemon: Daemon, job: Job) -> list[JobEvent]:
    """The events up to now."""
    events: list[JobEvent] = []
    head = daemon.get(job.id).last_sequence
    stream = daemon.fine_tuning.WatchJob(ft.WatchJobRequest(job_id=job.id), timeout=30)
    while not events or events[-1].sequence < head:
        events.extend(next(stream).events)
    stream.cancel()
    return events


def attempts(events: list[JobEvent]) -> list[AttemptStarted]:
    return [event.attempt_started for event in events if event.HasField("attempt_started")]


def checks(events: list[JobEvent]) -> list[ResumeChecked]:
    return [event.resume_checked for event in events if event.HasField("resume_checked")]


def warnings(events: list[JobEvent]) -> list[str]:
    return [event.log_emitted.message for event in events if event.HasField("log_emitted")]


def rest(daemon: Daemon, job: Job, reason: str = "PAUSE_REQUESTED") -> list[JobEvent]:
    """Waits until the job is PAUSED; its events so far."""
    until(lambda: daemon.get(job.id).state == JobState.JOB_STATE_PAUSED, 90, "the pause")
    events = seen(daemon, job)
    assert [e.state_changed.reason for e in events if e.HasField("state_changed")][-1] == reason
    return events


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)


def test_a_job_goes_on_exactly_after_a_pause_passes_over_a_damaged_checkpoint_and_survives_a_killed_trainer(
    daemons: Start,
) -> None:
    daemon = daemons(*FLAGS)
    daemon.upload(ROWS)
    job = daemon.create(spec(240, every=20))
    checkpoints = daemon.data_dir / "jobs" / job.id / "checkpoints"

    daemon.wait_for_step(job.id, 25)
    daemon.fine_tuning.PauseJob(ft.PauseJobRequest(job_id=job.id))
    first = rest(daemon, job)
    paused_at = [event.checkpoint_saved for event in first if event.HasField("checkpoint_saved")][-1]
    daemon.fine_tuning.ResumeJob(ft.ResumeJobRequest(job_id=job.id))
    daemon.wait_for_step(job.id, paused_at.step + 25)
    daemon.fine_tuning.PauseJob(ft.PauseJobRequest(job_id=job.id))
    second = rest(daemon, job)
    (check,) = checks(second)
    assert (check.step, check.verified, check.message) == (paused_at.step, True, "resume verified")
    assert check.recorded_loss == check.recomputed_loss > 0

    saved = [event.checkpoint_saved for event in second if event.HasField("checkpoint_saved")]
    newest, before = saved[-1], saved[-2]
    flip(checkpoints / newest.directory / "adapter_model.safetensors")
    daemon.fine_tuning.ResumeJob(ft.ResumeJobRequest(job_id=job.id))
    daemon.wait_for_step(job.id, newest.step + 1)
    third = seen(daemon, job)
    start = attempts(third)[2]
    assert (start.checkpoint, start.resumed_from_step, start.discarded_from_step) == (
        before.directory,
        before.step,
        before.step,
    )
    (said,) = warnings(third)
    assert f"{newest.directory} is damaged: adapter_model.safetensors" in said
    assert f"goes on from {before.directory}" in said
    assert [each.verified for each in checks(third)] == [True, True]

    daemon.wait_for_step(job.id, before.step + 21)  # past a checkpoint of the new attempt
    os.killpg(daemon.host().trainers[0].pid, signal.SIGKILL)
    events = list(daemon.watch(job.id))
    assert dense(events)
    assert kinds(events)[-1] == "SUCCEEDED"
    assert [each.reason for each in attempts(events)][-1] == "WORKER_LOST"
    killed = attempts(events)[-1]
    assert killed.resumed_from_step > before.step
    assert [(each.step, each.verified) for each in checks(events)] == [
        (paused_at.step, True),
        (before.step, True),
        (killed.resumed_from_step, True),
    ]


def test_a_full_disk_pauses_a_job_which_goes_on_by_itself_when_there_is_room(daemons: Start) -> None:
    # The weights of the checkpoint, 8 MiB, are longer than a file may be; the database and the reports are not.
    daemon = daemons(*FLAGS, limit_file_kib=6 * 1024)
    daemon.upload(ROWS)
    job = daemon.create(spec(8, every=4, full=Full()))
    events = rest(daemon, job, "STORAGE_FULL")
    assert "step_completed" in kinds(events)
    assert "checkpoint_saved" not in kinds(events)
    (folder,) = (daemon.data_dir / "jobs" / job.id).glob("checkpoints")
    assert list(folder.iterdir()) == []
    daemon.stop()
    os.kill(daemon.host().host_pid, signal.SIGTERM)  # it has the limit too
    until(lambda: not _hosted(daemon), what="the end of the trainer host")
    daemon.limit_file_kib = 0
    daemon.start()
    events = list(daemon.watch(job.id))
    assert dense(events)
    assert kinds(events)[-1] == "SUCCEEDED"
    reasons = [event.state_changed.reason for event in events if event.HasField("state_changed")]
    assert "STORAGE_FREE" in reasons
    assert [event.step_completed.step for event in events if event.HasField("step_completed")][-8:] == list(range(1, 9))


def _hosted(daemon: Daemon) -> bool:
    try:
        daemon.host()
    except OSError:
        return False
    return True
