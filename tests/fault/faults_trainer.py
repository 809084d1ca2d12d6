"""Trainers are killed, stopped until the server calls them silent, and die in the middle of a spool write."""

import asyncio
import contextlib
import os
import signal
from pathlib import Path

from fault.recording import read_spool
from fault.scenario import Result, Stage, run
from fault.site import until

from luthier.trainer import attempt as files
from luthier.trainer.v1.host_pb2 import HostedTrainer
from luthier.trainer.v1.report_pb2 import TrainerReport
from luthier.v1.event_pb2 import LogEmitted

_NOBODY = 1 << 22  # above every process there can be
_WAYS = ("kill", "torn", "wrong crc", "half", "stop")


async def deaths(seed: int, count: int, real: bool) -> Result:
    """A random trainer's group gets SIGKILL or SIGSTOP at a random moment, in the five ways in turn."""

    async def inject(stage: Stage) -> int:
        for number in range(stage.count):
            await stage.clients.step(90 if real else 20)
            await asyncio.sleep(stage.dice.uniform(0, 0.5))
            trainer = await _some_trainer(stage)
            way = _WAYS[number % len(_WAYS)]
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                await _end(trainer, way, stage)
                stage.notes[way] += 1
        return sum(stage.notes[way] for way in _WAYS)

    return await run("trainer-death", seed, count, inject, real=real)


async def _some_trainer(stage: Stage) -> HostedTrainer:
    await until(lambda: stage.site.trainers(), 60)
    return stage.dice.choice(stage.site.trainers() or [HostedTrainer(pid=_NOBODY)])


async def _end(trainer: HostedTrainer, way: str, stage: Stage) -> None:
    if way == "kill":
        os.killpg(trainer.pid, signal.SIGKILL)
        return
    os.killpg(trainer.pid, signal.SIGSTOP)
    if way == "stop":
        return  # it stays so until the stall timeout
    directory = Path(trainer.attempt_dir)
    frame = files.frame(_next_report(directory).SerializeToString())
    cut = stage.dice.randrange(1, len(frame))
    if way == "wrong crc":
        _append(directory, frame[:-1] + bytes([frame[-1] ^ 0xFF]))
    else:
        _append(directory, frame[:cut])
    if way == "half":
        await asyncio.sleep(stage.dice.uniform(0, 0.7))  # the server looks at a record that is not yet written
        _append(directory, frame[cut:])
    os.killpg(trainer.pid, signal.SIGKILL)


def _append(directory: Path, data: bytes) -> None:
    with open(directory / files.SPOOL, "ab", buffering=0) as spool:
        spool.write(data)


def _next_report(directory: Path) -> TrainerReport:
    """What the stopped trainer could have written next."""
    written = read_spool(directory).reports
    report = TrainerReport(sequence=len(written) + 1, log_emitted=LogEmitted(message="written by half"))
    report.time.GetCurrentTime()
    return report
