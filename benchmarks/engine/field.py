"""The field: the processes that train, and the work they share."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.console import step
from benchmarks.engine import workload
from benchmarks.engine.contestant import Contestant
from benchmarks.engine.passes import Pass, Products

_WARM_UP_ROWS = 4
_JUDGE = "judge"


class CannotRun(Exception):
    """A contestant failed; the message says how."""


class Field:
    """Runs contestants, one at a time: while one trains the others' processes wait for their next requests.

    Each has a process of its own, so that none sees what another loads or leaves in the allocator. `together`: all of
    them have one, for passes that differ in a single thing.
    """

    def __init__(self, work: Path, *, together: bool = False) -> None:
        self._work = work
        self._together = together
        self._workers: dict[str, subprocess.Popen[str]] = {}
        self._warm: set[Contestant] = set()

    def prepare(self) -> None:
        """Makes the model."""
        self._ask(_JUDGE, {"do": "model"})

    def run(self, contestant: Contestant, rows: int) -> Pass:
        """A pass over `rows` rows; before a contestant's first one a short pass that is not measured.
        Raises CannotRun."""
        if contestant not in self._warm:
            self._pass(contestant, _WARM_UP_ROWS)
            self._warm.add(contestant)
        return self._pass(contestant, rows)

    def products(self, dtype: str) -> Products:
        """How fast large matrix products are now. Raises CannotRun."""
        return Products(**self._ask(_JUDGE, {"do": "products", "dtype": dtype}))

    def retire(self, contestant: Contestant) -> None:
        """Ends the process of one who takes no further part."""
        worker = self._workers.pop(self._name(contestant), None)
        if worker is not None:
            _end(worker)

    def last_words(self, contestant: Contestant) -> list[str]:
        """The last lines that a contestant's worker printed."""
        log = self._log(self._name(contestant))
        return log.read_text(errors="replace").splitlines()[-3:] if log.exists() else []

    def close(self) -> None:
        """Ends the workers."""
        for worker in self._workers.values():
            _end(worker)

    def _name(self, contestant: Contestant) -> str:
        if self._together:
            return "together"
        return contestant.name.replace(", ", "-").replace(" ", "-").lower()

    def _log(self, name: str) -> Path:
        return self._work / f"{name}.log"

    def _pass(self, contestant: Contestant, rows: int) -> Pass:
        chosen = workload.sample(rows)
        path = self._work / f"rows-{rows}-{contestant.ordered}.jsonl"
        if not path.exists():
            workload.write_rows(path, sorted(chosen, key=lambda each: -each.tokens) if contestant.ordered else chosen)
        request = {
            "do": "pass",
            "contestant": asdict(contestant),
            "path": path.name,
            "rows": rows,
            "loaded_anew": self._together,
        }
        done = Pass(**self._ask(self._name(contestant), request))
        tokens, scored = sum(each.tokens for each in chosen), sum(each.scored for each in chosen)
        if (done.tokens, done.scored) != (tokens, scored):
            raise CannotRun(
                f"it trained on {done.tokens} tokens and scored {done.scored}, not on {tokens} and {scored}"
            )
        return done

    def _ask(self, name: str, request: dict[str, Any]) -> dict[str, Any]:
        worker = self._workers.get(name)
        if worker is None or worker.poll() is not None:
            worker = self._workers[name] = self._start(name)
        assert worker.stdin is not None and worker.stdout is not None
        worker.stdin.write(json.dumps(request) + "\n")
        worker.stdin.flush()
        line = worker.stdout.readline()
        if not line:
            raise CannotRun(f"the worker {name} died with code {worker.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise CannotRun(answer["error"])
        return answer

    def _start(self, name: str) -> "subprocess.Popen[str]":
        environment = os.environ | {
            # What Luthier's trainers set (waiting threads sleep), for all.
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_DATASETS_CACHE": str(self._work / "datasets"),
        }
        with open(self._log(name), "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "benchmarks.engine.worker", str(self._work)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )


def _end(worker: "subprocess.Popen[str]") -> None:
    worker.kill()
    worker.wait()


@contextlib.contextmanager
def field(work: Path, *, together: bool = False) -> Iterator[Field]:
    """A field in the directory `work`, with its model made."""
    work.mkdir(parents=True, exist_ok=True)
    made = Field(work, together=together)
    try:
        with step("making the model"):
            made.prepare()
        yield made
    finally:
        made.close()
