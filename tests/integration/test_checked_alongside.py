"""A job on many rows makes its first steps while its datasets are still being checked."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from daemon import Daemon, kinds, small, until

from luthier.v1 import datasets_pb2 as ds
from luthier.v1 import fine_tuning_pb2 as ft
from luthier.v1.job_pb2 import Hyperparameters, JobSpec, JobState

COUNT = 12_000
"""So many that more than half of them are left after half a second on any machine."""


def rows(name: str) -> bytes:
    """Chats of their own for each name."""
    turns = (
        {
            "prompt": f"What does {name} {number} say?",
            "completion": f"It says {number}. " * 30,
        }
        for number in range(1, COUNT + 1)
    )
    return b"".join(json.dumps(each).encode() + b"\n" for each in turns)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    served = Daemon(tmp_path_factory.mktemp("alongside"), ["--threads", "1"]).start()
    yield served
    served.close()


def job(name: str, **numbers: Any) -> JobSpec:
    hyperparameters = Hyperparameters(**({"max_steps": 100_000, "batch_size": 2, "max_length": 64} | numbers))
    return small(training_dataset=name, hyperparameters=hyperparameters)


def cancelled(daemon: Daemon, job_id: str) -> None:
    daemon.fine_tuning.CancelJob(ft.CancelJobRequest(job_id=job_id))
    assert daemon.wait(job_id).state == JobState.JOB_STATE_CANCELLED


def test_the_first_step_comes_before_the_end_of_the_check_and_the_check_comes_to_its_end(daemon: Daemon) -> None:
    daemon.upload(rows("one"), "one")
    created = daemon.create(job("one"))
    told = []
    for event in daemon.watch(created.id):
        told.append(event)
        if event.HasField("datasets_checked"):
            break
    order = [each for each in kinds(told) if each in ("VALIDATING", "QUEUED", "PREPARING", "RUNNING")]
    assert order == ["VALIDATING", "QUEUED", "PREPARING", "RUNNING"]
    reasons = [each.state_changed.reason for each in told if each.HasField("state_changed")]
    assert reasons == ["SUBMITTED", "VALIDATING_ALONGSIDE", "SLOT_FREE", "TRAINING"]
    assert told[-1].datasets_checked.training.statistics.rows == COUNT
    assert any(each.HasField("step_completed") for each in told)
    cancelled(daemon, created.id)


def test_a_cancel_ends_the_trainer_and_the_check(daemon: Daemon) -> None:
    daemon.upload(rows("two"), "two")
    created = daemon.create(job("two"))
    daemon.wait_for_step(created.id, 1)
    assert any((daemon.data_dir / "work").iterdir())
    cancelled(daemon, created.id)
    until(lambda: not any((daemon.data_dir / "work").iterdir()), what="the end of the check")
    assert "datasets_checked" not in kinds(list(daemon.watch(created.id)))


@pytest.mark.parametrize("dies", [False, True], ids=["hangs", "dies"])
def test_a_job_deleted_beside_its_check_takes_no_more_than_the_check_with_it(daemon: Daemon, dies: bool) -> None:
    work, name = daemon.data_dir / "work", "deleted-dies" if dies else "deleted"
    dataset = daemon.upload(rows(name), name)
    created = daemon.create(job(name))
    daemon.wait_for_step(created.id, 1)
    [check] = [each.pid for each in daemon.host().trainers if each.attempt_dir.startswith(str(work))]
    os.kill(check, signal.SIGSTOP)  # it tells nothing more
    cancelled(daemon, created.id)
    daemon.fine_tuning.DeleteJob(ft.DeleteJobRequest(job_id=created.id))
    daemon.datasets.DeleteDataset(ds.DeleteDatasetRequest(dataset=dataset.id))
    if dies:
        os.killpg(check, signal.SIGKILL)
    until(lambda: not any(work.iterdir()), what="the end of the check")
    daemon.upload()
    for _ in range(2):
        ended = daemon.wait(daemon.create(small(hyperparameters=Hyperparameters(max_steps=2))).id)
        assert ended.state == JobState.JOB_STATE_SUCCEEDED
    assert daemon.process.poll() is None


def test_an_error_far_down_ends_a_job_that_trains_with_its_line(daemon: Daemon) -> None:
    # The template has the last word: a row that is sound for an upload.
    refusing = (
        "{% for m in messages %}"
        "{% if 'three 11999 say' in m['content'] %}{{ raise_exception('not this one') }}{% endif %}"
        "{{ m['role'] }}: {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + eos_token }}"
        "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    daemon.upload(rows("three"), "three")
    spec = job("three")
    spec.fine_tune.tokenization.chat_template = refusing
    created = daemon.create(spec)
    ended = daemon.wait(created.id)
    assert (ended.state, ended.attempt) == (JobState.JOB_STATE_FAILED, 1)
    assert ended.error.reason == "DATASET_INVALID"
    assert "line 11999: " in ended.error.message
    assert "not this one" in ended.error.message
    assert ended.progress.step > 0


def test_a_server_that_was_killed_checks_what_trains_already(daemons: Callable[..., Daemon]) -> None:
    daemon = daemons("--threads", "1")
    daemon.upload(rows("four"), "four")
    created = daemon.create(job("four"))
    daemon.wait_for_step(created.id, 1)
    daemon.kill()
    daemon.start()
    for event in daemon.watch(created.id):
        if event.HasField("datasets_checked"):
            break
    else:
        pytest.fail("the job ended unchecked")
    cancelled(daemon, created.id)
