"""The watch that resumes: exactly once, in order, or an error that says so."""

import contextlib
import itertools
import threading
import time

import pytest
from unit.client.fake_server import FakeServer, job_spec

from luthier.v1.event_pb2 import AttemptStarted, EvaluationCompleted, JobEvent, StepCompleted
from luthier.v1.fine_tuning_pb2 import WatchJobResponse
from luthier.v1.job_pb2 import JOB_STATE_SUCCEEDED
from luthier_client import AsyncClient, Client, LuthierError, SequenceGap, Unavailable, WatchOptions, fold
from luthier_client.backoff import Backoff
from luthier_client.errors import DataLoss, FailedPrecondition, NotFound, OutOfRange
from luthier_client.handle import JobHandle
from luthier_client.watch import WatchCursor

QUICK = WatchOptions(first_pause=0.01, longest_pause=0.05)


async def test_a_server_that_drops_every_stream_after_four_events_loses_and_repeats_none(endpoint: str) -> None:
    tries: list[tuple[int, str]] = []
    options = WatchOptions(first_pause=0.01, on_reconnect=lambda attempt, error: tries.append((attempt, error.reason)))
    async with AsyncClient(endpoint) as client:
        job = await client.create_job(job_spec(steps="20", **{"break": "UNAVAILABLE:SERVER_DRAINING:4"}))
        sequences = [event.sequence async for event in job.watch(options=options)]
        head = (await job.refresh()).last_sequence
    assert sequences == list(range(1, head + 1))
    # Each stream made progress, so each loss was the first try again: the back-off starts anew after an event.
    assert tries == [(1, "SERVER_DRAINING")] * ((head - 1) // 4)


@pytest.mark.parametrize("status", ["ABORTED:SLOW_CONSUMER", "CANCELLED:KILL", "UNAVAILABLE:KILL", "ABORTED:KILL"])
async def test_both_watches_resume_after_every_end_that_passes(endpoint: str, status: str) -> None:
    with Client(endpoint) as client:
        job = client.create_job(job_spec(steps="9", **{"break": f"{status}:5"}))
        sequences = [event.sequence for event in job.watch(options=QUICK)]
        assert sequences == list(range(1, job.refresh().last_sequence + 1))
    async with AsyncClient(endpoint) as other:
        same = await other.get_job(job.id)
        assert [event.sequence async for event in same.watch(options=QUICK)] == sequences


async def test_a_server_killed_in_the_middle_of_a_stream_and_started_again_is_seen_exactly_once(
    own_server: FakeServer,
) -> None:
    async with AsyncClient(own_server.endpoint) as client:
        job = await client.create_job(job_spec(steps="30", pace="0.02"))
        seen: list[JobEvent] = []
        async for event in job.watch(options=QUICK):
            seen.append(event)
            if len(seen) in (8, 25):
                own_server.kill()
                own_server.start()
        assert [event.sequence for event in seen] == list(range(1, len(seen) + 1))
        assert seen[-1].state_changed.state == JOB_STATE_SUCCEEDED
        assert [each.step_completed.step for each in seen if each.HasField("step_completed")] == list(range(1, 31))
    resumed = own_server.calls("WatchJob")[1:]
    assert len(resumed) >= 2
    assert all(call["history_id"] == "history-1" and call["after"] > 0 for call in resumed)


def test_the_synchronous_watch_outlives_a_killed_server_too(own_server: FakeServer) -> None:
    with Client(own_server.endpoint) as client:
        job = client.create_job(job_spec(steps="30", pace="0.02"))
        sequences = []
        for event in job.watch(options=QUICK):
            sequences.append(event.sequence)
            if event.sequence == 10:
                own_server.kill()
                threading.Timer(0.5, own_server.start).start()
        assert sequences == list(range(1, job.refresh().last_sequence + 1))


async def test_a_hole_in_the_log_is_an_error_and_not_a_silent_loss(endpoint: str) -> None:
    async with AsyncClient(endpoint) as client:
        job = await client.create_job(job_spec(hole="5"))
        with pytest.raises(SequenceGap) as caught:
            _ = [event async for event in job.watch(options=QUICK)]
    assert (caught.value.expected, caught.value.received) == (5, 6)


def test_a_repeated_event_a_skipped_one_and_a_heartbeat_ahead_are_all_gaps() -> None:
    for response in (
        WatchJobResponse(events=[JobEvent(sequence=7)], cursor=7),
        WatchJobResponse(events=[JobEvent(sequence=9)], cursor=9),
        WatchJobResponse(cursor=8),
    ):
        with pytest.raises(SequenceGap):
            list(WatchCursor("job_x", 7, "").accept(response))
    cursor = WatchCursor("job_x", 7, "h")
    assert [each.sequence for each in cursor.accept(WatchJobResponse(events=[JobEvent(sequence=8)], cursor=8))] == [8]
    assert list(cursor.accept(WatchJobResponse(cursor=8))) == []
    assert cursor.request().after_sequence == 8


def test_events_of_another_history_are_refused() -> None:
    cursor = WatchCursor("job_x", 3, "before the restore")
    with pytest.raises(FailedPrecondition) as caught:
        list(cursor.accept(WatchJobResponse(events=[JobEvent(sequence=4)], cursor=4, history_id="after it")))
    assert caught.value.reason == "HISTORY_MISMATCH"


async def test_a_server_that_ends_a_stream_with_ok_too_early_is_asked_again(endpoint: str) -> None:
    with Client(endpoint) as client:
        job = client.create_job(job_spec(silent="4"))
        sequences = [event.sequence for event in job.watch(options=QUICK)]
        assert sequences == list(range(1, job.refresh().last_sequence + 1))
    async with AsyncClient(endpoint) as other:
        same = await other.get_job(job.id)
        assert [event.sequence async for event in same.watch(options=QUICK)] == sequences


def test_a_watch_from_the_terminal_event_ends_at_once_with_nothing(endpoint: str) -> None:
    with Client(endpoint) as client:
        job = client.create_job(job_spec())
        assert list(job.watch(after=job.refresh().last_sequence)) == []


def test_a_position_past_head_a_foreign_history_and_an_unknown_job_raise_at_once(endpoint: str) -> None:
    with Client(endpoint) as client:
        job = client.create_job(job_spec())
        with pytest.raises(OutOfRange):
            list(job.watch(after=1000))
        with pytest.raises(FailedPrecondition):
            list(job.watch(after=2, history_id="another store"))
        job.proto.id = "job_unknown"
        with pytest.raises(NotFound):
            list(job.watch())


def test_an_error_that_does_not_pass_ends_the_watch(endpoint: str) -> None:
    with Client(endpoint) as client:
        job = client.create_job(job_spec(**{"break": "DATA_LOSS:STORE_CORRUPT:3"}))
        with pytest.raises(DataLoss):
            list(job.watch(options=QUICK))


def test_a_watch_gives_up_when_asked_to_and_the_server_stays_away(own_server: FakeServer) -> None:
    errors: list[LuthierError] = []
    with Client(own_server.endpoint) as client:
        job = client.create_job(job_spec(steps="500", pace="0.05"))
        options = WatchOptions(0.3, lambda _, error: errors.append(error), first_pause=0.02)
        with contextlib.closing(job.watch(options=options)) as events:
            next(events)
            own_server.kill()
            began = time.monotonic()
            with pytest.raises(Unavailable):
                list(events)
    assert 0.3 <= time.monotonic() - began < 10
    assert errors


async def test_leaving_a_watch_cancels_nothing(endpoint: str) -> None:
    async with AsyncClient(endpoint) as client:
        job = await client.create_job(job_spec(steps="50", pace="0.01"))
        async with contextlib.aclosing(job.watch()) as events:
            async for _ in events:
                break
        assert (await job.wait()).state == JOB_STATE_SUCCEEDED


def test_the_back_off_doubles_within_its_bounds_and_starts_again() -> None:
    backoff = Backoff(0.1, 5.0)
    pauses = [backoff.next() for _ in range(8)]
    for pause, bound in zip(pauses, [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0], strict=True):
        assert bound / 2 <= pause <= bound
    backoff.reset()
    assert backoff.next() <= 0.1


async def test_both_stacks_tell_the_same_story(endpoint: str) -> None:
    async with AsyncClient(endpoint) as client:
        created = await client.create_job(job_spec(steps="12", retry_at="6"))
        events = [event async for event in created.watch()]
        metrics = await created.metrics()
        logs = await created.logs()
    with Client(endpoint) as other:
        job = other.get_job(created.id)
        assert list(job.watch()) == events
        assert job.metrics() == metrics
        assert job.logs() == logs


def test_steps_that_a_retry_threw_away_are_folded_out_of_the_metrics(endpoint: str) -> None:
    with Client(endpoint) as client:
        job = client.create_job(job_spec(steps="8", retry_at="5"))
        raw = [event.step_completed.step for event in job.watch() if event.HasField("step_completed")]
        metrics = job.metrics()
    assert raw == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8]
    assert [row.step for row in metrics.steps] == list(range(1, 9))
    # The fake adds attempt / 1000 to each loss: 4 and 5 come from the second attempt.
    attempts = [round((row.loss - 2.5 / row.step**0.5) * 1000) for row in metrics.steps]
    assert attempts == [1, 1, 1, 2, 2, 2, 2, 2]
    assert [row.step for row in metrics.evaluations] == [0, 8]


