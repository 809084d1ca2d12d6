"""A process that measures one engine on some cells: a line of JSON on standard input asks, each cell's numbers are a
line on standard output. What libraries print goes to standard error."""

import contextlib
import dataclasses
import gc
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks.cuda import models, rows
from benchmarks.cuda.cells import STEPS, WARM_STEPS, Cell, Setting, settings
from benchmarks.cuda.passes import Outcome, products
from benchmarks.cuda.shapes import SHAPES
from benchmarks.engine.workload import Chat


def measure(engine: str, cell: Cell, device: torch.device) -> dict[str, Any]:
    """The numbers of an engine on a cell; of TRL's settings the fastest in a short pass, and what became of the
    others."""
    shape = SHAPES[cell.shape]
    with tempfile.TemporaryDirectory(prefix="luthier-bench-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        models.write_description(folder, shape, cell.length)
        short, long = (rows.rows(cell, steps, shape.vocabulary) for steps in (WARM_STEPS, STEPS))
        for name, chats in (("short", short), ("long", long)):
            rows.write(folder / f"{name}.jsonl", chats, ordered=engine != "luthier" and cell.kind == "chats")
        peak = products(device)
        tried, best = _heat(engine, cell, folder, short, device)
        if best is None:
            return {"problem": tried[0]["problem"], "tried": tried}
        done = _pass(engine, cell, best, folder, "long", long, device)
        if engine == "unsloth":
            from benchmarks.cuda.unsloth_side import forget

            forget(folder)
    tokens, scored = sum(each.tokens for each in long), sum(each.scored for each in long)
    if (done.tokens, done.scored) != (tokens, scored):
        problem = f"it trained on {done.tokens} tokens and scored {done.scored}, not on {tokens} and {scored}"
        return {"problem": problem, "tried": tried}
    operations = sum(shape.operations.of(each.tokens, each.scored) for each in long)
    return {
        "problem": "",
        **dataclasses.asdict(done),
        "tokens_per_second": round(done.tokens / done.seconds, 1),
        "flops_utilisation": round(operations / done.seconds / peak, 3),
        "products_tflops": round(peak / 1e12, 1),
        "peak_gib": round(done.peak_bytes / 2**30, 2),
        "tried": tried,
    }


def _heat(
    engine: str, cell: Cell, folder: Path, chats: list[Chat], device: torch.device
) -> tuple[list[dict[str, Any]], Setting | None]:
    """A short pass with each setting, which warms up too: (what each did, the fastest). None when none ran."""
    contenders: list[Setting] = [Setting(0, False)]
    if engine == "trl":
        from benchmarks.cuda.trl_side import has_flash

        contenders = settings(cell, flash=has_flash())
        with contextlib.suppress(Exception):  # so that the first of them does not pay for what the process does once
            _pass(engine, cell, contenders[0], folder, "short", chats, device)
    tried: list[dict[str, Any]] = []
    for setting in contenders:
        try:
            done = _pass(engine, cell, setting, folder, "short", chats, device)
        except Exception as error:
            traceback.print_exc()
            tried.append({"setting": setting.name, "problem": f"{type(error).__name__}: {error}".splitlines()[0][:200]})
        else:
            tried.append({"setting": done.setting, "problem": "", "tokens_per_second": done.tokens / done.seconds})
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    ran = [pair for pair in zip(contenders, tried, strict=True) if not pair[1]["problem"]]
    if not ran:
        return tried, None
    return tried, max(ran, key=lambda pair: float(pair[1]["tokens_per_second"]))[0]


def _pass(
    engine: str, cell: Cell, setting: Setting, folder: Path, name: str, chats: list[Chat], device: torch.device
) -> Outcome:
    path = folder / f"{name}.jsonl"
    if engine == "luthier":
        from benchmarks.cuda import luthier_side

        return luthier_side.run(cell, folder, path, chats, device)
    if engine == "trl":
        from benchmarks.cuda import trl_side

        return trl_side.run(cell, setting, folder, path, device)
    from benchmarks.cuda import unsloth_side

    return unsloth_side.run(cell, folder, path, device)


def main() -> None:
    """Answers one request: {"engine", "device", "cells"}."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    request = json.loads(sys.stdin.readline())
    device = torch.device(request["device"])
    for each in request["cells"]:
        try:
            answer = measure(request["engine"], Cell(**each), device)
        except Exception as error:
            traceback.print_exc()
            answer = {"problem": f"{type(error).__name__}: {error}".splitlines()[0][:200], "tried": []}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
