"""One pass of tokenising, in a process of its own: `python -m benchmarks.datasets_tokens CONTESTANT FILE FOLDER`.

Prints, as JSON, the times of `Stopwatch` for the work, of `datasets` also those of the loading of the file,
which Luthier's have in them, and what came of it. Imports and the tokenizer's own loading are not timed.

luthier: what a trainer does, with an empty cache. map: `datasets.map` with `apply_chat_template`, row by row. batched:
the same with a thousand rows a call.
"""

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.engine.passes import Stopwatch

CONTESTANTS = ("luthier", "map", "batched")
MAX_LENGTH = 32_768


def _luthier(path: Path, folder: Path, tokenizer: Any) -> dict[str, Any]:
    from luthier.trainer.v1.task_pb2 import DatasetSource
    from luthier.v1.tokenization_pb2 import Tokenization
    from luthier_trainer.console import SilentReporter
    from luthier_trainer.data.masks.template import template_of
    from luthier_trainer.data.tokens import tokenised
    from luthier_trainer.data.tokens.options import Options

    with open(path, "rb") as file:
        rows = sum(1 for _ in file)
    source = DatasetSource(path=str(path), sha256="ab" * 32, rows=rows)
    watch = Stopwatch()
    watch.start()
    found = tokenised.load(
        source,
        tokenizer,
        template_of(tokenizer),
        Options.of(Tokenization(), MAX_LENGTH),
        cache_dir=folder / "cache",
        reporter=SilentReporter(),
    )
    watch.lap()
    statistics = found.report.statistics
    return {
        "work": watch.times,
        "loading": dict.fromkeys(watch.times, 0.0),
        "counts": [len(found), statistics.tokens, statistics.trained_tokens],
    }


def _datasets(path: Path, folder: Path, tokenizer: Any, *, batched: bool) -> dict[str, Any]:
    import datasets

    datasets.disable_progress_bars()
    loading, work = Stopwatch(), Stopwatch()
    loading.start()
    rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(folder / "hf"))
    loading.lap()

    def tokenise(row: Any) -> Any:
        return tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)

    work.start()
    found = rows.map(tokenise, batched=batched, remove_columns=rows.column_names, load_from_cache_file=False)
    work.lap()
    ids, masks = found.data.column("input_ids"), found.data.column("assistant_masks")
    tokens = sum(len(chunk.flatten()) for chunk in ids.chunks)
    trained = sum(int(chunk.flatten().to_numpy().sum()) for chunk in masks.chunks)
    return {"work": work.times, "loading": loading.times, "counts": [len(found), tokens, trained]}


def main(contestant: str, path: Path, folder: Path) -> None:
    """The command."""
    from transformers import AutoTokenizer

    from luthier_trainer.inspect import BUILTIN

    tokenizer = AutoTokenizer.from_pretrained(BUILTIN / "tiny")
    if contestant == "luthier":
        found = _luthier(path, folder, tokenizer)
    else:
        found = _datasets(path, folder, tokenizer, batched=contestant == "batched")
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
