"""A run: a site with clients around it, faults, a quiet end, and the oracle's verdict."""

import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from daemon import puppet, small
from fault.clients import Clients
from fault.oracle import judge
from fault.site import Site

from luthier.v1.job_pb2 import Checkpoints, Hyperparameters, JobSpec, JobState, Lora

STEP_SECONDS = 0.05


@dataclass
class Result:
    """What a run did and found. `notes`: counts by name that only a reader needs."""

    row: str
    seed: int
    real: bool
    faults: int = 0
    events: int = 0
    seconds: float = 0
    violations: list[str] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For a line of JSON."""
        return asdict(self)


@dataclass
class Stage:
    """What a fault acts on. `count`: how many faults are asked for."""

    site: Site
    clients: Clients
    dice: random.Random
    count: int
    real: bool
    notes: Counter[str]


Inject = Callable[[Stage], Awaitable[int]]
"""Injects faults, leaves a server that serves and into which nothing is injected, and returns how many there were."""


async def run(
    row: str,
    seed: int,
    count: int,
    inject: Inject,
    *,
    real: bool = False,
    flags: Sequence[str] = (),
    new_spec: Callable[[random.Random], JobSpec] | None = None,
    tolerant: bool = False,
    busy: bool = True,
    first: dict[str, str] | None = None,
) -> Result:
    """Runs one scenario. `busy`: clients work all the while; `first`: the environment of the first server."""
    began = time.monotonic()
    result = Result(row, seed, real)
    dice = random.Random(f"{row} {seed}")
    folder = Path(tempfile.mkdtemp(prefix="luthier-fault-"))
    kind = ["--threads=1"] if real else puppet(step_seconds=STEP_SECONDS)
    site = Site(folder / "data", [*kind, "--stall-timeout", "15" if real else "2", *flags], dice)
    makes = new_spec or (a_real_spec if real else a_spec)
    # A puppet's exports are quick; a real one would outlast the faults.
    clients = Clients(site, dice, makes, tolerant=tolerant, exports=new_spec is None and not real)
    notes: Counter[str] = Counter()
    try:
        await site.start(**(first or {}))
        await clients.upload()
        if busy:
            clients.start()
        result.faults = await inject(Stage(site, clients, dice, count, real, notes))
        await clients.finish()
        await clients.succeed(_last_spec(real))
        await site.stop()
        verdict = judge(site.recording)
        result.events = verdict.events
        result.violations = list(verdict.violations)
        notes.update(
            f"{'exports' if job.spec.HasField('export') else 'jobs'} {JobState.Name(job.state)[10:].lower()}"
            for job in clients.jobs.values()
        )
        if not tolerant:
            result.violations += (f"the log says: {line}" for line in site.words_of_bugs())
    except Exception as error:
        result.violations += [*site.recording.complaints, f"the run broke: {error!r}"]
        if not isinstance(error, RuntimeError):
            raise
    finally:
        await clients.close()
        site.close()
        result.notes = dict(notes)
        result.seconds = round(time.monotonic() - began, 1)
        if not result.violations:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            result.violations.append(f"kept: {folder}")
    return result


def a_spec(dice: random.Random) -> JobSpec:
    """A job of one to four seconds for a puppet."""
    spec = small(
        hyperparameters=Hyperparameters(max_steps=dice.randrange(20, 80)),
        checkpoints=Checkpoints(every_steps=dice.choice((3, 10, 1000)), keep=3),
    )
    spec.max_retries = dice.choice((0, 2, 5))
    return spec


def _last_spec(real: bool) -> JobSpec:
    spec = a_real_spec(random.Random(0)) if real else small()
    spec.fine_tune.hyperparameters.max_steps = 5
    return spec


def a_real_spec(dice: random.Random) -> JobSpec:
    """A job of a few seconds for the real trainer on builtin/tiny."""
    spec = small(
        hyperparameters=Hyperparameters(max_steps=dice.randrange(5, 40), batch_size=2, max_length=64),
        lora=Lora(rank=4),
        checkpoints=Checkpoints(every_steps=dice.choice((3, 10)), keep=3),
    )
    spec.max_retries = dice.choice((2, 5))
    return spec
