"""Time and memory of a merge beside PEFT's merge_and_unload and save_pretrained.

    python -m benchmarks.exports [--rounds N] [--width N] [--layers N] [--shard-mb N]

Both read the same files and write bfloat16; each pass is a process of its own, and the sides take turns.
"""

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import child
from benchmarks.console import say, step, table

SIDES = ("luthier", "peft")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exports")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--shard-mb", type=int, default=200)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="luthier-exports-") as folder:
        measure(Path(folder), given.rounds, given.width, given.layers, given.shard_mb * 1_000_000)


def measure(folder: Path, rounds: int, width: int, layers: int, shard: int) -> None:
    """Makes the models in `folder`, runs the rounds and prints what came out."""
    from benchmarks.exports import subject

    size = subject.make(folder / "subject", width=width, layers=layers, shard_bytes=shard)
    subject.make(folder / "small", width=64, layers=1, shard_bytes=shard)
    passes: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for number in range(rounds):
        for side in SIDES if number % 2 == 0 else SIDES[::-1]:
            with step(f"round {number + 1}, {side}"):
                out = folder / "out" / "merged"
                out.parent.mkdir()
                arguments = (side, folder / "subject", folder / "small", out, shard)
                passes[side].append(child.run("benchmarks.exports.side", *arguments, seconds=600))
                shutil.rmtree(out.parent)
    say(f"\n{size / 1e6:,.0f} MB of weights in bfloat16, files of at most {shard / 1e6:,.0f} MB\n")
    rows = []
    for side in SIDES:
        middle = {key: statistics.median(each[key] for each in passes[side]) for key in passes[side][0]}
        peak = middle["peak_bytes"]
        cells = [f"{middle['seconds']:.2f}", f"{middle['processor']:.2f}", f"{peak / 1e6:,.0f}"]
        rows.append([side, *cells, f"{peak / size:.2f}", f"{peak / shard:.2f}"])
    table(["", "seconds", "CPU s", "peak MB", "peak/model", "peak/file"], rows)
    for key in ("seconds", "processor"):
        ratios = [mine[key] / theirs[key] for mine, theirs in zip(*(passes[side] for side in SIDES), strict=True)]
        say(f"  {key}: {statistics.median(ratios):.2f} of PEFT's, in the rounds {' '.join(f'{r:.2f}' for r in ratios)}")
    say(json.dumps(passes))


if __name__ == "__main__":
    main()
