"""Short-lived processes that run the trainer's torch-free code: the check of a dataset file, a look at a base model.

The server imports nothing of the trainer; it executes `python -m luthier_trainer...` and reads one proto message.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import structlog
from google.protobuf.message import DecodeError, Message

from luthier.trainer.v1.report_pb2 import DatasetReport, ModelReport
from luthier_server.errors import Unavailable

M = TypeVar("M", bound=Message)
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Workers:
    """Runs the trainer's workers with its Python."""

    python: str
    timeout_seconds: float = 600

    async def check_dataset(self, file: Path) -> DatasetReport:
        """What the structural check finds in a file of rows."""
        return await self._run("luthier_trainer.data.check", [str(file)], DatasetReport())

    async def inspect_model(self, base_model: str, roots: Sequence[Path]) -> ModelReport:
        """What is known of a base model without loading it."""
        arguments = [part for root in roots for part in ("--root", str(root))]
        return await self._run("luthier_trainer.inspect", [*arguments, "--", base_model], ModelReport())

    async def _run(self, module: str, arguments: Sequence[str], answer: M) -> M:
        process = await asyncio.create_subprocess_exec(
            self.python,
            "-m",
            module,
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(self.timeout_seconds):
                output, errors = await process.communicate()
        except TimeoutError as error:
            raise Unavailable(f"{module} took longer than {self.timeout_seconds:.0f} s and was stopped") from error
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if process.returncode == 0:
            with contextlib.suppress(DecodeError):
                answer.ParseFromString(output)
                return answer
        log.error(
            "worker failed", module=module, code=process.returncode, stderr=errors[-2000:].decode(errors="replace")
        )
        raise Unavailable(
            f"{module} failed with code {process.returncode}: is luthier-trainer installed for {self.python}?"
        )
