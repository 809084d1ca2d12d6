"""A data directory and the servers that live on it, one after the other, at one address."""

import asyncio
import contextlib
import os
import random
import resource
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from daemon import Daemon
from fault.recording import Death, Recording, read_rows

from luthier.trainer.v1.host_pb2 import HostedTrainer

# As short as a server stays sensible with, on a machine that is busy with many of them.
LIMITS = (
    "--slots=2",
    "--retry-seconds=0.2",
    "--heartbeat-seconds=1",
    "--cancel-grace=2",
    "--stop-grace=5",
    "--slow-consumer-seconds=5",
    "--free-bytes=1",
)
FAILPOINT_EXIT = 86
_WORDS_OF_BUGS = ("Traceback", '"event": "bug"', "runner failed", "a part of the server ended")


async def until(condition: Callable[[], object], seconds: float) -> bool:
    """Whether the condition came true within so many seconds."""
    deadline = time.monotonic() + seconds
    while not (come := condition()) and time.monotonic() < deadline:  # noqa: ASYNC110 -- processes set no event
        await asyncio.sleep(0.02)
    return bool(come)


class Site:
    """Starts, kills and stops servers on `data_dir`, and records what each of them left."""

    def __init__(self, data_dir: Path, flags: Sequence[str], dice: random.Random) -> None:
        data_dir.mkdir(parents=True)
        self.data_dir = data_dir
        self.address = f"127.0.0.1:{_free_port(dice)}"
        self.life = 0
        self.recording = Recording(data_dir / "jobs", data_dir / "models", data_dir / "exports")
        self._flags = [*LIMITS, *flags]
        self._log = data_dir / "luthierd.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def database(self) -> Path:
        """The database's file."""
        return self.data_dir / "luthier.db"

    @property
    def pid(self) -> int:
        """The server's process."""
        assert self._process is not None
        return self._process.pid

    def launch(self, **environment: str) -> None:
        """Starts the next server and does not wait for it."""
        assert self._process is None
        self.life += 1
        (self.data_dir / "address").unlink(missing_ok=True)
        command = [sys.executable, "-m", "luthier_server.main", "--data-dir", str(self.data_dir)]
        with open(self._log, "ab") as output:
            self._process = subprocess.Popen(
                [*command, *self._flags, "--listen", self.address],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            )

    async def start(self, **environment: str) -> None:
        """Starts the next server and returns once it serves; a server that does not come up is a complaint."""
        self.launch(**environment)
        if not await self.ready():
            self.recording.complaints.append(f"life {self.life} did not come up: {self.log()[-2000:]}")
            raise RuntimeError(self.recording.complaints[-1])

    async def ready(self, seconds: float = 60) -> bool:
        """Waits until the server serves; False when it ended or took too long."""
        served = self.data_dir / "address"
        await until(lambda: served.exists() or not self.alive(), seconds)
        return served.exists() and self.alive()

    def alive(self) -> bool:
        """Whether the server's process runs."""
        return self._process is not None and self._process.poll() is None

    async def gone(self, seconds: float) -> int | None:
        """The exit code of a server that ends by itself, or None when it has not after so long."""
        await until(lambda: not self.alive(), seconds)
        return None if self._process is None or self.alive() else self._process.returncode

    async def kill(self, *, record: bool = True) -> None:
        """SIGKILL, if it still runs."""
        assert self._process is not None
        self._process.kill()
        await self._ended(record)

    async def stop(self, *, record: bool = True) -> None:
        """SIGTERM; anything but an exit code 0 within 40 s is a complaint."""
        assert self._process is not None
        self._process.terminate()
        if (code := await self.gone(40)) != 0:
            self.recording.complaints.append(f"life {self.life} was stopped and left with {code}: {self.log()[-1500:]}")
            self._process.kill()
        await self._ended(record)

    async def _ended(self, record: bool) -> None:
        assert self._process is not None
        await asyncio.to_thread(self._process.wait)
        self._process = None
        await asyncio.sleep(0.03)  # what it had sent still arrives, and counts as of its life
        if record and self.database.exists():
            with contextlib.suppress(FileNotFoundError):
                self.recording.deaths.append(Death(self.life, await asyncio.to_thread(read_rows, self.database)))

    def log(self) -> str:
        """What all servers have printed."""
        return self._log.read_text(errors="replace")

    def failpoint_hits(self) -> int:
        """How often a failpoint has acted, in all lives."""
        return sum(line.startswith("failpoint ") for line in self.log().splitlines())

    def words_of_bugs(self) -> list[str]:
        """Lines of the log that a server must not write where nothing was injected into it."""
        return [line[:600] for line in self.log().splitlines() if any(word in line for word in _WORDS_OF_BUGS)]

    def trainers(self) -> list[HostedTrainer]:
        """The trainers that live; none where no host answers."""
        with contextlib.suppress(OSError, struct.error):
            return list(Daemon(self.data_dir).host().trainers)
        return []

    def kill_trainer(self, trainer: HostedTrainer) -> None:
        """SIGKILL to a trainer's group, if it is still there."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(trainer.pid, signal.SIGKILL)

    def limit_files(self, limit: int) -> None:
        """No process here can write past so many bytes of a file, as on a full disk; -1 lifts that."""
        pids = [self.pid, *(trainer.pid for trainer in self.trainers())]
        with contextlib.suppress(OSError, struct.error):
            pids.append(Daemon(self.data_dir).host().host_pid)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    async def hold_write_lock(self, seconds: float) -> None:
        """Keeps everybody else from writing to the database."""
        connection = sqlite3.connect(self.database, timeout=30, isolation_level=None)
        try:
            for _ in range(1000):
                with contextlib.suppress(sqlite3.OperationalError):
                    connection.execute("BEGIN IMMEDIATE")
                    break
                await asyncio.sleep(0.01)
            await asyncio.sleep(seconds)
            connection.execute("ROLLBACK")
        finally:
            connection.close()

    def close(self) -> None:
        """Ends whatever is left."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        for trainer in self.trainers():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(trainer.pid, signal.SIGCONT)
        Daemon(self.data_dir).close()


def _free_port(dice: random.Random) -> int:
    """Below the range that outgoing connections take theirs from, so that it stays free between two lives."""
    while True:
        port = dice.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
