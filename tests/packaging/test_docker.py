"""The Dockerfile and compose.yaml, as far as they can be tried without a Docker daemon.

The files that an image copies are copied, its pip lines are run in a fresh environment, and its commands and health
checks are run as they stand, with a temporary folder for /data. What is not run: apt-get, useradd, and the isolation.
"""

import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from daemon import ROWS, until

from luthier.v1.job_pb2 import FineTuneTask, JobSpec, JobState
from luthier_client import Client

ROOT = Path(__file__).parents[2]
TORCH_FREE = "import importlib.util as u; assert not any(u.find_spec(m) for m in ('torch', 'numpy', 'transformers'))"


@dataclass(frozen=True)
class Instruction:
    """One instruction of a Dockerfile: `RUN`, and all that follows it."""

    name: str
    text: str


def stages() -> dict[str, list[Instruction]]:
    """Each stage with the instructions of those it is made from before its own."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    found: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if not line.strip():
            continue
        name, text = line.split(maxsplit=1)
        if name == "FROM":
            source, _, stage = text.partition(" AS ")
            current = found[stage] = list(found.get(source, []))
        current.append(Instruction(name, text))
    return found


def last(instructions: Sequence[Instruction], name: str) -> str:
    """The instruction that counts."""
    return [each.text for each in instructions if each.name == name][-1]


def environment(instructions: Sequence[Instruction]) -> dict[str, str]:
    """What ENV sets."""
    pairs = (shlex.split(each.text) for each in instructions if each.name == "ENV")
    return dict(pair.split("=", 1) for each in pairs for pair in each)


def command(instructions: Sequence[Instruction]) -> list[str]:
    """Entry point and command; tini stands before both and changes nothing in what they do."""
    entry = json.loads(last(instructions, "ENTRYPOINT"))
    assert entry == ["tini", "--"]
    return [str(part) for part in json.loads(last(instructions, "CMD"))]


def health(instructions: Sequence[Instruction]) -> list[str]:
    """The command of the health check."""
    return [str(part) for part in json.loads(last(instructions, "HEALTHCHECK").partition("CMD ")[2])]


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps the path out of the build; the last pattern that matches it or a parent decides."""
    result = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        regex = re.escape(pattern.removeprefix("!")).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        if re.fullmatch(f"{regex}(/.*)?", path):
            result = not pattern.startswith("!")
    return result


def copy(instructions: Sequence[Instruction], folder: Path) -> None:
    """Does what COPY does, into `folder` for the working directory."""
    for each in instructions:
        if each.name != "COPY":
            continue
        source, target = each.text.split()
        files = [path for path in (ROOT / source, *(ROOT / source).rglob("*")) if path.is_file()]
        kept = [path for path in files if not ignored(path.relative_to(ROOT).as_posix())]
        assert kept, f"COPY {each.text} finds nothing: see .dockerignore"
        for path in kept:
            inside = path.name if target == "./" else f"{target}/{path.relative_to(ROOT / source)}"
            (folder / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / inside)


def pip_lines(instructions: Sequence[Instruction]) -> list[str]:
    """The RUN lines that install Python packages."""
    return [each.text for each in instructions if each.name == "RUN" and each.text.startswith("pip ")]


@dataclass(frozen=True)
class Image:
    """A stand-in for an image: its instructions, and a folder of programs in the place of its PATH."""

    instructions: Sequence[Instruction]
    programs: Path
    data: Path
    extra: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def run(self, words: Sequence[str], **more: str) -> "subprocess.Popen[bytes]":
        """Starts a command of the image, with the temporary folder wherever it says /data."""
        own = environment(self.instructions) | dict(self.extra) | more
        variables = {name: value.replace("/data", str(self.data)) for name, value in own.items()}
        outside = {name: value for name, value in os.environ.items() if not name.startswith(("LUTHIER_", "PYTHON"))}
        outside["PATH"] = f"{self.programs}{os.pathsep}{outside['PATH']}"
        arguments = [word.replace("/data", str(self.data)) for word in words]
        executable = shutil.which(arguments[0], path=outside["PATH"])
        assert executable is not None and Path(executable).parent == self.programs
        output = open(self.data / "output.log", "ab")  # noqa: SIM115 - the process has it
        try:
            return subprocess.Popen(
                [executable, *arguments[1:]], env=outside | variables, cwd=self.data, stdout=output, stderr=output
            )
        finally:
            output.close()


