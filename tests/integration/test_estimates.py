"""What a job would take, told by a real luthierd with a real trainer host; and jobs refused for lack of room."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from daemon import Daemon, details, reason, small, until

from luthier.v1 import fine_tuning_pb2 as ft
from luthier.v1.estimate_pb2 import JobEstimate, SpeedBasis
from luthier.v1.job_pb2 import Dtype, Hyperparameters, Job, JobSpec, JobState
from luthier_client import Client
from luthier_client.spec import apply_settings, load_spec

Start = Callable[..., Daemon]
ROWS = b"".join(
    json.dumps({"prompt": f"What follows {n}?", "completion": f"After {n} comes {n + 1}. " * (1 + n % 4)}).encode()
    + b"\n"
    for n in range(60)
)
LONG = json.dumps({"prompt": "Count.", "completion": "one two three four five " * 180}).encode() + b"\n"


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    flags = ["--threads", "1", "--price-per-device-hour", "3.6", "--currency", "EUR"]
    served = Daemon(tmp_path_factory.mktemp("estimates"), flags).start()
    served.upload(ROWS)
    ask(served, spec())  # once the host is warm
    yield served
    assert not list((served.data_dir / "work").iterdir())
    served.close()


def spec(**task: Any) -> JobSpec:
    numbers = Hyperparameters(max_steps=4, batch_size=8, dtype=Dtype.DTYPE_FLOAT32)
    return small(**({"hyperparameters": numbers} | task))


def created(daemon: Daemon, spec: JobSpec, *, validate_only: bool) -> Job:
    request = ft.CreateJobRequest(spec=spec, validate_only=validate_only)
    job: Job = daemon.fine_tuning.CreateJob(request).job
    return job


def refused(daemon: Daemon, spec: JobSpec) -> bool:
    try:
        created(daemon, spec, validate_only=True)
    except grpc.RpcError as error:
        return reason(error) == "DOES_NOT_FIT"
    return False


def ask(daemon: Daemon, spec: JobSpec, probe: bool = False, timeout: float = 120) -> ft.EstimateJobResponse:
    request = ft.EstimateJobRequest(spec=spec, probe=probe)
    response: ft.EstimateJobResponse = daemon.fine_tuning.EstimateJob(request, timeout=timeout)
    return response


def test_an_estimate_tells_what_the_job_then_takes_and_costs(daemon: Daemon) -> None:
    response = ask(daemon, spec(validation_fraction=0.1))
    found = response.estimate
    assert response.resolved_spec.fine_tune.lora.rank == 16
    assert (found.total_steps, found.training_rows, found.validation_rows) == (4, 54, 6)
    assert found.speed_basis == SpeedBasis.SPEED_BASIS_FORMULA
    assert (found.fits, list(found.remedies)) == (True, [])
    assert found.cost == pytest.approx(found.seconds / 1000)
    assert found.currency == "EUR"
    assert 0 < found.device_memory.needed_bytes < found.device_memory.total_bytes
    assert 0 < found.disk.needed_bytes < found.disk.free_bytes
    assert not list(daemon.fine_tuning.ListJobs(ft.ListJobsRequest()).jobs)

    job = daemon.create(response.resolved_spec)
    ended = daemon.wait(job.id)
    assert ended.state == JobState.JOB_STATE_SUCCEEDED
    assert ended.progress.trained_tokens == found.training_tokens
    again = ask(daemon, spec(validation_fraction=0.1)).estimate
    assert again.speed_basis == SpeedBasis.SPEED_BASIS_HISTORY
    assert again.training_tokens == found.training_tokens


def test_a_spec_that_breaks_rules_is_refused_as_create_refuses_it(daemon: Daemon) -> None:
    wrong = spec(hyperparameters=Hyperparameters(epochs=0, max_steps=0))
    wrong.priority = 3
    found = []
    for call in (lambda: ask(daemon, wrong), lambda: daemon.create(wrong)):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        found.append([each.field for each in details(caught.value)["BadRequest"].field_violations])
    assert found[0] == found[1]
    assert len(found[0]) == 2
    with pytest.raises(grpc.RpcError) as caught:
        ask(daemon, spec(training_dataset="absent"))
    assert reason(caught.value) == "DATASET_NOT_FOUND"


def test_what_would_fail_the_job_fails_the_estimate_with_its_field(daemon: Daemon) -> None:
    wanted = spec()
    wanted.fine_tune.tokenization.chat_template = "{{ nothing"
    with pytest.raises(grpc.RpcError) as caught:
        ask(daemon, wanted)
    assert reason(caught.value) == "TEMPLATE_INVALID"
    [violation] = details(caught.value)["BadRequest"].field_violations
    assert violation.field == "spec.fine_tune.tokenization.chat_template"


def test_a_probe_measures_in_a_free_slot_and_leaves_nothing(daemon: Daemon) -> None:
    found = ask(daemon, spec(), probe=True).estimate
    assert found.speed_basis == SpeedBasis.SPEED_BASIS_PROBE
    assert found.tokens_per_second > 0
    assert found.seconds > 0
    assert not list((daemon.data_dir / "work").iterdir())


def test_a_probe_needs_a_slot_and_nothing_starts_in_it_meanwhile(daemon: Daemon) -> None:
    running = daemon.create(spec(hyperparameters=Hyperparameters(max_steps=100_000, batch_size=8)))
    daemon.wait_for_step(running.id, 1)
    with pytest.raises(grpc.RpcError) as caught:
        ask(daemon, spec(), probe=True)
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert reason(caught.value) == "NO_FREE_SLOT"
    assert ask(daemon, spec()).estimate.total_steps == 4
    daemon.fine_tuning.CancelJob(ft.CancelJobRequest(job_id=running.id))
    assert daemon.wait(running.id).state == JobState.JOB_STATE_CANCELLED

    answers: list[JobEstimate] = []
    work = daemon.data_dir / "work"
    probing = threading.Thread(target=lambda: answers.append(ask(daemon, spec(), probe=True).estimate))
    until(lambda: not any(work.iterdir()), what="an empty work folder")
    probing.start()
    until(lambda: any(work.iterdir()), what="the probe")
    job = daemon.create(spec())
    states = [each.state_changed for each in daemon.watch(job.id) if each.HasField("state_changed")]
    probing.join()
    assert answers[0].speed_basis == SpeedBasis.SPEED_BASIS_PROBE
    assert states[-1].state == JobState.JOB_STATE_SUCCEEDED


def test_a_caller_who_leaves_ends_the_probe_and_frees_the_slot(daemon: Daemon) -> None:
    work = daemon.data_dir / "work"
    request = ft.EstimateJobRequest(spec=spec(), probe=True)
    call = daemon.fine_tuning.EstimateJob.future(request)
    until(lambda: any(work.iterdir()), what="the probe")
    call.cancel()
    until(lambda: not any(work.iterdir()), what="the end of the probe")
    assert not daemon.host().trainers, "the slot is not free before the process has gone"
    assert daemon.wait(daemon.create(spec()).id).state == JobState.JOB_STATE_SUCCEEDED


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A device with just less memory than a row of a thousand tokens takes."""
    served = Daemon(
        tmp_path_factory.mktemp("narrow"), ["--threads", "1", "--device-memory-bytes", "125_000_000"]
    ).start()
    served.upload(ROWS)
    served.upload(ROWS + LONG, "long")
    ask(served, spec())  # once the host is warm
    yield served
    served.close()


