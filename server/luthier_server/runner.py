"""Drives one attempt: starts its trainer, reads its spool into the log, asks it to stop, and declares it dead.

The spool is the truth; a wake-up is a hint. Whoever declares an attempt dead takes its lock first and holds it while
doing so, so two trainers of one job can never write.
"""

import asyncio
import contextlib
import errno
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import structlog

from luthier.trainer import attempt as files
from luthier.trainer.v1.report_pb2 import TrainerReport
from luthier.trainer.v1.task_pb2 import ControlAction, TrainerControl, TrainerExit, TrainerTask
from luthier_server import failpoints
from luthier_server.attempts import Attempts, Ending
from luthier_server.errors import StorageFull, StoreBusy
from luthier_server.executors.base import Executor, ExecutorError
from luthier_server.store.jobs import Attempt

log = structlog.get_logger()
_CHUNK = 1 << 20
_LOG_LINES = 20
_REAP_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds. sweep: between looks without a wake-up; silence: until a trainer that reports nothing is killed."""

    cancel_grace: float = 5
    stop_grace: float = 30
    silence: float = 300
    start: float = 120
    sweep: float = 0.5


class Runner:
    """One attempt, from its task to its end."""

    def __init__(
        self, attempts: Attempts, executor: Executor, attempt: Attempt, directory: Path, limits: Limits
    ) -> None:
        self.attempt = attempt
        self.directory = directory
        self._attempts = attempts
        self._executor = executor
        self._limits = limits
        self._wake = asyncio.Event()
        self._action = ControlAction.CONTROL_ACTION_UNSPECIFIED
        self._kill_at = float("inf")
        self._killed_for = ""
        self._not_started = ""
        self._heard = time.monotonic()
        self._log = log.bind(job_id=attempt.job_id, attempt=attempt.number)

    def wake(self) -> None:
        """Something may be new."""
        self._wake.set()

    async def run(self, task: TrainerTask, secrets: Mapping[str, str]) -> None:
        """Starts the trainer and returns when the attempt is settled."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            files.replace_file(self.directory / files.TASK, task.SerializeToString())
            if self._action:  # asked before there was a directory to write it to
                self._write_control()
        except OSError as error:
            self._log.error("task not written", error=str(error))
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            await self._settle(
                Ending("WORKER_NOT_STARTED", f"the trainer could not be started: {error}", storage_full=full)
            )
            return
        try:
            await failpoints.reach("after_insert_attempt_before_start")
            await self._executor.start(self.directory, secrets)
            await failpoints.reach("after_start_before_follow")
        except (ExecutorError, OSError) as error:
            # The host may have forked before it fell silent: a trainer that lives is followed, one that comes late
            # sees the end and leaves, and only a free lock says that there is none.
            self._log.error("trainer not started", error=str(error))
            self._not_started = str(error)
            self.mark_gone()
        await self.follow()

    async def follow(self) -> None:
        """Reads the spool of a trainer that was started until its process is gone, then settles the attempt."""
        started = time.monotonic()
        lock: int | None = None
        while lock is None:
            self._wake.clear()
            news = await self._ingest()
            now = time.monotonic()
            if news:
                self._heard = now
            gone = (self.directory / files.EXIT).exists() or now - started > self._limits.start
            if gone or self.attempt.reports:
                # Before its first report a trainer may not hold its lock yet, and must find it free.
                lock = files.try_lock(self.directory)
            if lock is None:
                await self._enforce(now)
                if not news:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(self._limits.sweep):
                            await self._wake.wait()
        try:
            while await self._ingest():
                pass
            await failpoints.reach("after_lock_before_settle")
            await self._settle(await self._ending())
        finally:
            os.close(lock)

    def locked(self) -> bool:
        """Whether a trainer lives."""
        lock = files.try_lock(self.directory)
        if lock is not None:
            os.close(lock)
        return lock is None

    def mark_gone(self) -> None:
        """Writes an end where the host that would have written it is gone. A trainer that comes late then leaves."""
        if not (self.directory / files.EXIT).exists():
            files.replace_file(self.directory / files.EXIT, TrainerExit(code=-1).SerializeToString())

    async def ask(self, action: ControlAction.ValueType) -> None:
        """Asks the trainer to save a checkpoint and leave; after the grace its group is killed."""
        if self._action == action:
            return
        self._action = action
        cancel = action == ControlAction.CONTROL_ACTION_CANCEL
        self._kill_at = time.monotonic() + (self._limits.cancel_grace if cancel else self._limits.stop_grace)
        self._log.info("asking the trainer", action=ControlAction.Name(action))
        try:
            self._write_control()
        except OSError as error:
            # A full disk must not keep a job running: the signal alone says PREEMPT, and the state says the rest.
            self._log.error("control not written", error=str(error))
        await self._executor.signal(self.directory, signal.SIGTERM)
        self.wake()

    def _write_control(self) -> None:
        files.replace_file(self.directory / files.CONTROL, TrainerControl(action=self._action).SerializeToString())

    async def kill(self, reason: str) -> None:
        """Ends the trainer's process group at once."""
        self._killed_for = self._killed_for or reason
        self._log.warning("killing the trainer", reason=reason)
        if await self._executor.signal(self.directory, signal.SIGKILL):
            return
        if self.attempt.pid and self.locked():
            # Its host is gone, but the lock is held, so the process of its first report is the one that lives.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.attempt.pid, signal.SIGKILL)

    async def _enforce(self, now: float) -> None:
        if now >= self._kill_at:
            self._kill_at = now + 5
            await self.kill("did not leave within its grace")
        elif now - self._heard > self._limits.silence:
            self._heard = now
            await self.kill(f"was silent for {self._limits.silence:.0f} s")

    async def _ingest(self) -> bool:
        """Reads what is new in the spool into the log; returns whether there was anything."""
        try:
            data = _read(self.directory / files.SPOOL, self.attempt.spool_offset)
        except FileNotFoundError:
            return False
        reports: list[TrainerReport] = []
        end = 0
        for payload, offset in files.frames(data):
            reports.append(TrainerReport.FromString(payload))
            end = offset
        if not reports:
            return False
        await failpoints.reach("before_spool_ingest")
        while True:
            try:
                self.attempt = await self._attempts.ingest(self.attempt, reports, self.attempt.spool_offset + end)
                return True
            except (StorageFull, StoreBusy) as error:
                # The spool keeps them: nothing is lost by waiting.
                self._log.warning("reports wait", reports=len(reports), error=str(error))
                await asyncio.sleep(self._limits.sweep)

    async def _ending(self) -> Ending:
        if self._action == ControlAction.CONTROL_ACTION_PREEMPT:
            return Ending("SERVER_RESTARTED", "goes on from its newest checkpoint", requeue=True)
        if self._not_started and not self.attempt.reports:
            return Ending(
                "WORKER_NOT_STARTED",
                f"the trainer could not be started: {self._not_started}",
                hint="see host.log in the data directory, and run luthierd doctor",
            )
        if not self.attempt.outcome:
            await self._reaped()
        ended = _exit(self.directory)
        how = f"was killed because it {self._killed_for}" if self._killed_for else _exit_words(ended)
        lines = await asyncio.to_thread(_last_lines, self.directory / files.LOG)
        return Ending("WORKER_LOST", f"the trainer {how}", lines, storage_full=ended.code == files.EXIT_NO_SPACE)

    async def _reaped(self) -> None:
        """Gives the host a moment to write how the process ended: the lock is free before the process is reaped."""
        deadline = time.monotonic() + _REAP_SECONDS
        while not (self.directory / files.EXIT).exists() and time.monotonic() < deadline:
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.05):
                    await self._wake.wait()

    async def _settle(self, ending: Ending) -> None:
        while True:
            try:
                await self._attempts.settle(self.attempt, ending)
                return
            except (StorageFull, StoreBusy) as error:
                self._log.warning("the end waits", error=str(error))
                await asyncio.sleep(self._limits.sweep)


def _read(spool: Path, offset: int) -> bytes:
    with open(spool, "rb") as file:
        file.seek(offset)
        data = file.read(_CHUNK)
        if len(data) == _CHUNK and not any(True for _ in files.frames(data)):
            data += file.read(files.MAX_PAYLOAD)
        return data


def _exit(directory: Path) -> TrainerExit:
    """How the host saw the process end; code -1 where nobody saw it."""
    try:
        return TrainerExit.FromString((directory / files.EXIT).read_bytes())
    except FileNotFoundError:
        return TrainerExit(code=-1)


def _exit_words(ended: TrainerExit) -> str:
    if ended.signal:
        name = signal.Signals(ended.signal).name if ended.signal in set(signal.Signals) else str(ended.signal)
        return f"was ended by {name}" + (" (out of memory?)" if ended.signal == signal.SIGKILL else "")
    if ended.code < 0:
        return "is gone without a word"
    return f"left with exit code {ended.code} and without a last report"


def _last_lines(path: Path) -> list[str]:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return [line[:300] for line in text.splitlines()[-_LOG_LINES:]]
