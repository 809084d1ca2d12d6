"""Short-lived processes that run the trainer's torch-free code: checking, fetching and deriving datasets, and a look at
a base model.

The server imports nothing of the trainer; it executes `python -m luthier_trainer...` and reads one proto message.
"""

import asyncio
import contextlib
import os
import signal
import struct
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import structlog
from google.protobuf.message import DecodeError, Message

from luthier.trainer.v1.data_pb2 import DeriveReport, FetchReport
from luthier.trainer.v1.report_pb2 import ModelReport
from luthier.v1.dataset_pb2 import DatasetReading
from luthier.v1.dataset_report_pb2 import DatasetReport
from luthier_server.errors import Unavailable

M = TypeVar("M", bound=Message)
log = structlog.get_logger()
_LENGTH = struct.Struct("<I")
_STDERR = 64 * 1024
_ENVIRONMENT = (
    *("PATH", "HOME", "LANG", "LC_", "TZ", "TMPDIR", "PYTHON", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "XDG_"),
    *("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "OMP_", "COVERAGE"),
)
_SOURCES = ("AWS_", "GOOGLE_", "AZURE_", "HF_ENDPOINT", "SSL_CERT_")


class WorkerDied(Unavailable):
    """A signal ended a worker: what it was given may be to blame."""

    reason = "WORKER_DIED"


@dataclass(frozen=True, slots=True)
class Workers:
    """Runs the trainer's workers with its Python, a few at a time: each may take gigabytes and keeps a core busy."""

    python: str
    timeout_seconds: float = 1000
    fetch_seconds: float = 6 * 3600
    _busy: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(max(2, os.cpu_count() or 1)))
    _fetching: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(4))

    async def check_dataset(self, file: Path, reading: DatasetReading, scratch: Path) -> DatasetReport:
        """What the structural check finds in a file of rows. `scratch` is a folder for what does not fit in memory."""
        how = scratch / "reading"
        how.write_bytes(reading.SerializeToString())
        arguments = ["--reading", str(how), "--scratch", str(scratch), str(file)]
        return await self._run("luthier_trainer.data.check", arguments, DatasetReport(), scratch=scratch)

    async def derive(self, request: Path, output: Path) -> DeriveReport:
        """Makes datasets of others, as files in `output`."""
        arguments = [str(request), str(output)]
        return await self._run("luthier_trainer.data.derive", arguments, DeriveReport(), scratch=output.parent)

    async def fetch(self, request: Path, output: Path, secrets: Mapping[str, str]) -> AsyncIterator[FetchReport]:
        """Fetches a dataset to `output`: how far it is, and at last whether it is there."""
        module = "luthier_trainer.data.fetch"
        more = {name: value for name, value in os.environ.items() if name.startswith(_SOURCES)}
        async with self._fetching, self._process(module, [str(request), str(output)], {**more, **secrets}) as process:
            assert process.stdout is not None
            last: FetchReport | None = None
            until = asyncio.get_running_loop().time() + self.fetch_seconds
            try:
                while last is None or last.HasField("progress"):
                    async with asyncio.timeout_at(until):
                        (length,) = _LENGTH.unpack(await process.stdout.readexactly(_LENGTH.size))
                        last = FetchReport.FromString(await process.stdout.readexactly(length))
                    yield last
            except TimeoutError as error:
                raise Unavailable(f"the import took longer than {self.fetch_seconds / 3600:.0f} hours") from error
            except (asyncio.IncompleteReadError, DecodeError):
                last = None
            if last is None or last.HasField("progress"):
                raise await self._failed(process, module)

    async def inspect_model(self, base_model: str, roots: Sequence[Path]) -> ModelReport:
        """What is known of a base model without loading it."""
        arguments = [part for root in roots for part in ("--root", str(root))]
        return await self._run("luthier_trainer.inspect", [*arguments, "--", base_model], ModelReport())

    async def _run(self, module: str, arguments: Sequence[str], answer: M, *, scratch: Path | None = None) -> M:
        environment = {"TMPDIR": str(scratch)} if scratch is not None else {}
        async with self._busy, self._process(module, arguments, environment) as process:
            try:
                async with asyncio.timeout(self.timeout_seconds):
                    assert process.stdout is not None
                    output = await process.stdout.read()
                    await process.wait()
            except TimeoutError as error:
                raise Unavailable(f"{module} took longer than {self.timeout_seconds:.0f} s and was stopped") from error
            if process.returncode == 0:
                with contextlib.suppress(DecodeError):
                    answer.ParseFromString(output)
                    return answer
            raise await self._failed(process, module)

    @contextlib.asynccontextmanager
    async def _process(
        self, module: str, arguments: Sequence[str], more: Mapping[str, str]
    ) -> AsyncIterator[asyncio.subprocess.Process]:
        """A worker that ends with the block, whatever happens."""
        # A reader of foreign files knows nothing that it could give away.
        environment = {name: value for name, value in os.environ.items() if name.startswith(_ENVIRONMENT)}
        process = await asyncio.create_subprocess_exec(
            self.python,
            "-m",
            module,
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
            env={**environment, **more},
        )
        assert process.stderr is not None
        errors = asyncio.create_task(_drained(process.stderr))
        try:
            yield process
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
            self._say(module, process.returncode, await errors)

    def _say(self, module: str, code: int | None, errors: bytes) -> None:
        if code and code > 0:
            log.error("worker failed", module=module, code=code, stderr=errors[-2000:].decode(errors="replace"))

    async def _failed(self, process: asyncio.subprocess.Process, module: str) -> Unavailable:
        code = await process.wait()
        if code < 0:
            return WorkerDied(f"{module} was ended by {signal.Signals(-code).name}")
        return Unavailable(f"{module} failed with code {code}: is luthier-trainer installed for {self.python}?")


async def _drained(stream: asyncio.StreamReader) -> bytes:
    """The end of what a worker says for people; read all along, so that it never blocks on a full pipe."""
    tail = b""
    while data := await stream.read(_STDERR):
        tail = (tail + data)[-_STDERR:]
    return tail
