"""Every command and every program of the README does what it says, on a real luthierd with trainers without torch."""

import ast
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from daemon import Daemon, puppet, until

from luthier.v1 import fine_tuning_pb2 as ft
from luthier.v1.job_pb2 import Job, JobState

Start = Callable[..., Daemon]
ROOT = Path(__file__).parents[2]
SHIM = Path(__file__).with_name("grpcurl_shim.py")
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def section(title: str) -> str:
    """A section of the README, without its heading."""
    text = (ROOT / "README.md").read_text()
    (body,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return str(body)


def blocks(title: str, language: str) -> list[str]:
    """The code blocks of a section, verbatim."""
    found = [code for kind, code in _BLOCK.findall(section(title)) if kind == language]
    assert found
    return found


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A folder to work in: the examples, and a `grpcurl` that the test has brought along."""
    folder = tmp_path / "desk"
    (folder / "bin").mkdir(parents=True)
    (folder / "examples").symlink_to(ROOT / "examples")
    grpcurl = folder / "bin" / "grpcurl"
    grpcurl.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{SHIM}" "$@"\n')
    grpcurl.chmod(0o755)
    return folder


def run(words: list[str], desk: Path, daemon: Daemon, text: str = "") -> str:
    """Runs a command at the desk; returns its output, and fails with it when the command does."""
    programs = [str(desk / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    variables = os.environ | {"PATH": os.pathsep.join(programs), "LUTHIER_ENDPOINT": daemon.address}
    done = subprocess.run(words, input=text, cwd=desk, env=variables, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    return done.stdout


def jobs(daemon: Daemon) -> dict[str, Job]:
    found = daemon.fine_tuning.ListJobs(ft.ListJobsRequest()).jobs
    return {job.spec.display_name: job for job in found}


def test_the_tour_with_grpcurl_runs_word_by_word(daemons: Start, desk: Path) -> None:
    daemon = daemons(*puppet(steps=100_000, step_seconds=0.02))
    script = "\n".join(blocks("A tour with grpcurl", "sh"))
    output = run(["bash", "-euo", "pipefail", "-s"], desk, daemon, script)
    assert "luthier.v1.Models" in output
    assert "rpc WatchJob" in output
    found = jobs(daemon)
    assert found["cards"].state == JobState.JOB_STATE_SUCCEEDED
    assert found["cards"].progress.step == 20
    ended = JobState.JOB_STATE_CANCELLED
    until(lambda: jobs(daemon)["too long"].state == ended, 20, "the end of the cancelled job")
    # Two watches, one from the start and one after the tenth event, both to the end.
    assert output.count('"reason": "FINISHED"') == 2
    assert output.count('"jobId"') == 2 * found["cards"].last_sequence - 10


def test_the_commands_for_the_shell_run_word_by_word(daemons: Start, desk: Path) -> None:
    daemon = daemons(*puppet(steps=10))
    (script,) = blocks("From the shell", "sh")
    output = run(["bash", "-euo", "pipefail", "-s"], desk, daemon, script)
    assert "succeeded" in output
    assert any((desk / "my-model").iterdir())


@pytest.mark.parametrize("number", [0, 1])
def test_the_programs_for_the_client_run_as_they_stand(daemons: Start, desk: Path, number: int) -> None:
    daemon = daemons(*puppet(steps=10))
    daemon.upload()
    daemon.wait(daemon.create().id)
    program = blocks("From Python", "python")[number]
    lines = run([sys.executable, "-W", "error", "-c", program], desk, daemon).splitlines()
    assert len(lines) == (10, 1)[number]
    assert (desk / "my-model").is_dir() == (number == 0)


def test_the_line_without_a_server_fits_the_function() -> None:
    from luthier_trainer import fine_tune

    (program,) = blocks("Without a server", "python")
    (call,) = [node for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Call)]
    assert isinstance(call.func, ast.Name)
    assert call.func.id == fine_tune.__name__
    values = [ast.literal_eval(each) for each in call.args]
    named = {each.arg: ast.literal_eval(each.value) for each in call.keywords if each.arg}
    bound = inspect.signature(fine_tune).bind(*values, **named)
    assert (ROOT / bound.arguments["data"]).is_file()


def test_the_make_targets_of_the_start_exist() -> None:
    named = re.findall(r"^make (\w+) +#", section("Start"), re.MULTILINE)
    assert named == ["demo", "test", "serve"]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(named) <= set(targets)
