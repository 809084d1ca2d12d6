"""Trainers on this machine, forked by the trainer host.

The host is a process of its own that outlives the server; this is its client, and starts one where there is none.
"""

import asyncio
import contextlib
import os
import signal
import struct
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from luthier.trainer import attempt
from luthier.trainer.v1.host_pb2 import HostRequest, HostResponse, ListTrainers, QuitHost, SignalTrainer, StartTrainer
from luthier_server.executors.base import ExecutorError

log = structlog.get_logger()
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class LocalSettings:
    """How to run the host. `own_host`: start one where there is none; `end_host`: end it with the server."""

    data_dir: Path
    python: str
    warm: bool
    own_host: bool = True
    end_host: bool = False
    start_seconds: float = 60
    host_arguments: Sequence[str] = ()


class LocalExecutor:
    """Speaks to the trainer host of this data directory."""

    def __init__(self, settings: LocalSettings) -> None:
        self._settings = settings
        self._socket = attempt.socket_path(settings.data_dir, "host")
        self._lock = asyncio.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def prepare(self) -> None:
        """Starts a host where none answers. It warms itself up while the server serves."""
        if not await self._try_connect() and self._settings.own_host:
            self._spawn()

    async def start(self, attempt_dir: Path, secrets: Mapping[str, str]) -> None:
        """Has the host fork a trainer. Raises ExecutorError."""
        request = HostRequest(start=StartTrainer(attempt_dir=str(attempt_dir), secrets=secrets))
        response = await self._ask(request)
        if response.error:
            raise ExecutorError(response.error)

    async def signal(self, attempt_dir: Path, number: int) -> bool:
        """Sends a signal to a trainer's group; False when the host knows no such trainer."""
        request = HostRequest(signal=SignalTrainer(attempt_dir=str(attempt_dir), signal=number))
        try:
            return not (await self._ask(request, start_host=False)).error
        except ExecutorError:
            return False

    async def alive(self) -> Collection[str]:
        """The attempts whose trainers live here; empty when no host answers."""
        with contextlib.suppress(ExecutorError):
            answer = await self._ask(HostRequest(list=ListTrainers()), start_host=False)
            return {each.attempt_dir for each in answer.trainers}
        return set()

    async def close(self) -> None:
        """Lets go of the host. It and its trainers live on, unless the settings say otherwise."""
        if self._settings.own_host and self._settings.end_host:
            with contextlib.suppress(ExecutorError):
                await self._ask(HostRequest(quit=QuitHost()), start_host=False)
        self._disconnect()
        if self._process is not None and self._settings.end_host:
            try:
                await asyncio.to_thread(self._process.wait, 5)
            except subprocess.TimeoutExpired:
                # It may still be importing torch, and has no trainer: nothing is lost.
                self._process.send_signal(signal.SIGTERM)
                await asyncio.to_thread(self._process.wait)

    async def _ask(self, request: HostRequest, *, start_host: bool = True) -> HostResponse:
        async with self._lock:
            for last in (False, True):
                try:
                    await self._connect(start_host)
                    assert self._reader is not None
                    assert self._writer is not None
                    body = request.SerializeToString()
                    self._writer.write(_LENGTH.pack(len(body)) + body)
                    await self._writer.drain()
                    async with asyncio.timeout(self._settings.start_seconds):
                        (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
                        return HostResponse.FromString(await self._reader.readexactly(length))
                except asyncio.CancelledError:
                    self._disconnect()  # the answer that nobody reads must not become another request's
                    raise
                except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
                    self._disconnect()
                    if last or not start_host:
                        raise ExecutorError(
                            f"the trainer host does not answer: {error or type(error).__name__}"
                        ) from error
            raise AssertionError("unreachable")

    async def _connect(self, start_host: bool) -> None:
        if self._writer is not None and not self._writer.is_closing():
            return
        if await self._try_connect():
            return
        if not (start_host and self._settings.own_host):
            raise ConnectionRefusedError("no trainer host listens")
        if self._process is None or self._process.poll() is not None:
            self._spawn()
        async with asyncio.timeout(self._settings.start_seconds):
            while not await self._try_connect():
                if self._process is not None and self._process.poll() is not None and not await self._try_connect():
                    raise ConnectionRefusedError("the trainer host ended at once: see host.log in the data directory")
                await asyncio.sleep(0.02)

    async def _try_connect(self) -> bool:
        try:
            self._reader, self._writer = await asyncio.open_unix_connection(str(self._socket))
        except OSError:
            return False
        return True

    def _disconnect(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None

    def _spawn(self) -> None:
        settings = self._settings
        arguments = [settings.python, "-m", "luthier_trainer.host", "--data-dir", str(settings.data_dir)]
        arguments.append("--warm" if settings.warm else "--no-warm")
        with open(settings.data_dir / "host.log", "ab") as output:
            self._process = subprocess.Popen(
                [*arguments, *settings.host_arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=_without_secrets(),
            )
        log.info("trainer host started", pid=self._process.pid, warm=settings.warm)


def _without_secrets() -> dict[str, str]:
    # A secret reaches the one trainer that needs it, through the socket.
    return {name: value for name, value in os.environ.items() if not name.startswith("LUTHIER_SECRET_")}
