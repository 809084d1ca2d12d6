"""The trainer host: one small process per machine that forks warm trainers, and outlives the server.

It listens on a UNIX socket in the data directory for HostRequests, each prefixed with its length (u32, little endian),
and answers each with one HostResponse in the same framing, in order. It imports torch and its friends between polls, so
that a list or a quit is answered within one import while it warms; a start waits until it is warm, for a fork without
the imports would pay them again. It has one thread and runs no tensor operation and no CUDA call: a child of a process
that did would hang. Whatever a trainer's end, the host writes the attempt's `exit` file and wakes the server.
"""

import argparse
import fcntl
import gc
import importlib
import logging
import os
import re
import selectors
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError

from luthier.trainer import attempt
from luthier.trainer.v1 import host_pb2, task_pb2
from luthier_trainer.connection import Connection, Garbage
from luthier_trainer.fork import fork_trainer, reap, redirect, signal_group
from luthier_trainer.main import EXIT_NOT_MINE, set_up_libraries
from luthier_trainer.spool import poke

_MAX_CLIENTS = 256
_TICK = 1.0
_GRACE = 30.0
_SECRET_NAME = re.compile(r"[A-Z][A-Z0-9_]*", re.ASCII)
_WORK_ID = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)
_HANDLED = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT)

# In this order; the model families' modules are what `transformers` would load lazily in each trainer.
WARM_MODULES = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "luthier_trainer.sft",
    "luthier_trainer.work",
    "luthier_trainer.tables",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen3.modeling_qwen3",
)

log = logging.getLogger("luthier.host")


class Refused(Exception):
    """A request that is understood and not done; its text is the answer's error."""


@dataclass(frozen=True)
class _Trainer:
    pid: int
    name: str  # the attempt's directory as the client named it
    job_id: str
    wake_socket: str


