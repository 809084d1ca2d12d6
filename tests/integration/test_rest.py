"""Pausing, resuming, deleting, going on from a checkpoint in a new job."""

import uuid
from collections.abc import Callable

import grpc
import pytest
from daemon import Daemon, dense, details, kinds, puppet, reason, small, until

from luthier.v1 import fine_tuning_pb2 as ft
from luthier.v1 import models_pb2 as md
from luthier.v1.job_pb2 import Checkpoints, Hyperparameters, Job, JobState

Start = Callable[..., Daemon]


def pause(daemon: Daemon, job: Job) -> Job:
    return daemon.fine_tuning.PauseJob(ft.PauseJobRequest(job_id=job.id)).job


def resume(daemon: Daemon, job: Job) -> Job:
    return daemon.fine_tuning.ResumeJob(ft.ResumeJobRequest(job_id=job.id)).job


def delete(daemon: Daemon, job: Job) -> Job:
    return daemon.fine_tuning.DeleteJob(ft.DeleteJobRequest(job_id=job.id)).job


def rested(daemon: Daemon, job: Job) -> None:
    until(lambda: daemon.get(job.id).state == JobState.JOB_STATE_PAUSED, what="the pause")


def test_a_paused_job_holds_no_slot_and_goes_on_where_it_stopped(daemons: Start) -> None:
    daemon = daemons(*puppet(steps=60, step_seconds=0.05))
    daemon.upload()
    job = daemon.create()
    daemon.wait_for_step(job.id, 5)
    assert pause(daemon, job).state == JobState.JOB_STATE_PAUSING
    rested(daemon, job)
    assert pause(daemon, job).state == JobState.JOB_STATE_PAUSED
    assert not daemon.host().trainers
    other = daemon.create(small(hyperparameters=Hyperparameters(max_steps=3)))
    assert daemon.wait(other.id).state == JobState.JOB_STATE_SUCCEEDED
    daemon.kill()
    daemon.start()
    assert daemon.get(job.id).state == JobState.JOB_STATE_PAUSED
    assert resume(daemon, job).state in (JobState.JOB_STATE_QUEUED, JobState.JOB_STATE_PREPARING)
    events = list(daemon.watch(job.id))
    assert dense(events)
    assert kinds(events)[-1] == "SUCCEEDED"
    assert [e.step_completed.step for e in events if e.HasField("step_completed")] == list(range(1, 61))
    for call in (pause, resume):
        with pytest.raises(grpc.RpcError) as ended:
            call(daemon, job)
        assert reason(ended.value) == "JOB_ENDED"


def test_a_waiting_job_is_paused_at_once_and_a_paused_one_can_be_cancelled(daemons: Start) -> None:
    daemon = daemons(*puppet(steps=10_000, step_seconds=0.05))
    daemon.upload()
    running, waiting = daemon.create(), daemon.create()
    assert pause(daemon, waiting).state == JobState.JOB_STATE_PAUSED
    assert resume(daemon, waiting).state == JobState.JOB_STATE_QUEUED
    pause(daemon, waiting)
    cancelled = daemon.fine_tuning.CancelJob(ft.CancelJobRequest(job_id=waiting.id)).job
    assert cancelled.state == JobState.JOB_STATE_CANCELLED
    daemon.wait_for_step(running.id, 1)
    pause(daemon, running)
    rested(daemon, running)


def test_a_deleted_job_is_gone_its_watches_end_and_its_request_is_not_carried_out_again(daemons: Start) -> None:
    daemon = daemons(*puppet(steps=10_000, step_seconds=0.05))
    daemon.upload()
    request_id = str(uuid.uuid4())
    job = daemon.create(request_id=request_id)
    daemon.wait_for_step(job.id, 2)
    with pytest.raises(grpc.RpcError) as busy:
        delete(daemon, job)
    assert reason(busy.value) == "JOB_NOT_AT_REST"
    pause(daemon, job)
    rested(daemon, job)
    watch = daemon.fine_tuning.WatchJob(ft.WatchJobRequest(job_id=job.id))
    assert next(watch).events
    delete(daemon, job)
    with pytest.raises(grpc.RpcError) as ended:
        for _ in watch:
            pass
    assert ended.value.code() == grpc.StatusCode.NOT_FOUND
    assert not (daemon.data_dir / "jobs" / job.id).exists()
    with pytest.raises(grpc.RpcError) as gone:
        daemon.get(job.id)
    assert gone.value.code() == grpc.StatusCode.NOT_FOUND
    with pytest.raises(grpc.RpcError) as again:
        daemon.create(request_id=request_id)
    assert reason(again.value) == "JOB_DELETED"


def test_a_deleted_job_leaves_its_model(daemons: Start) -> None:
    daemon = daemons()
    daemon.upload()
    job = daemon.wait(daemon.create().id)
    delete(daemon, job)
    assert list(daemon.models.DownloadModel(md.DownloadModelRequest(model_id=job.model_id)))
    model = daemon.models.GetModel(md.GetModelRequest(model_id=job.model_id)).model
    assert model.job_id == job.id


def test_a_new_job_goes_on_from_a_checkpoint_of_another_also_when_that_one_is_deleted(daemons: Start) -> None:
    daemon = daemons(*puppet(steps=40, step_seconds=0.02))
    daemon.upload()
    first = daemon.wait(daemon.create(small(checkpoints=Checkpoints(every_steps=10, keep=10))).id)
    found = daemon.fine_tuning.ListCheckpoints(ft.ListCheckpointsRequest(job_id=first.id)).checkpoints
    assert [each.step for each in found] == [40, 30, 20, 10] or [each.step for each in found] == [30, 20, 10]
    chosen = next(each for each in found if each.step == 20)
    with pytest.raises(grpc.RpcError) as other_rows:
        daemon.upload(b'{"prompt": "a", "completion": "b"}\n', "other")
        daemon.create(small(resume_from=chosen.name, training_dataset="other"))
    assert "spec.fine_tune.training_dataset" in str(details(other_rows.value)["BadRequest"])
    daemon.fine_tuning.CreateJob(ft.CreateJobRequest(spec=small(resume_from=chosen.name), validate_only=True))
    second = daemon.create(small(resume_from=chosen.name))
    delete(daemon, first)
    events = list(daemon.watch(second.id))
    assert kinds(events)[-1] == "SUCCEEDED"
    assert [e.step_completed.step for e in events if e.HasField("step_completed")] == list(range(21, 41))
    for unknown in (f"{second.id}:step-999", "job_01ARZ3NDEKTSV4RRFFQ69G5FAV:step-1"):
        with pytest.raises(grpc.RpcError) as missing:
            daemon.create(small(resume_from=unknown))
        assert missing.value.code() == grpc.StatusCode.NOT_FOUND
