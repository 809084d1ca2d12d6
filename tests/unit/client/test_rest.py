"""Pausing, resuming, deleting, checkpoints and going on from one: in the library and in the command."""

import json
import re
from pathlib import Path

import pytest
import yaml
from unit.client.command import Terminal, job_file, run
from unit.client.fake_server import FakeServer, job_spec

from luthier.v1.event_pb2 import AttemptStarted, JobEvent, ResumeChecked, StepCompleted
from luthier.v1.job_pb2 import JOB_STATE_PAUSED, JOB_STATE_QUEUED, JOB_STATE_RUNNING, JOB_STATE_SUCCEEDED, Job
from luthier_client import AsyncClient, Client, WatchOptions, errors
from luthier_client.cli.lines import describe
from luthier_client.cli.picture import JobPicture

QUICK = WatchOptions(first_pause=0.01, longest_pause=0.05)


async def test_a_job_is_paused_resumed_and_deleted_on_both_stacks(endpoint: str) -> None:
    with Client(endpoint) as client:
        job = client.create_job(job_spec(steps="40", pace="0.02"))
        for event in job.watch():
            if event.step_completed.step == 5:
                break
        assert job.pause().state == JOB_STATE_PAUSED
        assert job.pause().state == JOB_STATE_PAUSED
        assert job.resume().state in (JOB_STATE_QUEUED, JOB_STATE_RUNNING)
        assert job.wait(timeout=20).state == JOB_STATE_SUCCEEDED
        events = list(job.watch())
        steps = [event.step_completed.step for event in events if event.HasField("step_completed")]
        assert steps == list(range(1, 41))
        with pytest.raises(errors.FailedPrecondition) as ended:
            job.pause()
        assert ended.value.reason == "JOB_ENDED"
        assert job.delete().id == job.id
        with pytest.raises(errors.NotFound):
            job.refresh()
    async with AsyncClient(endpoint) as other:
        same = await other.create_job(job_spec(steps="400", pace="0.02"))
        with pytest.raises(errors.FailedPrecondition) as busy:
            await same.delete()
        assert busy.value.reason == "JOB_NOT_AT_REST"
        assert (await same.pause()).state == JOB_STATE_PAUSED
        assert (await same.resume()).state != JOB_STATE_PAUSED
        await same.pause()
        assert (await same.delete()).state == JOB_STATE_PAUSED


async def test_a_watch_of_a_job_that_is_deleted_ends_and_does_not_ask_again_for_ever(endpoint: str) -> None:
    with Client(endpoint) as client:
        job = client.create_job(job_spec(steps="400", pace="0.02"))
        job.pause()
        events = job.watch(options=QUICK)
        assert next(events).sequence == 1
        job.delete()
        with pytest.raises(errors.NotFound):
            list(events)


async def test_checkpoints_are_listed_newest_first_with_the_name_that_resume_from_takes(endpoint: str) -> None:
    with Client(endpoint) as client:
        job = client.create_job(job_spec(steps="4"))
        [found] = job.checkpoints()
    assert (found.name, found.step, found.attempt, found.size_bytes) == (f"{job.id}:step-4", 4, 1, 4096)
    async with AsyncClient(endpoint) as other:
        assert await (await other.get_job(job.id)).checkpoints() == [found]


def test_the_command_pauses_resumes_and_deletes(own_server: FakeServer, tmp_path: Path) -> None:
    server = own_server.endpoint
    file = job_file(tmp_path, steps="2000", pace="0.05")
    job_id = run("job", "create", "-f", file, "-o", "id", endpoint=server).stdout.strip()
    assert run("job", "pause", "@latest", endpoint=server).stdout == f"paused {job_id}\n"
    refused = run("job", "resume", "job_99", endpoint=server)
    assert refused.returncode == 1 and "no job begins with" in refused.stderr
    assert re.match(rf"(queued|preparing|running) {job_id}\n", run("job", "resume", job_id, endpoint=server).stdout)
    busy = run("job", "delete", job_id, endpoint=server)
    assert busy.returncode == 1 and "not in this state" in busy.stderr
    paused = json.loads(run("job", "pause", job_id[:18], "-o", "json", endpoint=server).stdout)
    assert paused["state"] == "JOB_STATE_PAUSED"
    # Without a terminal nothing is asked.
    assert run("job", "delete", job_id, "-o", "id", endpoint=server).stdout == f"{job_id}\n"
    assert run("job", "list", "-o", "id", endpoint=server).stdout == ""


def test_deleting_on_a_terminal_asks_first_unless_told_not_to(own_server: FakeServer, tmp_path: Path) -> None:
    server = own_server.endpoint
    for _ in range(3):
        run("job", "create", "-f", job_file(tmp_path), endpoint=server)
    refused = Terminal("job", "delete", "@latest", endpoint=server)
    refused.until("with its events and checkpoints? [y/N]")
    refused.type("n\n")
    assert refused.end() == 1
    assert len(run("job", "list", "-o", "id", endpoint=server).stdout.split()) == 3
    agreed = Terminal("job", "delete", "@latest", endpoint=server)
    agreed.until("[y/N]")
    agreed.type("y\n")
    assert agreed.end() == 0 and "deleted job_" in agreed.screen
    unasked = Terminal("job", "delete", "@latest", "--yes", endpoint=server)
    assert unasked.end() == 0 and "[y/N]" not in unasked.screen
    assert len(run("job", "list", "-o", "id", endpoint=server).stdout.split()) == 1


