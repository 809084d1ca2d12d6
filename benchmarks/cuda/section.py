"""The cells on a CUDA device: Luthier, TRL at its best, and Unsloth where it is installed, each in its own process."""

import argparse
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from benchmarks.aims import Aim, Section
from benchmarks.console import say, table
from benchmarks.cuda.cells import Cell, cells

_TELLING = Cell("8B", "lora", 4096)
"""The cell that has aims."""

_SPEED, _RATIO = 15_000.0, 1.5
_AIMED_DEVICE = "H200"
_LIMIT = 540.0
"""Seconds, after which cells that were not begun are left out."""


def measure(*, quick: bool, chosen: Sequence[Cell] | None = None, seconds: float = _LIMIT) -> Section:
    """All cells, or those chosen; a quick run has the telling one alone. Without a CUDA device it says so and measures
    nothing."""
    name = _device_name()
    if not name:
        say("CUDA: there is no CUDA device here, so nothing is measured")
        return Section({})
    wanted = list(chosen) if chosen is not None else [_TELLING] if quick else cells()
    found = _measured(wanted, "cuda:0", seconds)
    show(found)
    return Section({"device": name, "libraries": _libraries(), "cells": found}, aims(found, name))


def _measured(wanted: Sequence[Cell], device: str, seconds: float) -> list[dict[str, Any]]:
    """Each cell with its engines' numbers; cells of one shape and method follow each other, all engines on them in
    turn."""
    begin = time.perf_counter()
    engines = ["luthier", "trl", *(["unsloth"] if importlib.util.find_spec("unsloth") else [])]
    found = []
    for _, group in groupby(wanted, key=lambda each: (each.shape, each.method)):
        together = list(group)
        numbers: list[dict[str, Any]] = [{"cell": asdict(each), "name": each.name, "engines": {}} for each in together]
        for engine in engines:
            left = seconds - (time.perf_counter() - begin)
            answers = _asked(engine, device, together, left)
            for entry, answer in zip(numbers, answers, strict=False):
                entry["engines"][engine] = answer
            for entry in numbers[len(answers) :]:
                entry["engines"][engine] = {"problem": "no time was left, or its process died", "tried": []}
        found += numbers
    return found


def _asked(engine: str, device: str, wanted: Sequence[Cell], seconds: float) -> list[dict[str, Any]]:
    """What the process of an engine answers within so many seconds; its errors go where ours go."""
    if seconds <= 0:
        return []
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "benchmarks.cuda.side"]
    answers: list[dict[str, Any]] = []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as side:
        assert side.stdin is not None and side.stdout is not None
        side.stdin.write(json.dumps({"engine": engine, "device": device, "cells": [asdict(each) for each in wanted]}))
        side.stdin.close()
        with _ended_after(side, seconds):
            for cell, line in zip(wanted, side.stdout, strict=False):
                answers.append(json.loads(line))
                say(f"  {engine}, {cell.name}: {_told(answers[-1])}")
    return answers


@contextlib.contextmanager
def _ended_after(process: "subprocess.Popen[str]", seconds: float) -> Iterator[None]:
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def aims(found: Sequence[dict[str, Any]], device: str) -> tuple[Aim, ...]:
    """Of the telling cell, when it was measured: the speed is aimed at on an H200 and wished for elsewhere."""
    telling = next((each for each in found if each["cell"] == asdict(_TELLING)), None)
    if telling is None:
        return ()
    ours, trl = (telling["engines"].get(each, {"problem": "not measured"}) for each in ("luthier", "trl"))
    speed = 0.0 if ours["problem"] else float(ours["tokens_per_second"])
    ratio = 0.0 if trl["problem"] else speed / float(trl["tokens_per_second"])
    wish = _AIMED_DEVICE not in device
    return (
        Aim("cuda_speed", f"{telling['name']}, {device}", speed, _SPEED, "higher", "tokens/s", wish=wish),
        Aim("cuda_ratio", f"{telling['name']}: tokens/s, times those of TRL's best", ratio, _RATIO, "higher"),
    )


def _told(answer: dict[str, Any]) -> str:
    if answer["problem"]:
        return f"did not run: {answer['problem']}"
    return (
        f"{answer['tokens_per_second']:,.0f} tokens/s, MFU {answer['flops_utilisation']:.0%}, "
        f"{answer['peak_gib']:.1f} GiB ({answer['setting']})"
    )


def show(found: Sequence[dict[str, Any]]) -> None:
    """The table."""
    rows = [
        (each["name"] if engine == "luthier" else "", engine, _told(answer))
        for each in found
        for engine, answer in each["engines"].items()
    ]
    say()
    table(("cell", "engine", "reached"), rows)


def _device_name() -> str:
    """Empty without a CUDA device. In a process of its own, so that none of its memory is taken here."""
    code = "import torch; print(torch.cuda.get_device_name(0) if torch.cuda.is_available() else '')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return done.stdout.strip()


def _libraries() -> dict[str, bool]:
    names = ("flash_attn", "bitsandbytes", "unsloth", "triton")
    return {name: importlib.util.find_spec(name) is not None for name in names}


def main() -> None:
    """`python -m benchmarks.cuda.section`: some of the cells, by parts of their names; or a rehearsal. Nothing is
    written."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda.section", description=main.__doc__)
    parser.add_argument("--cell", action="append", metavar="TEXT", help='cells whose names hold it: "8B, LoRA"')
    parser.add_argument("--seconds", type=float, default=_LIMIT, help="for all of them")
    parser.add_argument("--rehearse", action="store_true", help="a tiny model on the CPU, to see that all of it works")
    chosen = parser.parse_args()
    if chosen.rehearse:
        tiny: list[Cell] = [Cell("tiny", "lora", 128, step_tokens=512), Cell("tiny", "lora", 128, "chats", 512)]
        if importlib.util.find_spec("bitsandbytes"):
            tiny.append(Cell("tiny", "qlora", 128, step_tokens=512))
        show(_measured(tiny, "cpu", chosen.seconds))
        return
    wanted = [each for each in cells() if any(text in each.name for text in chosen.cell or ("",))]
    measure(quick=False, chosen=wanted, seconds=chosen.seconds)


if __name__ == "__main__":
    main()
