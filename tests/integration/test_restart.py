"""Stopping, killing and starting luthierd loses no job and no event."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from daemon import Daemon, dense, kinds, puppet, reason, small, until

from luthier.v1 import fine_tuning_pb2 as ft
from luthier.v1.event_pb2 import JobEvent
from luthier.v1.job_pb2 import Checkpoints, JobState
from luthier_client import AsyncClient, Client

Start = Callable[..., Daemon]
SLOW = puppet(steps=60, step_seconds=0.05)


def trained(events: list[JobEvent]) -> list[int]:
    """The steps that count: those of a later attempt replace the discarded ones."""
    steps: list[int] = []
    for event in events:
        if event.HasField("attempt_started"):
            steps = [step for step in steps if step <= event.attempt_started.resumed_from_step]
        if event.HasField("step_completed"):
            steps.append(event.step_completed.step)
    return steps


def test_a_stop_ends_also_the_trainer_of_a_job_that_began_while_the_server_stopped(daemons: Start) -> None:
    late = {"LUTHIER_FAILPOINTS": "after_begin_before_runner=sleep:0.8@2"}
    stubborn = puppet(steps=600, step_seconds=0.1, stubborn=True)
    daemon = daemons(*stubborn, "--stop-trainers", "--slots", "2", "--stop-grace", "2", environment=late)
    daemon.upload()
    first = daemon.create()
    daemon.wait_for_step(first.id, 1)
    second = daemon.create()
    until(lambda: daemon.get(second.id).state == JobState.JOB_STATE_PREPARING, what="the second job's attempt")
    assert daemon.stop() == 0
    daemon.start()
    daemon.wait_for_step(second.id, 1)
    for job in (first, second):
        daemon.fine_tuning.CancelJob(ft.CancelJobRequest(job_id=job.id))


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_trainer_outlives_its_server_and_the_next_one_adopts_it(daemons: Start, end: str) -> None:
    daemon = daemons(*SLOW)
    daemon.upload()
    job = daemon.create()
    waiting = daemon.create()
    daemon.wait_for_step(job.id, 7)
    before = [event for response in _first(daemon, job.id) for event in response.events]
    (trainer,) = daemon.host().trainers
    if end == "stop":
        assert daemon.stop() == 0
    else:
        daemon.kill()
    time.sleep(0.5)
    assert daemon.host().trainers == [trainer]
    daemon.start()
    assert daemon.get(job.id).state == JobState.JOB_STATE_RUNNING
    events = list(daemon.watch(job.id))
    assert dense(events)
    assert events[: len(before)] == before
    assert kinds(events)[-1] == "SUCCEEDED"
    steps = [event.step_completed.step for event in events if event.HasField("step_completed")]
    assert steps == list(range(1, 61))
    assert [e.attempt_started.pid for e in events if e.HasField("attempt_started")] == [trainer.pid]
    assert daemon.wait(waiting.id).state == JobState.JOB_STATE_SUCCEEDED


def test_watchers_of_the_python_client_see_the_whole_log_across_a_kill_and_do_nothing_for_it(daemons: Start) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    daemon = daemons(*puppet(steps=150, step_seconds=0.05), "--listen", f"127.0.0.1:{port}")
    daemon.upload()
    job = daemon.create()
    seen: list[list[JobEvent]] = []

    def watch() -> None:
        with Client(daemon.address) as client:
            seen.append(list(client.get_job(job.id).watch()))

    async def watch_async() -> None:
        async with AsyncClient(daemon.address) as client:
            seen.append([event async for event in (await client.get_job(job.id)).watch()])

    watchers = [threading.Thread(target=watch), threading.Thread(target=lambda: asyncio.run(watch_async()))]
    for watcher in watchers:
        watcher.start()
    daemon.wait_for_step(job.id, 10)
    (trainer,) = daemon.host().trainers
    daemon.kill()
    time.sleep(5)
    daemon.start()
    for watcher in watchers:
        watcher.join(60)
    whole = list(daemon.watch(job.id))
    assert dense(whole)
    assert kinds(whole)[-1] == "SUCCEEDED"
    assert seen == [whole, whole]
    assert [e.attempt_started.pid for e in whole if e.HasField("attempt_started")] == [trainer.pid]
    assert [e.step_completed.step for e in whole if e.HasField("step_completed")] == list(range(1, 151))


def test_a_server_that_stops_its_trainers_goes_on_from_their_checkpoints(daemons: Start) -> None:
    daemon = daemons(*SLOW, "--stop-trainers")
    daemon.upload()
    job = daemon.create(small(checkpoints=Checkpoints(every_steps=5)))
    daemon.wait_for_step(job.id, 7)
    assert daemon.stop() == 0
    with pytest.raises(OSError):
        daemon.host()
    daemon.start()
    events = list(daemon.watch(job.id))
    assert dense(events)
    assert kinds(events)[-1] == "SUCCEEDED"
    assert trained(events) == list(range(1, 61))
    attempts = [event.attempt_started for event in events if event.HasField("attempt_started")]
    assert [each.attempt for each in attempts] == [1, 2]
    assert attempts[1].reason == "SERVER_RESTARTED"
    assert attempts[1].resumed_from_step >= 5


def test_an_adopted_trainer_can_be_cancelled_also_by_what_was_asked_before_the_server_died(daemons: Start) -> None:
    daemon = daemons(*puppet(steps=10_000, step_seconds=0.05, stubborn=True), "--cancel-grace", "1")
    daemon.upload()
    job = daemon.create()
    daemon.wait_for_step(job.id, 2)
    daemon.fine_tuning.CancelJob(ft.CancelJobRequest(job_id=job.id))
    daemon.kill()
    daemon.start()
    assert daemon.wait(job.id).state == JobState.JOB_STATE_CANCELLED
    assert not daemon.host().trainers


def test_a_trainer_that_died_with_its_server_is_tried_again(daemons: Start) -> None:
    daemon = daemons(*SLOW, "--retry-seconds", "0.1")
    daemon.upload()
    job = daemon.create(small(checkpoints=Checkpoints(every_steps=5)))
    daemon.wait_for_step(job.id, 7)
    host = daemon.host()
    daemon.kill()
    os.kill(host.host_pid, signal.SIGKILL)
    os.killpg(host.trainers[0].pid, signal.SIGKILL)
    daemon.start()
    events = list(daemon.watch(job.id))
    assert dense(events)
    assert trained(events) == list(range(1, 61))
    assert [e.attempt_started.reason for e in events if e.HasField("attempt_started")] == ["FIRST", "WORKER_LOST"]


def _first(daemon: Daemon, job_id: str) -> list[ft.WatchJobResponse]:
    stream = daemon.fine_tuning.WatchJob(ft.WatchJobRequest(job_id=job_id))
    response = next(stream)
    stream.cancel()
    return [response]


def test_a_job_that_finished_while_no_server_was_there_has_succeeded(daemons: Start) -> None:
    daemon = daemons(*puppet(steps=30, step_seconds=0.05))
    daemon.upload()
    job = daemon.create()
    daemon.wait_for_step(job.id, 3)
    daemon.kill()
    until(lambda: not daemon.host().trainers, what="the trainer's end")
    daemon.start()
    events = list(daemon.watch(job.id))
    assert dense(events)
    assert kinds(events)[-1] == "SUCCEEDED"
    assert {event.attempt for event in events} == {0, 1}


def test_a_draining_server_ends_watches_with_unavailable_and_never_with_ok(daemons: Start) -> None:
    daemon = daemons(*SLOW)
    daemon.upload()
    job = daemon.create()
    ended: list[grpc.RpcError] = []

    def watch() -> None:
        try:
            for _ in daemon.watch(job.id):
                pass
        except grpc.RpcError as error:
            ended.append(error)

    watcher = threading.Thread(target=watch)
    watcher.start()
    daemon.wait_for_step(job.id, 3)
    daemon.process.terminate()
    watcher.join(20)
    assert ended[0].code() == grpc.StatusCode.UNAVAILABLE
    assert reason(ended[0]) == "SERVER_DRAINING"
    assert daemon.process.wait(20) == 0


def test_a_second_server_on_the_same_data_or_the_same_port_is_refused(daemons: Start, tmp_path: Path) -> None:
    daemon = daemons()

    def start(data: Path, listen: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "luthier_server.main", "--data-dir", str(data), "--listen", listen]
        return subprocess.run([*command, "--warm", "off"], capture_output=True, text=True, timeout=30)

    same_data = start(daemon.data_dir, "127.0.0.1:0")
    assert (same_data.returncode, "another luthierd works on" in same_data.stderr) == (2, True)
    same_port = start(tmp_path / "second", daemon.address)
    assert (same_port.returncode, "cannot listen on" in same_port.stderr) == (2, True)
    outside = start(tmp_path / "third", "0.0.0.0:0")
    assert (outside.returncode, "--insecure-bind" in outside.stderr) == (2, True)


def test_a_server_loads_neither_torch_nor_the_trainer() -> None:
    program = (
        "import sys, luthier_server.main\n"
        "assert not {'torch', 'transformers', 'numpy', 'luthier_trainer', 'luthier_client'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
