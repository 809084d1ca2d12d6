"""A process that trains on request, for one contestant, so that it sees nothing of what another one loads.

A request is a line of JSON on standard input, an answer a line on standard output; what libraries print goes to
standard error.
"""

import dataclasses
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.engine import memory, workload
from benchmarks.engine.contestant import Contestant
from benchmarks.engine.passes import Pass


def _products(dtype_name: str, size: int = 2048, seconds: float = 0.4) -> dict[str, float]:
    """GFLOP of square matrix products, the best within `seconds`: by the clock, and by a second of processor time."""
    import torch

    dtype = getattr(torch, dtype_name)
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    best = best_cpu = float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start, start_cpu = time.perf_counter(), time.process_time()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
        best_cpu = min(best_cpu, time.process_time() - start_cpu)
    work = 2 * size**3 / 1e9
    return {"per_second": work / best, "per_cpu_second": work / best_cpu}


class _Worker:
    """Answers requests in the directory `work`. What the loaded process has resident is noted once everything is
    imported; when a request says `loaded_anew`, before each pass."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self._loaded = 0

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """What the request asks for."""
        if request["do"] == "model":
            workload.write_model(self._work / "model")
            return {}
        if request["do"] == "products":
            return _products(request["dtype"])
        done = self._pass(Contestant(**request["contestant"]), request)
        return dataclasses.asdict(dataclasses.replace(done, loaded_resident=self._loaded))

    def _pass(self, contestant: Contestant, request: dict[str, Any]) -> Pass:
        side = importlib.import_module(f"benchmarks.engine.{contestant.engine}_side")
        memory.settle()
        if not self._loaded or request["loaded_anew"]:
            self._loaded = memory.resident()
        rows, model = self._work / request["path"], self._work / "model"
        if contestant.engine == "luthier":
            done: Pass = side.run(contestant, model, rows, request["rows"], self._work)
        else:
            done = side.run(contestant, model, rows, self._work)
        return done


def main() -> None:
    """Answers until standard input ends."""
    worker = _Worker(Path(sys.argv[1]))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            answer = worker.answer(json.loads(line))
        except Exception as error:
            import traceback

            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
