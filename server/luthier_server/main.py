"""luthierd: serves until it is told to stop, and leaves in order."""

import asyncio
import contextlib
import fcntl
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import structlog

from luthier.trainer.attempt import replace_file
from luthier_server import __version__, backup, doctor, failpoints, logs, settings
from luthier_server.daemon import Daemon, assembled
from luthier_server.data_work import DataWork
from luthier_server.errors import LuthierError
from luthier_server.grpc.certificate import CertificateError
from luthier_server.grpc.serve import AddressError
from luthier_server.grpc.tokens import TokenFileError
from luthier_server.scheduler import Scheduler
from luthier_server.settings import Settings, SettingsError
from luthier_server.store.jobs import Jobs as JobRows

log = structlog.get_logger()
_STOP_SECONDS = 5


class DataDirInUse(Exception):
    """Another server works on this data directory."""


@contextlib.contextmanager
def _own(data_dir: Path) -> Iterator[None]:
    """Holds the data directory against a second server."""
    data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(data_dir / "luthierd.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataDirInUse(f"another luthierd works on {data_dir}: stop it, or choose another --data-dir") from None
        yield


@contextlib.asynccontextmanager
async def _wake_ups(path: Path, *woken: Scheduler | DataWork) -> AsyncIterator[None]:
    """Hears the datagrams with which trainers say that their spool has grown. All of them mean: look."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    listener.bind(str(path))
    os.chmod(path, 0o600)
    loop = asyncio.get_running_loop()

    def heard() -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                listener.recv(64)
        for each in woken:
            each.wake()

    loop.add_reader(listener, heard)
    try:
        yield
    finally:
        loop.remove_reader(listener)
        listener.close()
        path.unlink(missing_ok=True)


async def _run(chosen: Settings) -> int:
    """Serves until it is told to stop: 0, or 1 when a part of the server ended by itself."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with assembled(chosen) as daemon, _wake_ups(daemon.wake_socket, daemon.scheduler, daemon.data_work):
        await daemon.executor.prepare()
        await daemon.data_work.prepare()
        await daemon.scheduler.recover(await JobRows(daemon.database).open_attempts())
        await daemon.exports.sweep()
        await daemon.deletions.sweep()
        await failpoints.reach("before_serving")
        port = await daemon.server.start(chosen.listen)
        host = chosen.listen.rpartition(":")[0]
        address = chosen.listen if host == "unix" else f"{host}:{port}"
        replace_file(chosen.data_dir / "address", address.encode())
        log.info(
            "serving",
            address=address,
            data_dir=str(chosen.data_dir),
            version=__version__,
            tls=chosen.tls_cert is not None,
            tokens=chosen.token_file is not None,
        )
        scheduling = asyncio.create_task(daemon.scheduler.run(), name="scheduler")
        upkeep = asyncio.create_task(daemon.upkeep.run(), name="upkeep")
        validation = asyncio.create_task(daemon.validation.run(), name="validation")
        stopping = asyncio.create_task(stop.wait(), name="stop")
        await asyncio.wait((scheduling, upkeep, validation, stopping), return_when=asyncio.FIRST_COMPLETED)
        broken = [part for part in (scheduling, upkeep, validation) if part.done()]
        for part in broken:
            log.error("a part of the server ended", part=part.get_name(), error=repr(part.exception()))
        validation.cancel()
        await asyncio.wait([validation])
        await _leave(daemon, scheduling, stop_trainers=chosen.stop_trainers)
        upkeep.cancel()
        stopping.cancel()
    return 1 if broken else 0


async def _leave(daemon: Daemon, scheduling: "asyncio.Task[None]", *, stop_trainers: bool) -> None:
    """Refuse, end the watches, leave the trainers to the next server, stop serving; the database is closed after."""
    log.info("stopping")
    daemon.server.health.set(False)
    daemon.jobs.refuse_new()
    daemon.hub.drain()
    if stop_trainers and not scheduling.done():
        await daemon.scheduler.stop()
    await daemon.server.stop(_STOP_SECONDS)
    scheduling.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        await scheduling
    log.info("stopped")


def _health(arguments: Sequence[str]) -> int:
    """`luthierd health`: 0 when the server of these settings serves."""
    from luthier_server import probe

    return probe.health(settings.read(arguments, os.environ))


_UNUSABLE = (AddressError, CertificateError, TokenFileError)
_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "health": _health,
    "backup": backup.backup_command,
    "restore": backup.restore_command,
    "doctor": doctor.command,
}


def main() -> None:
    """The command luthierd."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["--version"]:
        sys.stdout.write(f"luthierd {__version__}\n")
        return
    try:
        if arguments and arguments[0] in _COMMANDS:
            raise SystemExit(_COMMANDS[arguments[0]](arguments[1:]))
        chosen = settings.read(arguments[1:] if arguments[:1] == ["serve"] else arguments, os.environ)
        logs.configure(chosen.log_level)
        with _own(chosen.data_dir):
            code = asyncio.run(_run(chosen))
        if code:
            raise SystemExit(code)
    except (SettingsError, backup.BackupError, DataDirInUse, *_UNUSABLE, LuthierError) as error:
        sys.stderr.write(f"luthierd: {error}\n")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