def test_a_job_that_cannot_fit_is_refused_with_what_makes_it_fit(narrow: Daemon) -> None:
    assert created(narrow, spec(), validate_only=True).state == JobState.JOB_STATE_VALIDATING
    wanted = spec(training_dataset="long")
    until(lambda: refused(narrow, wanted), 60, "the refusal")  # a busy machine may not know in time
    for validate_only in (True, False):
        with pytest.raises(grpc.RpcError) as caught:
            created(narrow, wanted, validate_only=validate_only)
        assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        info = details(caught.value)["ErrorInfo"]
        assert info.reason == "DOES_NOT_FIT"
        assert int(info.metadata["needed_bytes"]) > int(info.metadata["available_bytes"]) == 125_000_000
        assert "MiB" in str(caught.value.details())
        assert info.metadata["hint"].startswith("Lower max_length to ")
    assert not list(narrow.fine_tuning.ListJobs(ft.ListJobsRequest()).jobs)

    found = ask(narrow, wanted).estimate
    assert not found.fits
    wanted.fine_tune.hyperparameters.max_length = int(found.remedies[0].split()[3])
    assert ask(narrow, wanted).estimate.fits
    assert narrow.wait(narrow.create(wanted).id).state == JobState.JOB_STATE_SUCCEEDED


def test_the_command_prints_what_a_job_would_take(narrow: Daemon, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(
        "fine_tune:\n  base_model: builtin/tiny\n  training_dataset: long\n"
        "  hyperparameters: {max_steps: 4, batch_size: 8, dtype: float32}\n"
    )

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "luthier_client.cli.main", *more]
        environment = {**os.environ, "LUTHIER_ENDPOINT": narrow.address}
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)

    shown = run("job", "create", "-f", str(file), "--dry-run")
    assert shown.returncode == 1, shown.stderr
    assert "it does not fit" in shown.stdout
    assert "Lower max_length to" in shown.stdout
    fitting = run("-o", "json", "job", "create", "-f", str(file), "--dry-run", "--set", "training_dataset=rows")
    assert fitting.returncode == 0, fitting.stderr
    with Client(narrow.address) as client:
        wanted = load_spec(str(file))
        apply_settings(wanted, ["training_dataset=rows"])
        told = client.estimate_job(wanted).estimate
    assert int(json.loads(fitting.stdout)["estimate"]["training_tokens"]) == told.training_tokens


def test_a_host_that_gives_no_answer_keeps_no_job_from_being_created(daemons: Start) -> None:
    daemon = daemons("--external-host", "--device-memory-bytes", "1000")
    daemon.upload(ROWS)
    assert daemon.create(spec()).state == JobState.JOB_STATE_VALIDATING
    with pytest.raises(grpc.RpcError) as caught:
        ask(daemon, spec())
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
