"""The fake service as a process that tests may kill."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from luthier.v1.job_pb2 import JobSpec

TESTS = Path(__file__).parents[2]


class FakeServer:
    """A fake luthierd on an ephemeral port, which stays the same over restarts."""

    def __init__(self, root: Path, token: str = "") -> None:
        self.root = root
        self.token = token
        self.endpoint = "127.0.0.1:0"
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "unit.client.fake_service",
            "--listen",
            self.endpoint,
            "--state",
            str(self.root),
        ]
        command += ["--token", self.token] if self.token else []
        paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self._process.stdout is not None
        self.endpoint = f"127.0.0.1:{int(self._process.stdout.readline())}"

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.communicate()
        self._process = None

    def stop(self) -> None:
        if self._process is not None:
            self.kill()

    def calls(self, method: str) -> list[dict[str, Any]]:
        """What CreateJob or WatchJob was asked so far."""
        path = self.root / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [call for call in map(json.loads, lines) if call["method"] == method]


def job_spec(name: str = "cards", **labels: str) -> JobSpec:
    """A spec whose labels tell the fake service what to do."""
    spec = JobSpec(display_name=name, labels=labels)
    spec.fine_tune.base_model = "builtin/tiny"
    spec.fine_tune.training_dataset = "cards"
    return spec