class Host:
    """Serves `listener` until it is told to leave, or for `idle_exit` seconds had neither a trainer nor a client.

    `parent_pid`: leave as on SIGTERM when this process is no longer a child of it; 0 for none.
    """

    def __init__(
        self,
        data_dir: Path,
        listener: socket.socket,
        lock_fd: int,
        *,
        warm: bool,
        idle_exit: float,
        parent_pid: int = 0,
    ) -> None:
        self._data_dir = data_dir
        self._listener = listener
        self._lock_fd = lock_fd
        self._cold_modules = list(reversed(WARM_MODULES)) if warm else []
        self._warm = False
        self._idle_exit = idle_exit
        self._parent_pid = parent_pid
        self._trainers: dict[Path, _Trainer] = {}
        self._unwritten: dict[Path, tuple[_Trainer, task_pb2.TrainerExit]] = {}
        self._clients: dict[int, Connection] = {}
        self._quitting = False
        self._kill_at: float | None = None
        self._busy_at = time.monotonic()
        self._wake = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._wake.setblocking(False)
        self._signals_read, self._signals_write = socket.socketpair()
        self._signals_read.setblocking(False)
        self._signals_write.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._selector.register(self._signals_read, selectors.EVENT_READ)

    def serve(self) -> None:
        """Runs in the main thread until the host may leave; no trainer lives then."""
        for number in _HANDLED:
            signal.signal(number, lambda *_: None)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.set_wakeup_fd(self._signals_write.fileno(), warn_on_full_buffer=False)
        while not self._may_leave():
            for key, events in self._selector.select(0 if self._cold_modules else _TICK):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj is self._signals_read:
                    self._read_signals()
                else:
                    self._serve_client(key.fd, events)
            self._reap()
            self._write_exits()
            self._look_after()
            if self._cold_modules:
                self._warm_up()
        self._write_exits()

    # Life

    def _may_leave(self) -> bool:
        now = time.monotonic()
        if self._trainers or self._clients:
            self._busy_at = now
        if self._trainers:
            return False
        return self._quitting or now - self._busy_at >= self._idle_exit

    def _look_after(self) -> None:
        if self._parent_pid and os.getppid() != self._parent_pid:
            self._terminate("the parent is gone")
        if self._kill_at is not None and time.monotonic() >= self._kill_at:
            self._signal_all(signal.SIGKILL)

    def _terminate(self, why: str) -> None:
        if self._kill_at is None:
            log.info("%s: ending %d trainers", why, len(self._trainers))
            self._quitting = True
            self._kill_at = time.monotonic() + _GRACE
            self._signal_all(signal.SIGTERM)

    def _signal_all(self, number: int) -> None:
        for trainer in self._trainers.values():
            signal_group(trainer.pid, number)

    def _read_signals(self) -> None:
        numbers = self._signals_read.recv(4096)
        if signal.SIGTERM in numbers or signal.SIGINT in numbers:
            self._terminate("asked to leave")

    def _warm_up(self) -> None:
        module = self._cold_modules.pop()
        try:
            importlib.import_module(module)
        except Exception:  # a broken library must not keep trainers that do not need it from starting
            log.exception("cannot import %s", module)
        if not self._cold_modules:
            gc.collect()
            gc.freeze()  # what is warm stays out of the children's collections, and so shared in memory
            self._warm = True
            log.info("warm")
            for number in list(self._clients):
                self._serve_client(number, 0)

    # Clients

    def _accept(self) -> None:
        try:
            accepted, _ = self._listener.accept()
        except OSError as error:
            log.warning("cannot accept a client: %s", error)
            return
        if len(self._clients) >= _MAX_CLIENTS:
            accepted.close()
            return
        self._clients[accepted.fileno()] = Connection(accepted)
        self._selector.register(accepted, selectors.EVENT_READ)

    def _drop(self, number: int) -> None:
        client = self._clients.pop(number)
        self._selector.unregister(client.socket)
        client.close()

    def _serve_client(self, number: int, events: int) -> None:
        client = self._clients[number]
        try:
            if events & selectors.EVENT_READ and not client.receive():
                self._drop(number)
            else:
                self._answer_all(client)
        except (Garbage, OSError) as error:
            log.warning("a client is dropped: %s", error)
            self._drop(number)

    def _answer_all(self, client: Connection) -> None:
        while (request := client.next_request(starts=not self._cold_modules)) is not None:
            client.answer(self._answer(request))
        client.flush()
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.has_answers else 0)
        self._selector.modify(client.socket, wanted)

    def _answer(self, request: host_pb2.HostRequest) -> host_pb2.HostResponse:
        response = host_pb2.HostResponse(host_pid=os.getpid(), warm=self._warm)
        try:
            if request.HasField("start"):
                response.trainers.append(self._start(request.start))
            elif request.HasField("signal"):
                self._signal(request.signal)
            elif request.HasField("list"):
                response.trainers.extend(_hosted(trainer) for trainer in self._trainers.values())
            elif request.HasField("quit"):
                self._quitting = True
        except (Refused, OSError) as error:
            response.error = str(error)
        return response

    # Trainers

    def _start(self, request: host_pb2.StartTrainer) -> host_pb2.HostedTrainer:
        if self._quitting:
            raise Refused("the host is leaving")
        attempt_dir = self._inside(request.attempt_dir)
        if attempt_dir in self._trainers:  # asked again: the answer may have been lost
            return _hosted(self._trainers[attempt_dir])
        if attempt_dir in self._unwritten or (attempt_dir / attempt.EXIT).exists():
            raise Refused("the attempt is over")
        for name in request.secrets:
            if _SECRET_NAME.fullmatch(name) is None:
                raise Refused(f"{name!r} is no name of a secret")
        try:
            task = task_pb2.TrainerTask.FromString((attempt_dir / attempt.TASK).read_bytes())
        except (FileNotFoundError, DecodeError):
            raise Refused("the attempt has no readable task") from None
        pid = fork_trainer(attempt_dir, dict(request.secrets), self._close)
        trainer = _Trainer(pid, request.attempt_dir, attempt_dir.parent.name, task.wake_socket)
        self._trainers[attempt_dir] = trainer
        log.info("trainer %d runs %s", pid, attempt_dir)
        return _hosted(trainer)

    def _inside(self, name: str) -> Path:
        """The attempt's directory, all links followed. Raises Refused unless it is `jobs/ID/attempt-N` or `work/ID` of
        our data."""
        try:
            path = Path(name).resolve(strict=True)
        except (OSError, ValueError, RuntimeError):
            raise Refused("there is no such attempt") from None
        jobs, work = self._data_dir / "jobs", self._data_dir / "work"
        of_job = path.parent.parent == jobs.resolve()
        of_work = path.parent == work.resolve() and _WORK_ID.fullmatch(path.name) is not None
        if not (of_job or of_work) or not path.is_dir():
            raise Refused(f"an attempt lies at {jobs}/ID/attempt-N, work on datasets at {work}/ID")
        return path

    def _signal(self, request: host_pb2.SignalTrainer) -> None:
        trainer = self._trainers.get(self._inside(request.attempt_dir))
        if trainer is None:
            raise Refused("no such trainer lives")
        if request.signal not in signal.valid_signals():
            raise Refused(f"there is no signal {request.signal}")
        signal_group(trainer.pid, request.signal)

    def _close(self) -> None:
        """In a child: nothing of the host's stays open there."""
        self._selector.close()
        self._listener.close()
        self._signals_read.close()
        self._signals_write.close()
        self._wake.close()
        for client in self._clients.values():
            client.close()
        os.close(self._lock_fd)

    def _reap(self) -> None:
        for attempt_dir, trainer in list(self._trainers.items()):
            ended = reap(trainer.pid)
            if ended is None:
                continue
            del self._trainers[attempt_dir]
            log.info("trainer %d of %s ended: code %d, signal %d", trainer.pid, attempt_dir, ended.code, ended.signal)
            if ended.code != EXIT_NOT_MINE:  # else the attempt's end is another's to tell
                self._unwritten[attempt_dir] = (trainer, ended)

    def _write_exits(self) -> None:
        """Writes what is to be written; what a full disk refuses is tried again at the next tick."""
        for attempt_dir, (trainer, ended) in list(self._unwritten.items()):
            try:
                attempt.replace_file(attempt_dir / attempt.EXIT, ended.SerializeToString())
            except FileNotFoundError:
                log.info("%s was deleted", attempt_dir)
            except OSError as error:
                log.warning("cannot write the exit of %s: %s", attempt_dir, error)
                continue
            del self._unwritten[attempt_dir]
            poke(self._wake, trainer.wake_socket, trainer.job_id)