def test_discarded_steps_are_gone_before_the_new_attempt_makes_them_again() -> None:
    log = [JobEvent(step_completed=StepCompleted(step=step)) for step in range(1, 6)]
    log += [JobEvent(evaluation_completed=EvaluationCompleted(step=step)) for step in (0, 3, 5)]
    log.append(JobEvent(attempt_started=AttemptStarted(attempt=2, discarded_from_step=3)))
    metrics = fold(log)
    assert [row.step for row in metrics.steps] == [1, 2, 3]
    assert [row.step for row in metrics.evaluations] == [0, 3]


def test_metrics_of_a_running_job_return_without_waiting_for_its_end(endpoint: str) -> None:
    with Client(endpoint) as client:
        job: JobHandle = client.create_job(job_spec(steps="2000", pace="0.02"))
        for event in job.watch():
            if event.step_completed.step == 3:
                break
        began = time.monotonic()
        assert len(job.metrics().steps) >= 3
        assert time.monotonic() - began < 5
        job.cancel()


def test_two_watches_of_one_client_do_not_disturb_each_other(endpoint: str) -> None:
    with Client(endpoint) as client:
        job = client.create_job(job_spec(steps="10"))
        pairs = list(itertools.zip_longest(job.watch(), job.watch()))
    assert pairs and all(one == two for one, two in pairs)