def test_a_job_goes_on_from_a_checkpoint_that_is_named_by_latest_or_a_beginning(
    own_server: FakeServer, tmp_path: Path
) -> None:
    server = own_server.endpoint
    first = run("job", "create", "-f", job_file(tmp_path), "-o", "id", endpoint=server).stdout.strip()
    name = run("job", "checkpoints", "@latest", "-o", "id", endpoint=server).stdout.strip()
    assert name == f"{first}:step-3"
    table = run("job", "checkpoints", first, endpoint=server).stdout
    assert table.split()[:5] == ["NAME", "STEP", "ATTEMPT", "SIZE", "SAVED"] and name in table
    assert json.loads(run("job", "checkpoints", first, "-o", "json", endpoint=server).stdout)[0]["step"] == "3"
    data = tmp_path / "cards.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    for arguments in (
        ["train", str(data), "--detach", "-o", "id", "--resume-from", "@latest:step-3"],
        ["job", "create", "-f", job_file(tmp_path), "-o", "id", "--resume-from", f"{first[:16]}:step-3"],
    ):
        made = run(*arguments, endpoint=server)
        assert made.returncode == 0, made.stderr
        shown = run("job", "get", made.stdout.strip(), endpoint=server).stdout
        assert f"resumed from  {name}" in shown
    only = ["job", "create", "-f", job_file(tmp_path), "--validate-only"]
    plan = run(*only, "--resume-from", f"{first}:step-3", endpoint=server)
    assert yaml.safe_load(plan.stdout)["fine_tune"]["resume_from"] == name
    for wrong in ("@latest", first, f"{first}:3", f"{first}:step-3/.."):
        refused = run("train", str(data), "--resume-from", wrong, endpoint=server)
        assert refused.returncode == 2 and "JOB:step-N" in refused.stderr
    assert run("train", str(data), "--resume-from", "job_99:step-3", endpoint=server).returncode == 1


def test_lines_say_when_a_lost_attempt_is_tried_again_and_that_its_resume_was_verified(
    own_server: FakeServer, tmp_path: Path
) -> None:
    file = job_file(tmp_path, steps="8", retry_at="5", retry_wait="2", pace="0.02")
    shown = run("job", "create", "--watch", "-f", file, endpoint=own_server.endpoint).stdout
    assert "queued  (the trainer was killed)" in shown
    assert re.search(r"^ +tries again at \d\d:\d\d:\d\d$", shown, re.MULTILINE)
    assert "attempt 2 goes on from step 3, 2 steps made again  (WORKER_LOST)" in shown
    assert "resume verified at step 3  loss 1.4434, the same to the last bit" in shown
    assert re.search(r"resumed +at step 3, verified", shown)
    # Read again after its end, the log waits for nothing.
    again = run("job", "watch", "@latest", endpoint=own_server.endpoint).stdout
    assert "tries again at" not in again and "resume verified" in again


def test_the_live_view_shows_the_wait_the_check_and_a_pause(own_server: FakeServer, tmp_path: Path) -> None:
    server = own_server.endpoint
    file = job_file(tmp_path, steps="60", retry_at="10", retry_wait="4", pace="0.05", unequal="1")
    terminal = Terminal("job", "create", "--watch", "-f", file, endpoint=server)
    terminal.until("tries again at")
    assert "the trainer was killed" in terminal.screen
    terminal.until("resume NOT verified at step 8")
    assert run("job", "pause", "@latest", endpoint=server).returncode == 0
    terminal.until("paused until it is resumed")
    assert run("job", "resume", "@latest", endpoint=server).returncode == 0
    terminal.until("resume verified at step")
    terminal.until("✓", timeout=30)
    assert terminal.end() == 0


def test_a_retry_from_the_beginning_and_a_job_from_a_checkpoint_are_told_apart() -> None:
    picture = JobPicture(Job())
    from_checkpoint = AttemptStarted(attempt=1, resumed_from_step=20, discarded_from_step=20, reason="FIRST")
    for event in (JobEvent(attempt_started=from_checkpoint), JobEvent(step_completed=StepCompleted(step=21))):
        picture.add(event)
    assert describe(JobEvent(attempt_started=from_checkpoint), picture) == "attempt 1 goes on from step 20"
    again = JobEvent(attempt_started=AttemptStarted(attempt=2, reason="WORKER_LOST"))
    picture.add(again)
    assert describe(again, picture) == "attempt 2 starts from the beginning, 21 steps made again  (WORKER_LOST)"
    check = ResumeChecked(step=4, recorded_loss=1.25, recomputed_loss=1.5, message="the device: \x1b[2Jcpu")
    line = describe(JobEvent(resume_checked=check), picture)
    assert line is not None and line.startswith("resume NOT verified at step 4  loss 1.25 was saved, 1.5 is computed")
    assert "\x1b" not in line
