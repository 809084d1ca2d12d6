"""What the fault runs have found, each as a test of its own that needs no luck."""

import os
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing

import grpc
import pytest
from daemon import Daemon, puppet, reason, small, until

from luthier.v1.job_pb2 import Hyperparameters, JobState

Start = Callable[..., Daemon]
HOUR_AGO = {"LUTHIER_CLOCK_OFFSET": "-3600"}


def of_steps(steps: int) -> Hyperparameters:
    return Hyperparameters(max_steps=steps)


def test_two_attempts_never_get_the_same_model_although_the_clock_went_back(daemons: Start) -> None:
    daemon = daemons(*puppet(step_seconds=0.05), "--slots", "2")
    daemon.upload()
    daemon.wait(daemon.create(small(hyperparameters=of_steps(2))).id)
    daemon.kill()
    daemon.environment = HOUR_AGO
    daemon.start()
    long = daemon.create(small(hyperparameters=of_steps(120)))
    daemon.wait_for_step(long.id, 1)
    daemon.kill()
    daemon.start()
    short = daemon.create(small(hyperparameters=of_steps(2)))
    models = {daemon.wait(job.id).model_id for job in (short, long)}
    assert len(models) == 2
    assert all(models)


def test_a_retry_set_by_a_clock_that_ran_ahead_is_not_waited_for(daemons: Start) -> None:
    daemon = daemons(*puppet(step_seconds=0.05), "--retry-seconds", "3", environment={"LUTHIER_CLOCK_OFFSET": "3600"})
    daemon.upload()
    job = daemon.create(small(hyperparameters=of_steps(20)))
    daemon.wait_for_step(job.id, 2)
    os.killpg(daemon.host().trainers[0].pid, signal.SIGKILL)
    until(lambda: daemon.get(job.id).state == JobState.JOB_STATE_QUEUED, what="the wait for a retry")
    daemon.kill()
    daemon.environment = {}
    daemon.start()
    until(lambda: daemon.get(job.id).state == JobState.JOB_STATE_SUCCEEDED, 15, "the end of the retry")


def test_a_log_with_a_hole_is_an_error_and_no_endless_watch(daemons: Start) -> None:
    daemon = daemons()
    daemon.upload()
    job = daemon.wait(daemon.create().id)
    daemon.stop()
    with closing(sqlite3.connect(daemon.data_dir / "luthier.db")) as connection, connection:
        connection.execute("DELETE FROM events WHERE job_id = ? AND sequence BETWEEN 10 AND 12", (job.id,))
    daemon.start()
    with pytest.raises(grpc.RpcError) as damaged:
        list(daemon.watch(job.id))
    assert (damaged.value.code(), reason(damaged.value)) == (grpc.StatusCode.DATA_LOSS, "STORE_CORRUPT")
    assert "no event 10" in str(damaged.value.details())


def test_a_call_to_the_database_that_fails_once_stops_no_job(daemons: Start) -> None:
    daemon = daemons(*puppet(step_seconds=0.05), environment={"LUTHIER_FAILPOINTS": "before_commit=raise@4+3"})
    daemon.upload()
    job = daemon.create(small(hyperparameters=of_steps(20)))
    until(lambda: daemon.get(job.id).state == JobState.JOB_STATE_SUCCEEDED, 60, "the end of the job")
    assert daemon.log().count("failpoint before_commit") >= 3
    assert daemon.stop() == 0


def test_a_log_that_cannot_be_written_stops_no_job(daemons: Start) -> None:
    # The log is a file in the data directory here, and outgrows the limit long before the database does.
    daemon = daemons(*puppet(step_seconds=0.01), "--log-level", "debug", limit_file_kib=1024)
    log = daemon.data_dir / "luthierd.log"
    with open(log, "ab") as file:
        file.write(b"." * (1 << 20))
    size = log.stat().st_size
    daemon.upload()
    assert daemon.wait(daemon.create().id).state == JobState.JOB_STATE_SUCCEEDED
    assert log.stat().st_size == size
