"""A trainer's process as its host sees it: forked, signalled, reaped."""

import faulthandler
import io
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from luthier.trainer import attempt
from luthier.trainer.v1 import task_pb2
from luthier_trainer.main import run_attempt

_RESET = (signal.SIGCHLD, signal.SIGINT, signal.SIGHUP)
# Blocked over a fork; the trainer unblocks those of its control once it handles them, so that none is lost.
_HELD = (*_RESET, signal.SIGTERM, signal.SIGUSR1)


def fork_trainer(attempt_dir: Path, secrets: Mapping[str, str], close: Callable[[], None]) -> int:
    """Forks a trainer for the attempt and returns its process. `close` runs in the child and closes what is the host's.

    The caller has one thread, ran no tensor operation, and reaps the child with `reap`.
    """
    process = multiprocessing.get_context("fork").Process(target=_become_trainer, args=(attempt_dir, secrets, close))
    signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD)
    # Ours to reap: multiprocessing would wait for it at exit and take its status away.
    multiprocessing.process._children.discard(process)  # type: ignore[attr-defined]
    assert process.pid is not None
    return process.pid


def _become_trainer(attempt_dir: Path, secrets: Mapping[str, str], close: Callable[[], None]) -> NoReturn:
    code = 1
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in (*_RESET, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _RESET)
        close()
        redirect(os.open(attempt_dir / attempt.LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would put secrets on the disk
        faulthandler.enable()
        code = run_attempt(attempt_dir, secrets)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def redirect(output: int) -> None:
    """Standard input from nothing, standard output and error line by line to the given file descriptor."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(nothing)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")


def signal_group(pid: int, number: int) -> None:
    """Signals the group that an unreaped child leads, or the child alone when it is not yet a leader."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        os.kill(pid, number)


def reap(pid: int) -> task_pb2.TrainerExit | None:
    """How a child ended, which takes it and what is left of its group away; None while it lives."""
    if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        return None
    # Its own children (data loaders) inherited the lock: they go first, while the group's number is surely ours.
    signal_group(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    ended = task_pb2.TrainerExit()
    ended.time.FromNanoseconds(time.time_ns())
    if os.WIFSIGNALED(status):
        ended.signal = os.WTERMSIG(status)
    else:
        ended.code = os.WEXITSTATUS(status)
    return ended
