"""The oracle objects to each kind of harm: a sound recording is harmed in one place, and judged again."""

import copy
import dataclasses
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio
from daemon import puppet, small
from fault.clients import Clients
from fault.oracle import judge
from fault.recording import Answer, AttemptRow, Death, JobRow, Recording, Rows
from fault.site import Site

from luthier.trainer import attempt as files
from luthier.trainer.v1.report_pb2 import TrainerReport
from luthier.v1.event_pb2 import JobEvent, LogEmitted
from luthier.v1.job_pb2 import Checkpoints, Hyperparameters, JobState

Harm = Callable[[Recording], object]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sound(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Recording]:
    """What was noted of one job of 12 steps, with a server killed in the middle of it."""
    dice = random.Random(5)
    site = Site(tmp_path_factory.mktemp("oracle") / "data", puppet(step_seconds=0.1), dice)
    clients = Clients(site, dice, lambda _: small())
    try:
        await site.start()
        await clients.upload()
        job = await clients.create(
            small(hyperparameters=Hyperparameters(max_steps=12), checkpoints=Checkpoints(every_steps=5))
        )
        assert job is not None
        clients.watch(job.id)
        await clients.step()
        await site.kill()
        await site.start()
        await clients.finish()
        await site.stop()
        yield site.recording
    finally:
        await clients.close()
        site.close()


@pytest.fixture
def recording(sound: Recording, tmp_path: Path) -> Recording:
    """A copy that may be harmed, its spools included."""
    copied = copy.deepcopy(sound)
    for spool in sound.jobs_dir.glob(f"*/*/{files.SPOOL}"):
        target = tmp_path / spool.relative_to(sound.jobs_dir)
        target.parent.mkdir(parents=True)
        target.write_bytes(spool.read_bytes())
    copied.jobs_dir = tmp_path
    return copied


def rows(recording: Recording) -> Rows:
    return recording.deaths[-1].rows


def the_log(recording: Recording) -> dict[int, JobEvent]:
    [log] = rows(recording).events.values()
    return log


def change_job(recording: Recording, **fields: object) -> None:
    [job] = rows(recording).jobs.values()
    rows(recording).jobs[job.id] = dataclasses.replace(job, **fields)  # type: ignore[arg-type]


def change_attempt(recording: Recording, **fields: object) -> None:
    attempts: list[AttemptRow] = rows(recording).attempts
    attempts[-1] = dataclasses.replace(attempts[-1], **fields)  # type: ignore[arg-type]


def append_report(recording: Recording) -> None:
    [spool] = recording.jobs_dir.glob(f"*/*/{files.SPOOL}")
    count = sum(1 for _ in files.frames(spool.read_bytes()))
    report = TrainerReport(sequence=count + 1, log_emitted=LogEmitted(message="never read"))
    spool.write_bytes(spool.read_bytes() + files.frame(report.SerializeToString()))


def append_event(recording: Recording) -> None:
    log = the_log(recording)
    extra = copy.deepcopy(log[len(log)])
    extra.sequence = len(log) + 1
    log[extra.sequence] = extra
    change_job(recording, last_sequence=extra.sequence)


def second_job(recording: Recording) -> None:
    [job] = rows(recording).jobs.values()
    other: JobRow = dataclasses.replace(job, id="job_other")
    rows(recording).jobs[other.id] = other
    rows(recording).events[other.id] = the_log(recording)


def leave_running(recording: Recording) -> None:
    change = next(event for event in the_log(recording).values() if event.state_changed.from_state)
    change.state_changed.state = JobState.JOB_STATE_SUCCEEDED


def see_before_commit(recording: Recording) -> None:
    first: Death = recording.deaths[0]
    [log] = first.rows.events.values()
    watcher = recording.watchers[0]
    later = next(place for place, each in enumerate(watcher.seen) if each.event.sequence > len(log))
    watcher.seen[later] = dataclasses.replace(watcher.seen[later], life=first.life)


def answer_otherwise(recording: Recording) -> None:
    job = copy.deepcopy(recording.answers[-1].job)
    job.id = "job_other"
    recording.answers.append(Answer(2, job, recording.answers[0].request_id))


HARMS: dict[str, tuple[Harm, str]] = {
    "the last event is lost": (lambda r: the_log(r).popitem(), "atomic"),
    "an event in the middle is lost": (lambda r: the_log(r).pop(9), "dense"),
    "an event is changed between two lives": (lambda r: the_log(r)[2].event_time.FromSeconds(1), "lost or changed"),
    "an event follows the end": (append_event, "terminal"),
    "a state follows that may not": (leave_running, "states"),
    "the row is behind the log": (lambda r: change_job(r, last_sequence=3), "atomic"),
    "the row has another state": (lambda r: change_job(r, state=JobState.JOB_STATE_RUNNING), "atomic"),
    "the row has another attempt": (lambda r: change_job(r, attempt=2), "atomic"),
    "the offset is not where the events are": (lambda r: change_attempt(r, spool_offset=0), "atomic"),
    "a report was never read": (append_report, "never read"),
    "the outcome is another": (lambda r: change_attempt(r, outcome=b""), "outcome"),
    "the model is missing": (lambda r: rows(r).models.clear(), "models"),
    "a watcher misses an event": (lambda r: r.watchers[0].seen.pop(7), "ordered, unique"),
    "a watcher sees an event twice": (lambda r: r.watchers[0].seen.insert(7, r.watchers[0].seen[7]), "ordered, unique"),
    "a watcher sees events out of order": (lambda r: r.watchers[0].seen.reverse(), "ordered, unique"),
    "a watch ends before the log": (lambda r: r.watchers[0].seen.pop(), "ended with OK at"),
    "a watcher sees what is not there": (
        lambda r: r.watchers[0].seen[-1].event.state_changed.MergeFrom(type(JobEvent().state_changed)(reason="X")),
        "not in the log",
    ),
    "a watcher sees what is not committed": (see_before_commit, "durable before visible"),
    "a client was told of a state that never was": (
        lambda r: setattr(r.answers[-1].job, "state", JobState.JOB_STATE_PAUSED),
        "was PAUSED at",
    ),
    "a request made two jobs": (second_job, "made several jobs"),
    "a request was answered with two jobs": (answer_otherwise, "was answered with"),
}


def test_a_sound_recording_is_sound(recording: Recording) -> None:
    verdict = judge(recording)
    assert verdict.violations == ()
    assert verdict.events > 40
    assert len(recording.deaths) == 2


@pytest.mark.parametrize("name", HARMS)
def test_harm_is_seen(name: str, recording: Recording) -> None:
    harm, words = HARMS[name]
    harm(recording)
    assert any(words in each for each in judge(recording).violations), judge(recording).violations
