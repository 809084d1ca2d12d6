"""The life of a job through a real luthierd, with trainers that compute nothing but are real in everything else."""

import os
import signal
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from daemon import Daemon, dense, details, kinds, puppet, reason, small, until

from luthier.v1 import datasets_pb2 as ds
from luthier.v1 import fine_tuning_pb2 as ft
from luthier.v1 import models_pb2 as md
from luthier.v1.event_pb2 import JobEvent
from luthier.v1.job_pb2 import Checkpoints, JobState

Start = Callable[..., Daemon]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_watchers_from_the_start_and_after_the_end_see_the_same_dense_log(daemons: Start) -> None:
    daemon = daemons()
    daemon.upload()
    job = daemon.create()
    with ThreadPoolExecutor() as pool:
        live = [pool.submit(lambda: list(daemon.watch(job.id))) for _ in range(2)]
        seen = [each.result() for each in live]
    late = list(daemon.watch(job.id))
    assert dense(late)
    assert seen == [late, late]
    assert kinds(late)[0] == "QUEUED"
    assert kinds(late)[-1] == "SUCCEEDED"
    assert [event.step_completed.step for event in late if event.HasField("step_completed")] == list(range(1, 21))
    assert daemon.get(job.id).last_sequence == len(late)


def test_a_watch_resumes_after_any_sequence(daemons: Start) -> None:
    daemon = daemons()
    daemon.upload()
    job = daemon.create()
    whole = list(daemon.watch(job.id))
    for after in (0, 1, len(whole) // 2, len(whole) - 1, len(whole)):
        assert list(daemon.watch(job.id, after)) == whole[after:]
    with pytest.raises(grpc.RpcError) as past:
        list(daemon.watch(job.id, len(whole) + 1))
    assert (past.value.code(), reason(past.value)) == (grpc.StatusCode.OUT_OF_RANGE, "POSITION_PAST_HEAD")
    with pytest.raises(grpc.RpcError) as foreign:
        list(daemon.fine_tuning.WatchJob(ft.WatchJobRequest(job_id=job.id, after_sequence=1, history_id="other")))
    assert (foreign.value.code(), reason(foreign.value)) == (grpc.StatusCode.FAILED_PRECONDITION, "FOREIGN_HISTORY")


def test_a_watcher_that_never_reads_disturbs_nobody(daemons: Start) -> None:
    daemon = daemons(*puppet(steps=300, step_seconds=0.005, padding_bytes=60_000), "--slow-consumer-seconds", "2")
    daemon.upload()
    job = daemon.create()
    with grpc.insecure_channel(daemon.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        watch: Any = channel.unary_stream(
            "/luthier.v1.FineTuning/WatchJob",
            request_serializer=ft.WatchJobRequest.SerializeToString,
            response_deserializer=None,
        )(ft.WatchJobRequest(job_id=job.id))
        events = list(daemon.watch(job.id))
        watch.cancel()
    assert dense(events)
    assert kinds(events)[-1] == "SUCCEEDED"


def test_a_cancel_while_training_ends_within_five_seconds_and_leaves_a_checkpoint(daemons: Start) -> None:
    daemon = daemons(*puppet(steps=10_000, step_seconds=0.05))
    daemon.upload()
    job = daemon.create()
    daemon.wait_for_step(job.id, 3)
    pid = next(e.attempt_started.pid for e in _seen(daemon, job.id) if e.HasField("attempt_started"))
    started = time.monotonic()
    answer = daemon.fine_tuning.CancelJob(ft.CancelJobRequest(job_id=job.id)).job
    assert answer.state == JobState.JOB_STATE_CANCELLING
    assert daemon.wait(job.id).state == JobState.JOB_STATE_CANCELLED
    assert time.monotonic() - started < 5
    until(lambda: not alive(pid), 2, "the trainer's end")
    saved = [e.checkpoint_saved for e in daemon.watch(job.id) if e.HasField("checkpoint_saved")][-1]
    parts = list(daemon.models.DownloadModel(md.DownloadModelRequest(model_id=saved.name)))
    assert saved.name == f"{job.id}:step-{saved.step}"
    assert len(parts[0].manifest.files) >= 1
    again = daemon.fine_tuning.CancelJob(ft.CancelJobRequest(job_id=job.id)).job
    assert again.state == JobState.JOB_STATE_CANCELLED


def _seen(daemon: Daemon, job_id: str) -> list[JobEvent]:
    stream = daemon.fine_tuning.WatchJob(ft.WatchJobRequest(job_id=job_id))
    events = list(next(stream).events)
    stream.cancel()
    return events


def test_a_trainer_that_ignores_a_cancel_is_killed_after_the_grace(daemons: Start) -> None:
    daemon = daemons(*puppet(steps=10_000, step_seconds=0.05, stubborn=True), "--cancel-grace", "0.5")
    daemon.upload()
    job = daemon.create()
    daemon.wait_for_step(job.id, 2)
    daemon.fine_tuning.CancelJob(ft.CancelJobRequest(job_id=job.id))
    assert daemon.wait(job.id).state == JobState.JOB_STATE_CANCELLED
    assert not daemon.host().trainers


def test_a_silent_trainer_is_lost(daemons: Start) -> None:
    daemon = daemons(*puppet(steps=10_000, step_seconds=0.05), "--stall-timeout", "1")
    daemon.upload()
    spec = small()
    spec.max_retries = 0
    job = daemon.create(spec)
    daemon.wait_for_step(job.id, 2)
    os.killpg(daemon.host().trainers[0].pid, signal.SIGSTOP)
    ended = daemon.wait(job.id)
    assert (ended.state, ended.error.reason) == (JobState.JOB_STATE_FAILED, "WORKER_LOST")
    assert "silent" in ended.error.message


def test_a_cancelled_waiting_job_never_runs_and_an_ended_one_cannot_be_cancelled(daemons: Start) -> None:
    daemon = daemons(*puppet(steps=40, step_seconds=0.05))
    daemon.upload()
    first, second, third = daemon.create(), daemon.create(), daemon.create()
    until(lambda: daemon.get(first.id).state == JobState.JOB_STATE_RUNNING, what="the first job")
    assert [daemon.get(each.id).queue_position for each in (first, second, third)] == [0, 1, 2]
    daemon.fine_tuning.CancelJob(ft.CancelJobRequest(job_id=second.id))
    assert kinds(daemon.watch(second.id)) == ["QUEUED", "CANCELLED"]
    assert daemon.wait(third.id).state == JobState.JOB_STATE_SUCCEEDED
    with pytest.raises(grpc.RpcError) as ended:
        daemon.fine_tuning.CancelJob(ft.CancelJobRequest(job_id=first.id))
    assert ended.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert details(ended.value)["PreconditionFailure"].violations[0].subject == first.id


def test_one_request_id_makes_one_job_however_often_it_is_sent(daemons: Start) -> None:
    daemon = daemons()
    daemon.upload()
    request_id = str(uuid.uuid4())
    with ThreadPoolExecutor(8) as pool:
        jobs = [each.result() for each in [pool.submit(daemon.create, small(), request_id) for _ in range(16)]]
    assert len({job.id for job in jobs}) == 1
    assert len(daemon.fine_tuning.ListJobs(ft.ListJobsRequest()).jobs) == 1
    with pytest.raises(grpc.RpcError) as reused:
        daemon.create(small(suffix="other"), request_id)
    assert (reused.value.code(), reason(reused.value)) == (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED")


def test_a_killed_trainer_fails_its_job_with_its_last_lines_and_the_next_job_runs(daemons: Start) -> None:
    daemon = daemons(*puppet(steps=10_000, step_seconds=0.02))
    daemon.upload()
    spec = small()
    spec.max_retries = 0
    job = daemon.create(spec)
    following = daemon.create(small(hyperparameters={"max_steps": 5}))
    daemon.wait_for_step(job.id, 2)
    os.killpg(daemon.host().trainers[0].pid, signal.SIGKILL)
    lost = daemon.wait(job.id)
    assert (lost.state, lost.error.reason) == (JobState.JOB_STATE_FAILED, "WORKER_LOST")
    assert "SIGKILL" in lost.error.message
    assert lost.error.log_lines
    assert daemon.wait(following.id).state == JobState.JOB_STATE_SUCCEEDED


def test_a_lost_attempt_is_tried_again_from_its_newest_checkpoint_where_the_spec_allows(daemons: Start) -> None:
    daemon = daemons(*puppet(steps=60, step_seconds=0.05), "--retry-seconds", "0.2")
    daemon.upload()
    spec = small(checkpoints=Checkpoints(every_steps=5))
    spec.max_retries = 1
    job = daemon.create(spec)
    daemon.wait_for_step(job.id, 7)
    os.killpg(daemon.host().trainers[0].pid, signal.SIGKILL)
    events = list(daemon.watch(job.id))
    assert dense(events)
    assert kinds(events)[-1] == "SUCCEEDED"
    again = [event.attempt_started for event in events if event.HasField("attempt_started")][1]
    assert again.reason == "WORKER_LOST"
    assert again.resumed_from_step >= 5
    steps = [event.step_completed.step for event in events if event.HasField("step_completed") and event.attempt == 2]
    assert steps == list(range(again.resumed_from_step + 1, 61))


def test_a_trainer_that_fails_tells_why(daemons: Start) -> None:
    daemon = daemons(*puppet(steps=10, fail_at_step=3))
    daemon.upload()
    job = daemon.wait(daemon.create().id)
    assert (job.state, job.error.reason) == (JobState.JOB_STATE_FAILED, "PUPPET_FAILED")


def test_slots_bound_the_jobs_that_run_and_the_oldest_goes_first(daemons: Start) -> None:
    daemon = daemons(*puppet(steps=10, step_seconds=0.03), "--slots", "2")
    daemon.upload()
    jobs = [daemon.create() for _ in range(6)]
    most = 0
    while any(daemon.get(job.id).end_time.seconds == 0 for job in jobs):
        most = max(most, len(daemon.host().trainers))
    assert most == 2
    starts = [daemon.get(job.id).start_time.ToNanoseconds() for job in jobs]
    assert starts == sorted(starts)


def test_the_list_is_newest_first_and_pages_meet_without_gap(daemons: Start) -> None:
    daemon = daemons(*puppet(steps=1, step_seconds=0))
    daemon.upload()
    specs = [small() for _ in range(7)]
    for number, spec in enumerate(specs):
        spec.labels["parity"] = "odd" if number % 2 else "even"
    made = [daemon.create(spec).id for spec in specs]
    pages: list[list[str]] = []
    token = ""
    while True:
        page = daemon.fine_tuning.ListJobs(ft.ListJobsRequest(page_size=3, page_token=token))
        pages.append([job.id for job in page.jobs])
        token = page.next_page_token
        if not token:
            break
    assert [len(page) for page in pages] == [3, 3, 1]
    assert [job_id for page in pages for job_id in page] == made[::-1]
    odd = daemon.fine_tuning.ListJobs(ft.ListJobsRequest(labels={"parity": "odd"})).jobs
    assert [job.id for job in odd] == made[1::2][::-1]
    first = daemon.fine_tuning.ListJobs(ft.ListJobsRequest(page_size=3))
    with pytest.raises(grpc.RpcError) as foreign:
        daemon.fine_tuning.ListJobs(ft.ListJobsRequest(page_token=first.next_page_token, labels={"parity": "odd"}))
    assert foreign.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.RpcError) as negative:
        daemon.fine_tuning.ListJobs(ft.ListJobsRequest(page_size=-1))
    assert negative.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_a_dataset_that_a_job_needs_cannot_be_deleted(daemons: Start) -> None:
    daemon = daemons(*puppet(steps=10_000, step_seconds=0.05))
    dataset = daemon.upload()
    job = daemon.create()
    with pytest.raises(grpc.RpcError) as needed:
        daemon.datasets.DeleteDataset(ds.DeleteDatasetRequest(dataset=dataset.id))
    assert reason(needed.value) == "DATASET_IN_USE"
    daemon.fine_tuning.CancelJob(ft.CancelJobRequest(job_id=job.id))
    daemon.wait(job.id)
    daemon.datasets.DeleteDataset(ds.DeleteDatasetRequest(dataset=dataset.id))
    assert not (daemon.data_dir / "blobs" / dataset.sha256).exists()
    assert daemon.upload().version == 2


def test_a_worker_that_cannot_run_is_said_and_not_taken_for_a_verdict(daemons: Start) -> None:
    daemon = daemons(*puppet(), "--trainer-python", "/bin/false")
    with pytest.raises(grpc.RpcError) as no_worker:
        daemon.upload()
    assert no_worker.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "luthier-trainer" in str(no_worker.value.details())


def test_a_trainer_that_cannot_be_started_fails_its_job_with_words(daemons: Start) -> None:
    daemon = daemons(*puppet(), "--external-host", "--retry-seconds", "0.1")
    daemon.upload()
    spec = small()
    spec.max_retries = 1
    job = daemon.wait(daemon.create(spec).id)
    assert (job.state, job.attempt) == (JobState.JOB_STATE_FAILED, 2)
    assert job.error.reason == "WORKER_NOT_STARTED"
    assert "host" in job.error.message


def test_a_job_whose_dataset_is_gone_fails_at_once_and_is_not_tried_again(daemons: Start) -> None:
    daemon = daemons(*puppet(steps=10_000, step_seconds=0.05))
    dataset = daemon.upload()
    running, waiting = daemon.create(), daemon.create()
    daemon.fine_tuning.PauseJob(ft.PauseJobRequest(job_id=waiting.id))
    daemon.fine_tuning.CancelJob(ft.CancelJobRequest(job_id=running.id))
    daemon.wait(running.id)
    daemon.datasets.DeleteDataset(ds.DeleteDatasetRequest(dataset=dataset.id))
    daemon.fine_tuning.ResumeJob(ft.ResumeJobRequest(job_id=waiting.id))
    ended = daemon.wait(waiting.id)
    assert (ended.state, ended.error.reason, ended.attempt) == (JobState.JOB_STATE_FAILED, "INPUT_LOST", 1)
    assert dataset.id in ended.error.message
