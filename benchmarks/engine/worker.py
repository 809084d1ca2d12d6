"""A process that trains on request: one for Luthier and one for TRL, so that neither sees what the other loads.

A request is a line of JSON on standard input, an answer a line on standard output; what libraries print goes to
standard error.
"""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.engine import workload
from benchmarks.engine.contestant import Contestant


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


def _answer(request: dict[str, Any], work: Path) -> dict[str, Any]:
    if request["do"] == "model":
        workload.write_model(work / "model")
        return {}
    if request["do"] == "products":
        return _products(request["dtype"])
    contestant = Contestant(**request["contestant"])
    rows = work / request["path"]
    if contestant.engine == "luthier":
        from benchmarks.engine import luthier_side

        done = luthier_side.run(contestant, work / "model", rows, request["rows"], work)
    else:
        from benchmarks.engine import trl_side

        done = trl_side.run(contestant, work / "model", rows, work)
    return dataclasses.asdict(done)


def main() -> None:
    """Answers until standard input ends."""
    work = Path(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            answer = _answer(json.loads(line), work)
        except Exception as error:
            import traceback

            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
