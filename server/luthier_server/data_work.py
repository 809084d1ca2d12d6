"""Work on datasets that needs a tokenizer: done by children of the trainer host, each in a directory of its own.

The server imports no tokenizer. A child is started like a trainer (`work/ID/task.binpb`, a spool for its progress) and
leaves its result in the file `answer`; its directory goes with the call. A child that dies, hangs or takes too much is
an error of its call alone.
"""

import asyncio
import contextlib
import shutil
import signal
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import structlog
from google.protobuf.message import DecodeError

from luthier.trainer import attempt as files
from luthier.trainer.v1.report_pb2 import TrainerReport
from luthier.trainer.v1.task_pb2 import DataAnswer, TrainerExit, TrainerTask
from luthier.v1.event_pb2 import LogLevel, PhaseProgressed
from luthier_server.errors import Exhausted, Unavailable
from luthier_server.executors.base import Executor, ExecutorError
from luthier_server.uploads import storage_errors

log = structlog.get_logger()
_SWEEP = 0.2
_EXIT_SECONDS = 2.0
_MOST_ANSWER = 16 * 2**20


@dataclass(frozen=True, slots=True)
class WorkLimits:
    """Seconds. preview: a preview may take; silence: a check may go without progress."""

    preview: float = 25
    silence: float = 120


@dataclass(frozen=True, slots=True)
class WorkProgress:
    """How far the work is. in_error: it has found errors already, and goes on to find all of them."""

    progress: PhaseProgressed
    in_error: bool


class WorkFailed(Unavailable):
    """The child gave no answer: it died, or was ended because it took too long."""

    reason = "DATA_WORK_FAILED"


class WorkTooLong(Exhausted):
    """The child was ended because it took too long: another would too, so nobody is to try again."""

    reason = "DATA_WORK_TOO_LONG"


class DataWork:
    """Has the trainer host's children work on datasets."""

    def __init__(self, executor: Executor, directory: Path, wake_socket: str) -> None:
        self._executor = executor
        self._directory = directory
        self._wake_socket = wake_socket
        self._woken = asyncio.Event()

    async def prepare(self) -> None:
        """Clears what an earlier server left; nobody waits for it any more."""
        self._directory.mkdir(exist_ok=True)
        for left in self._directory.iterdir():
            await self._executor.signal(left, signal.SIGKILL)
            await asyncio.to_thread(shutil.rmtree, left, ignore_errors=True)

    def wake(self) -> None:
        """Some child may have reported."""
        self._woken.set()

    async def run(
        self,
        task: TrainerTask,
        secrets: Mapping[str, str],
        *,
        seconds: float = float("inf"),
        silence: float = float("inf"),
        on_progress: Callable[[WorkProgress], None] | None = None,
    ) -> DataAnswer:
        """The child's answer. It may take `seconds`, and `silence` seconds without progress.

        Raises WorkFailed, Unavailable when none can be started, StorageFull.
        """
        directory = self._directory / uuid.uuid4().hex
        task.wake_socket = self._wake_socket
        ended = False
        try:
            with storage_errors():
                directory.mkdir()
                files.replace_file(directory / files.TASK, task.SerializeToString())
            try:
                await self._executor.start(directory, secrets)
            except (ExecutorError, OSError) as error:
                raise Unavailable(f"no work on datasets can be started: {error}") from error
            answer = await self._answer(directory, seconds, silence, on_progress)
            ended = True
            return answer
        finally:
            if not ended and await self._executor.signal(directory, signal.SIGKILL):
                await self._gone(directory)
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)

    async def _answer(
        self,
        directory: Path,
        seconds: float,
        silence: float,
        on_progress: Callable[[WorkProgress], None] | None,
    ) -> DataAnswer:
        started = heard = time.monotonic()
        offset = 0
        in_error = False
        answer: DataAnswer | None = None
        answered = 0.0
        while True:
            self._woken.clear()
            over = (directory / files.EXIT).exists()
            progress, found_errors, offset = _progress(directory / files.SPOOL, offset)
            in_error = in_error or found_errors
            now = time.monotonic()
            if progress is not None:
                heard = now
                if on_progress is not None:
                    on_progress(WorkProgress(progress, in_error))
            if answer is None:
                answer = _read(directory / files.ANSWER)
                answered = now
            # The host writes into the directory once more: how the child ended.
            if answer is not None and (over or now - answered > _EXIT_SECONDS):
                return answer
            if over and answer is None:
                raise _failure(directory / files.EXIT)
            if answer is None and (now - started > seconds or now - heard > silence):
                raise WorkTooLong(
                    f"the work on the dataset was ended: it took more than {min(seconds, silence):.0f} s"
                    " (a chat template that never ends?)",
                    subject="time",
                )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SWEEP):
                    await self._woken.wait()

    async def _gone(self, directory: Path) -> None:
        """Waits a moment until a child that was killed is reaped: what it held of the device is free then."""
        killed = time.monotonic()
        while not (directory / files.EXIT).exists() and time.monotonic() - killed < _EXIT_SECONDS:
            self._woken.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SWEEP):
                    await self._woken.wait()


def _progress(spool: Path, offset: int) -> tuple[PhaseProgressed | None, bool, int]:
    """The newest progress behind `offset`, whether there are errors, and where the spool was read to."""
    try:
        with open(spool, "rb") as file:
            file.seek(offset)
            data = file.read()
    except FileNotFoundError:
        return None, False, offset
    newest = None
    in_error = False
    end = 0
    for payload, after in files.frames(data):
        report = TrainerReport.FromString(payload)
        if report.HasField("phase_progressed"):
            newest = report.phase_progressed
        in_error |= report.log_emitted.level == LogLevel.LOG_LEVEL_ERROR
        end = after
    return newest, in_error, offset + end


def _read(path: Path) -> DataAnswer | None:
    try:
        if path.stat().st_size > _MOST_ANSWER:
            raise WorkFailed("the work on the dataset gave more than fits into an answer")
        return DataAnswer.FromString(path.read_bytes())
    except FileNotFoundError:
        return None
    except DecodeError as error:
        raise WorkFailed("the work on the dataset left no readable answer") from error


def _failure(path: Path) -> WorkFailed | WorkTooLong:
    """What a child's end without an answer is to the caller."""
    ended = TrainerExit.FromString(path.read_bytes())
    if ended.signal == signal.SIGPROF:
        return WorkTooLong(
            "the work on the dataset was ended: the chat template takes too long on one row", subject="time"
        )
    if ended.signal:
        name = signal.Signals(ended.signal).name
        return WorkFailed(f"the work on the dataset was ended by {name}: it may need more than it is allowed")
    return WorkFailed(f"the work on the dataset left without an answer (exit code {ended.code})")
