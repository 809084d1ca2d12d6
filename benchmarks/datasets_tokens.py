"""One pass of tokenising, in a process of its own: `python -m benchmarks.datasets_tokens CONTESTANT FILE FOLDER`.

Prints, as JSON, the seconds that it took and the tokens that came of it. Imports, the tokenizer and of `datasets` the
loading of the file are not in the seconds; Luthier's reading of it is.

luthier: what a trainer does, with an empty cache. map: `datasets.map` with `apply_chat_template`, row by row. batched:
the same with a thousand rows a call.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

CONTESTANTS = ("luthier", "map", "batched")
MAX_LENGTH = 32_768


def _luthier(path: Path, folder: Path, tokenizer: Any) -> tuple[float, float, int, int, int]:
    from luthier.trainer.v1.task_pb2 import DatasetSource
    from luthier.v1.tokenization_pb2 import Tokenization
    from luthier_trainer.console import SilentReporter
    from luthier_trainer.data.masks.template import template_of
    from luthier_trainer.data.tokens import tokenised
    from luthier_trainer.data.tokens.options import Options

    with open(path, "rb") as file:
        rows = sum(1 for _ in file)
    source = DatasetSource(path=str(path), sha256="ab" * 32, rows=rows)
    begin = time.perf_counter()
    found = tokenised.load(
        source,
        tokenizer,
        template_of(tokenizer),
        Options.of(Tokenization(), MAX_LENGTH),
        cache_dir=folder / "cache",
        reporter=SilentReporter(),
    )
    seconds = time.perf_counter() - begin
    statistics = found.report.statistics
    return 0, seconds, len(found), statistics.tokens, statistics.trained_tokens


def _datasets(path: Path, folder: Path, tokenizer: Any, *, batched: bool) -> tuple[float, float, int, int, int]:
    import datasets

    datasets.disable_progress_bars()
    begin = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(folder / "hf"))
    loading = time.perf_counter() - begin

    def tokenise(row: Any) -> Any:
        return tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)

    begin = time.perf_counter()
    found = rows.map(tokenise, batched=batched, remove_columns=rows.column_names, load_from_cache_file=False)
    seconds = time.perf_counter() - begin
    ids, masks = found.data.column("input_ids"), found.data.column("assistant_masks")
    tokens = sum(len(chunk.flatten()) for chunk in ids.chunks)
    trained = sum(int(chunk.flatten().to_numpy().sum()) for chunk in masks.chunks)
    return loading, seconds, len(found), tokens, trained


def main(contestant: str, path: Path, folder: Path) -> None:
    """The command."""
    from transformers import AutoTokenizer

    from luthier_trainer.inspect import BUILTIN

    tokenizer = AutoTokenizer.from_pretrained(BUILTIN / "tiny")
    if contestant == "luthier":
        found = _luthier(path, folder, tokenizer)
    else:
        found = _datasets(path, folder, tokenizer, batched=contestant == "batched")
    names = ("loading_seconds", "seconds", "rows", "tokens", "trained_tokens")
    print(json.dumps(dict(zip(names, found, strict=True))))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
