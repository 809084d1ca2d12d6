"""The command `luthier` as a process: with pipes, and on a pseudo-terminal."""

import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl
from pathlib import Path

import yaml
from click.testing import CliRunner

from luthier_client.cli.main import cli

LUTHIER = [sys.executable, "-W", "error", "-m", "luthier_client.cli.main"]


def run(*arguments: str, endpoint: str = "127.0.0.1:1", **environment: str) -> "subprocess.CompletedProcess[str]":
    env = {**os.environ, "LUTHIER_ENDPOINT": endpoint, **environment}
    return subprocess.run([*LUTHIER, *arguments], capture_output=True, text=True, env=env, timeout=60)


def called(*arguments: str, endpoint: str = "127.0.0.1:1") -> "subprocess.CompletedProcess[str]":
    """The same within this process, which saves a start: for what needs neither pipes nor signals."""
    result = CliRunner().invoke(cli, arguments, env={"LUTHIER_ENDPOINT": endpoint}, prog_name="luthier")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return subprocess.CompletedProcess(arguments, result.exit_code, result.stdout, result.stderr)


def job_file(folder: Path, **labels: str) -> str:
    path = folder / "job.yaml"
    task = {"base_model": "builtin/tiny", "training_dataset": "cards"}
    path.write_text(yaml.safe_dump({"display_name": "cards", "labels": labels, "fine_tune": task}))
    return str(path)


class Terminal:
    """A command on a pseudo-terminal."""

    def __init__(self, *arguments: str, endpoint: str, columns: int = 90, **environment: str) -> None:
        self.screen = ""
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            env = {**os.environ, "LUTHIER_ENDPOINT": endpoint, "TERM": "xterm-256color", "LANG": "C.UTF-8"}
            env.pop("NO_COLOR", None)
            env.pop("COLUMNS", None)
            os.execve(sys.executable, [*LUTHIER, *arguments], {**env, **environment})
        ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))

    def until(self, words: str, timeout: float = 20.0) -> None:
        """Reads until the words were written. Fails with what was written instead."""
        deadline = time.monotonic() + timeout
        while words not in self.screen:
            assert time.monotonic() < deadline and self._read(0.2), self.screen
        return

    def end(self) -> int:
        """Reads to the end and returns the exit code."""
        while self._read(20.0):
            pass
        os.close(self._fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _read(self, timeout: float) -> bool:
        if not select.select([self._fd], [], [], timeout)[0]:
            return True
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # Linux's way to say that the other side is closed
            return False
        self.screen += data.decode(errors="replace")
        return bool(data)

    def type(self, text: str) -> None:
        """Writes what a person would."""
        os.write(self._fd, text.encode())
