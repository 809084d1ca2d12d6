"""Old events go, and what a watch promises about them holds."""

import uuid
from collections.abc import Callable

import grpc
import pytest
from daemon import Daemon, details, kinds, puppet, reason, until

from luthier.v1 import fine_tuning_pb2 as ft

Start = Callable[..., Daemon]
MONTH = str(31 * 24 * 3600)


def test_events_past_their_retention_are_said_to_be_gone_and_the_terminal_one_stays(daemons: Start) -> None:
    daemon = daemons()
    daemon.upload()
    job = daemon.wait(daemon.create().id)
    daemon.stop()
    daemon.environment = {"LUTHIER_CLOCK_OFFSET": MONTH}
    daemon.start()

    def compacted() -> grpc.RpcError | None:
        try:
            list(daemon.watch(job.id))
        except grpc.RpcError as error:
            return error
        return None

    error = until(compacted, what="the compaction")
    assert (error.code(), reason(error)) == (grpc.StatusCode.OUT_OF_RANGE, "EVENTS_COMPACTED")
    metadata = details(error)["ErrorInfo"].metadata
    assert metadata["head_sequence"] == metadata["oldest_sequence"] == str(job.last_sequence)
    last = list(daemon.watch(job.id, job.last_sequence - 1))
    assert [event.sequence for event in last] == [job.last_sequence]
    assert kinds(last) == ["SUCCEEDED"]
    assert not list(daemon.watch(job.id, job.last_sequence))


def test_a_job_that_has_not_ended_keeps_all_its_events(daemons: Start) -> None:
    daemon = daemons(*puppet(steps=10_000, step_seconds=0.05))
    daemon.upload()
    job = daemon.create()
    daemon.wait_for_step(job.id, 3)
    daemon.fine_tuning.PauseJob(ft.PauseJobRequest(job_id=job.id))
    until(lambda: daemon.get(job.id).state == 6, what="the pause")
    daemon.stop()
    daemon.environment = {"LUTHIER_CLOCK_OFFSET": MONTH}
    daemon.start()
    stream = daemon.fine_tuning.WatchJob(ft.WatchJobRequest(job_id=job.id), timeout=20)
    assert next(stream).events[0].sequence == 1
    stream.cancel()


def test_the_request_of_a_deleted_job_is_forgotten_after_a_week(daemons: Start) -> None:
    daemon = daemons()
    daemon.upload()
    request_id = str(uuid.uuid4())
    job = daemon.wait(daemon.create(request_id=request_id).id)
    daemon.fine_tuning.DeleteJob(ft.DeleteJobRequest(job_id=job.id))
    with pytest.raises(grpc.RpcError) as deleted:
        daemon.create(request_id=request_id)
    assert reason(deleted.value) == "JOB_DELETED"
    daemon.stop()
    daemon.environment = {"LUTHIER_CLOCK_OFFSET": MONTH}
    daemon.start()

    def created() -> bool:
        try:
            return bool(daemon.create(request_id=request_id).id)
        except grpc.RpcError:
            return False

    until(created, what="the week's end")
