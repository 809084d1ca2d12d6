"""Processes of their own that need not import torch again: forks of one that has.

A cold Python pays 5 seconds of CPU for torch and transformers. A test that needs another process (one with limits, one
to kill, one with clean state) and not its cold start takes one from here. The first to be started starts a fork server
beside the tests' process, which imports what trainers need, runs no tensor operation (a child of a process that did
hangs in OpenMP), and ends with the tests' process.
"""

import os
import resource
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any, NoReturn

from luthier_trainer import main
from luthier_trainer.host import WARM_MODULES

Limits = Mapping[int, int]  # RLIMIT_... -> its soft and hard value


class Warm:
    """A process that runs one function: what it prints lies in the file `output`."""

    def __init__(self, process: ForkServerProcess, output: Path) -> None:
        self.process = process
        self.output = output

    @property
    def pid(self) -> int:
        """Its id, to signal it."""
        assert self.process.pid is not None
        return self.process.pid

    def wait(self, seconds: float = 60) -> int:
        """Its exit code once it has ended: 1 for an exception, whose traceback it printed; minus the number of the
        signal that ended it. Raises TimeoutError."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            raise TimeoutError(f"the process still runs after {seconds} seconds: {self.printed()[-2000:]}")
        return self.process.exitcode

    def printed(self) -> str:
        """All that it has written to standard output and standard error."""
        return self.output.read_text(errors="backslashreplace")


@contextmanager
def started(
    function: Callable[..., Any],
    *arguments: Any,
    output: Path,
    limits: Limits | None = None,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Iterator[Warm]:
    """Runs a function of a module, with arguments that can be pickled, in a process that is killed on leaving.

    The function's return value is the exit code (None: 0). It runs in the process's main thread with `environment`
    (default: this process's now) and in `folder` (default: this process's now), with standard input from nothing.
    """
    process = _context().Process(
        target=_run,
        args=(function, arguments, output, dict(limits or {}), dict(environment or os.environ), folder or Path.cwd()),
    )
    output.write_bytes(b"")
    process.start()
    try:
        yield Warm(process, output)
    finally:
        process.kill()
        process.join()
        process.close()


def run(function: Callable[..., Any], *arguments: Any, seconds: float = 60, **more: Any) -> tuple[int, str]:
    """Runs it to its end; its exit code and what it printed."""
    with started(function, *arguments, **more) as process:
        return process.wait(seconds), process.printed()


def trainer(attempt_dir: Path) -> int:
    """What `python -m luthier_trainer.main ATTEMPT_DIR` runs, for `run` and `started`."""
    return main.run_attempt(attempt_dir, {})


@cache
def _context() -> ForkServerContext:
    context = get_context("forkserver")
    context.set_forkserver_preload([*WARM_MODULES, "pytest"])
    return context


def _run(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    output: Path,
    limits: Limits,
    environment: Mapping[str, str],
    folder: Path,
) -> NoReturn:
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(file, standard)
    os.close(file)
    os.chdir(folder)
    os.environ.clear()  # the fork server has the environment of the test that was first
    os.environ.update(environment)
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    sys.exit(function(*arguments))