def _hosted(trainer: _Trainer) -> host_pb2.HostedTrainer:
    return host_pb2.HostedTrainer(attempt_dir=trainer.name, pid=trainer.pid)


def _listen(path: Path) -> socket.socket:
    """A listening socket at the path, for this user alone; one left behind by a dead host is replaced."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listener.bind(os.fspath(path))
    finally:
        os.umask(before)
    listener.listen(128)
    listener.setblocking(False)
    return listener


def _log_to_stderr() -> None:
    logging.raiseExceptions = False  # a reader of our log that went away must not end us
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s host[%(process)d] %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m luthier_trainer.host", description="Forks warm trainers.")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--warm", action=argparse.BooleanOptionalAction, default=True, help="import torch first")
    parser.add_argument("--idle-exit", type=float, default=600.0, metavar="SECONDS", help="leave when idle so long")
    parser.add_argument(
        "--foreground-parent-pid", type=int, default=0, metavar="PID", help="leave when this one is gone"
    )
    options = parser.parse_args()
    redirect(sys.stderr.fileno())  # whoever started us may read our standard output to its end: hold no pipe of theirs
    set_up_libraries()
    _log_to_stderr()
    data_dir: Path = options.data_dir.resolve()
    lock_fd = os.open(data_dir / "host.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.info("a trainer host runs on %s already", data_dir)
        return 0
    path = attempt.socket_path(data_dir, "host")
    listener = _listen(path)
    log.info("listening at %s", path)
    host = Host(
        data_dir,
        listener,
        lock_fd,
        warm=options.warm,
        idle_exit=options.idle_exit,
        parent_pid=options.foreground_parent_pid,
    )
    try:
        host.serve()
    finally:
        path.unlink(missing_ok=True)  # while we hold the lock: the next host makes its own
    log.info("left")
    return 0


if __name__ == "__main__":
    sys.exit(main())
