"""Time and memory of a quantised GGUF file beside llama.cpp's own quantisation, by cyllama.

    python -m benchmarks.exports.gguf [--rounds N] [--width N] [--layers N] [--type q4_k_m] [--threads N]

llama.cpp quantises a GGUF file in 16 bits that lies there already; Luthier reads the model's own files and writes the
quantised one at once, proving the tokenizer on the way. Each pass is a process of its own, and the sides take turns.
The files are compared: they must be the same, byte for byte.
"""

import argparse
import filecmp
import json
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import child
from benchmarks.console import say, step, table
from benchmarks.exports.gguf_side import FILE_TYPES, luthier

SIDES = ("luthier", "cyllama")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exports.gguf")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--type", choices=sorted(FILE_TYPES), default="q4_k_m")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="luthier-exports-") as folder:
        measure(Path(folder), given.rounds, given.width, given.layers, given.type, given.threads)


def measure(folder: Path, rounds: int, width: int, layers: int, kind: str, threads: int) -> None:
    """Makes the models in `folder`, runs the rounds and prints what came out."""
    from benchmarks.exports import subject

    size = subject.make(folder / "subject", width=width, layers=layers, shard_bytes=200_000_000)
    subject.make(folder / "small", width=256, layers=1, shard_bytes=200_000_000)
    for each in (folder / "subject", folder / "small"):
        luthier(each, "f16", threads)
        (each / "luthier" / "model-f16.gguf").rename(each / "f16.gguf")
        shutil.rmtree(each / "luthier")
    passes: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for number in range(rounds):
        for side in SIDES if number % 2 == 0 else SIDES[::-1]:
            with step(f"round {number + 1}, {side}"):
                arguments = (side, folder / "subject", folder / "small", kind, threads)
                passes[side].append(child.run("benchmarks.exports.gguf_side", *arguments, seconds=900))
        ours = folder / "subject" / "luthier"
        same = filecmp.cmp(ours / f"model-{kind}.gguf", folder / "subject" / "cyllama.gguf", shallow=False)
        say(f"  round {number + 1}: the files are {'the same, byte for byte' if same else 'NOT the same'}")
        shutil.rmtree(ours)
    largest = 4 * 32_000 * width
    say(f"\n{size / 1e6:,.0f} MB of weights in bfloat16, the largest {largest / 1e6:,.0f} MB in 32 bits; {kind}\n")
    rows = []
    for side in SIDES:
        middle = {key: statistics.median(each[key] for each in passes[side]) for key in passes[side][0]}
        cells = [f"{middle['seconds']:.2f}", f"{middle['processor']:.2f}", f"{middle['peak_bytes'] / 1e6:,.0f}"]
        rows.append([side, *cells, f"{middle['peak_bytes'] / largest:.2f}"])
    table(["", "seconds", "CPU s", "peak MB", "peak/largest"], rows)
    for key in ("seconds", "processor"):
        ratios = [mine[key] / theirs[key] for mine, theirs in zip(*(passes[side] for side in SIDES), strict=True)]
        told = " ".join(f"{ratio:.2f}" for ratio in ratios)
        say(f"  {key}: {statistics.median(ratios):.2f} of llama.cpp's, in the rounds {told}")
    say(json.dumps(passes))


if __name__ == "__main__":
    main()