@pytest.fixture(scope="module")
def server_programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with what the server image installs, by its own lines."""
    folder = tmp_path_factory.mktemp("server-image")
    instructions = stages()["server"]
    copy(instructions, folder / "src")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    programs = folder / "venv" / "bin"
    # The pip that is here, working on the fresh environment: that saves installing one there.
    pip = programs / "pip"
    pip.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m pip --python "{programs / "python"}" "$@"\n')
    pip.chmod(0o755)
    variables = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    for line in pip_lines(instructions):
        done = subprocess.run(line, shell=True, cwd=folder / "src", env=variables, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    return programs


def test_the_server_image_has_the_workers_and_no_torch(server_programs: Path, tmp_path: Path) -> None:
    subprocess.run([server_programs / "python", "-c", TORCH_FREE], check=True, cwd=tmp_path)
    (tmp_path / "rows.jsonl").write_bytes(ROWS)
    for arguments in (["luthier_trainer.data.check", "rows.jsonl"], ["luthier_trainer.inspect", "builtin/tiny"]):
        answer = subprocess.run([server_programs / "python", "-m", *arguments], capture_output=True, cwd=tmp_path)
        assert (answer.returncode, answer.stderr) == (0, b"")
        assert answer.stdout


@contextlib.contextmanager
def running(process: "subprocess.Popen[bytes]") -> Iterator["subprocess.Popen[bytes]"]:
    """Ends the process at the end, as `docker stop` would."""
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=60)


def healthy(image: Image, **more: str) -> bool:
    """Whether the image's own health check says so."""
    return image.run(health(image.instructions), **more).wait(timeout=30) == 0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_the_services_of_compose_run_a_job_on_one_volume(server_programs: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir(mode=0o700)
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    variables = compose["services"]["server"]["environment"]
    port = free_port()
    everywhere = variables["LUTHIER_LISTEN"].replace("50051", str(port))
    listen = everywhere.replace("0.0.0.0", "127.0.0.1")
    puppet = json.dumps({"steps": 5, "step_seconds": 0.01})
    host = Image(stages()["trainer"], Path(sys.executable).parent, data)
    server = Image(stages()["server"], server_programs, data, variables | {"LUTHIER_PUPPET": puppet})
    # What a warm trainer costs and gives is tested elsewhere; this one computes nothing.
    cold = [word.replace("--warm", "--no-warm") for word in command(host.instructions)]
    with running(host.run(cold)) as hosting:
        until(lambda: healthy(host), 30, "a healthy trainer host")
        with running(server.run(command(server.instructions), LUTHIER_LISTEN=listen)) as serving:
            # The check names the address of the container, which is every address: Linux takes that for loopback.
            until(lambda: healthy(server, LUTHIER_LISTEN=everywhere), 30, "a healthy server")
            with Client(listen) as client:
                dataset = client.upload_dataset(ROWS, name="rows")
                task = FineTuneTask(base_model="builtin/tiny", training_dataset=dataset.id)
                job = client.create_job(JobSpec(fine_tune=task)).wait(60)
                assert job.state == JobState.JOB_STATE_SUCCEEDED, job.error
        assert serving.returncode == 0
        time.sleep(0.2)
        assert hosting.poll() is None, "the server ended a host that is not its own"
    assert hosting.returncode == 0
    assert not healthy(host)


def test_the_trainer_image_asks_pip_for_what_the_project_pins(tmp_path: Path) -> None:
    instructions = stages()["trainer"]
    copy(instructions, tmp_path)
    programs = Path(sys.executable).parent
    for line in pip_lines(instructions):
        dry = line.replace(
            "pip install", f"{programs / 'python'} -m pip install --dry-run --quiet --report report.json"
        )
        done = subprocess.run(dry, shell=True, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        missing = [each["metadata"]["name"] for each in json.loads((tmp_path / "report.json").read_text())["install"]]
        assert {name for name in missing if not name.startswith("luthier-")} == set()


def test_both_images_run_as_one_user_that_is_not_root() -> None:
    for stage in ("server", "trainer"):
        instructions = stages()[stage]
        assert last(instructions, "USER") == "luthier"
        assert any("useradd --uid 10001" in each.text for each in instructions if each.name == "RUN")
        assert last(instructions, "VOLUME") == "/data"


def test_what_an_image_runs_as_root_is_a_shell_command() -> None:
    for instructions in stages().values():
        for each in instructions:
            if each.name == "RUN":
                subprocess.run(["sh", "-n", "-c", each.text], check=True)


def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
    return found


def test_compose_publishes_nothing_but_one_port_on_loopback() -> None:
    published = [port for each in services()["services"].values() for port in each.get("ports", [])]
    assert published == ["127.0.0.1:50051:50051"]


def test_the_services_of_compose_are_stages_that_share_the_volume() -> None:
    compose = services()
    for name, target in (("server", "server"), ("host", "trainer")):
        service = compose["services"][name]
        assert service["build"]["target"] == target
        assert target in stages()
        assert service["volumes"] == ["data:/data"]
    assert "data" in compose["volumes"]
    assert compose["services"]["server"]["depends_on"] == {"host": {"condition": "service_healthy"}}


def test_compose_itself_accepts_the_file() -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        pytest.skip("the docker client with its compose plugin is not here")
    subprocess.run([docker, "compose", "--file", ROOT / "compose.yaml", "config", "--quiet"], check=True)
