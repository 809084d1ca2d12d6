"""How many tokens the rows of a dataset are: read from the cache where they are tokenised, else from a sample of them.

A sample is spread over the file where the file lets one read from its middle (plain JSONL); of any other file it is the
beginning.
"""

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from luthier.trainer.v1 import task_pb2
from luthier_trainer.data.formats import records
from luthier_trainer.data.masks.render import Example, Rendered, render, tokenise
from luthier_trainer.data.masks.template import RowRefused
from luthier_trainer.data.problem import Level, Problem
from luthier_trainer.data.reading import FileFormat, Reading
from luthier_trainer.data.records import Passage, Record, passages
from luthier_trainer.data.tokens import cache, tokenised
from luthier_trainer.data.tokens.overlong import cut
from luthier_trainer.data.tokens.task import Tokens
from luthier_trainer.report import Reporter
from luthier_trainer.stop import Check

SAMPLE_ROWS = 1000
SAMPLE_SECONDS = 1.0
_PLACES = 40
_WINDOW = 256 * 1024
"""Bytes read at each place of a file."""
_AT_ONCE = 32
_BYTES_PER_TOKEN, _BYTES_PER_ROW = 5, 48
"""Of the cache's file: an id and a mask for each token; numbers, hashes and offsets for each row."""

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Counted:
    """Rows that were counted, of `rows` in all.

    tokens: int64 [counted], of all examples of a row; scored: int64 [counted], those that are targets of the loss;
    pairs: float64 [counted], of a token and one that it attends to; longest: tokens of the longest example; is_cached:
    whether the tokenised rows lie in the cache; is_spread: whether a sample is spread over the file.
    """

    rows: int
    tokens: Numbers
    scored: Numbers
    pairs: npt.NDArray[np.float64]
    longest: int
    is_cached: bool = False
    is_spread: bool = True

    @property
    def is_whole(self) -> bool:
        """Whether every row was counted."""
        return len(self.tokens) >= self.rows

    def sums(self, indices: Numbers) -> tuple[float, float, float]:
        """(tokens, scored, pairs) of these rows, each taken as often as it stands there; of a sample what so many rows
        are on average."""
        if self.is_whole:
            return (
                float(self.tokens[indices].sum()),
                float(self.scored[indices].sum()),
                float(self.pairs[indices].sum()),
            )
        share = len(indices) / max(len(self.tokens), 1)
        return float(self.tokens.sum() * share), float(self.scored.sum() * share), float(self.pairs.sum() * share)

    @property
    def cache_bytes(self) -> int:
        """Bytes that the tokenised rows take on disk, about; 0 when they are there."""
        if self.is_cached:
            return 0
        tokens = self.tokens.sum() * (self.rows / max(len(self.tokens), 1))
        return int(tokens * _BYTES_PER_TOKEN) + self.rows * _BYTES_PER_ROW


def count(
    source: task_pb2.DatasetSource,
    tokens: Tokens,
    cache_dir: Path,
    reporter: Reporter,
    check: Check,
    *,
    rows: int = SAMPLE_ROWS,
    seconds: float = SAMPLE_SECONDS,
) -> Counted:
    """Counts the tokens of a dataset: of all rows when they are in the cache, else of at most so many, in about so many
    seconds. Raises what `check` raises, and TrainingError for what no row can be blamed for."""
    key = tokenised.cache_key(source, tokens.tokenizer, tokens.template, tokens.options)
    directory = cache.entry(cache_dir, key)
    if (directory / cache.COUNTS).is_file():
        found = tokenised.load(
            source,
            tokens.tokenizer,
            tokens.template,
            tokens.options,
            cache_dir=cache_dir,
            reporter=reporter,
            check=check,
        )
        return _of_cache(found, directory / tokenised.ROWS)
    return _of_sample(source, tokens, check, rows, seconds)


def _of_cache(rows: tokenised.TokenisedRows, path: Path) -> Counted:
    tokens, pairs = [np.zeros(0, np.int64)], [np.zeros(0, np.float64)]
    for batch in pa.ipc.open_stream(pa.memory_map(os.fspath(path))).read_all().to_batches():
        column = batch.column("pieces")
        pieces = column.values.to_numpy().astype(np.int64)
        owners = np.repeat(np.arange(len(column)), np.diff(column.offsets.to_numpy()))
        tokens.append(np.bincount(owners, pieces, minlength=len(column)).astype(np.int64))
        pairs.append(np.bincount(owners, pieces * (pieces + 1) / 2, minlength=len(column)).astype(np.float64))
    longest = int(rows.lengths.max(initial=0))
    return Counted(len(rows), np.concatenate(tokens), rows.scored, np.concatenate(pairs), longest, is_cached=True)


def _of_sample(source: task_pb2.DatasetSource, tokens: Tokens, check: Check, most: int, seconds: float) -> Counted:
    begun = time.monotonic()
    counts: list[tuple[int, int, float]] = []
    longest = 0
    with _spread(source, most) as (path, is_spread), records(path, Reading.from_proto(source.reading)) as found:
        rows = (record for _, record, _ in found if _is_row(record))
        while batch := list(islice(rows, min(_AT_ONCE, most - len(counts)))):
            check()
            for examples in _examples(batch, tokens):
                lengths = [len(each) for each in examples]
                scored = sum(int(each[1:].sum()) for each in examples)
                counts.append((sum(lengths), scored, sum(each * (each + 1) / 2 for each in lengths)))
                longest = max([longest, *lengths])
            if time.monotonic() - begun > seconds:
                break
    columns = np.array(counts, np.float64).reshape(-1, 3)
    return Counted(
        max(source.rows, len(counts)),
        columns[:, 0].astype(np.int64),
        columns[:, 1].astype(np.int64),
        columns[:, 2],
        longest,
        is_spread=is_spread,
    )


def _is_row(record: Record | Problem) -> bool:
    """Whether it counts as a row: a row in error does, a remark about the file does not."""
    return not isinstance(record, Problem) or record.level is Level.ERROR


def _examples(batch: Sequence[Record | Problem], tokens: Tokens) -> Iterator[list[npt.NDArray[np.bool_]]]:
    """For each row the masks of its examples, as `conversion` cuts them; none for a row in error."""
    rows: list[list[tuple[Passage, Rendered]]] = []
    for record in batch:
        parts: list[tuple[Passage, Rendered]] = []
        if not isinstance(record, Problem):
            try:
                parts = [(each, render(each, tokens.template, tokens.options.masking)) for each in passages(record)]
            except RowRefused:
                parts = []
        rows.append(parts)
    made = iter(tokenise([text for parts in rows for _, text in parts], tokens.tokenizer))
    for parts in rows:
        yield [mask for passage, _ in parts for mask in _cut(next(made), passage, tokens)]


def _cut(example: Example, passage: Passage, tokens: Tokens) -> Iterator[npt.NDArray[np.bool_]]:
    for start, end in cut(len(example.input_ids), tokens.options.overlong, tokens.options.max_length):
        mask = example.trained[start:end]
        if passage.to_answer or mask[1:].any():
            yield mask


@contextmanager
def _spread(source: task_pb2.DatasetSource, most: int) -> Iterator[tuple[Path, bool]]:
    """A file with rows from all over the dataset's, and whether it is that; the file itself where rows cannot be read
    from the middle, or where all are wanted."""
    path = Path(source.path)
    if source.rows <= most:
        yield path, True
        return
    with open(path, "rb") as file:
        if Reading.from_proto(source.reading).file_format is not FileFormat.JSONL or file.read(1) != b"{":
            yield path, False
            return
        size = os.fstat(file.fileno()).st_size
        windows = [_lines(file.fileno(), size * place // _PLACES, -(-most // _PLACES)) for place in range(_PLACES)]
    # Row by row from each place, so that a sample that is cut short is spread too.
    deepest = max(len(each) for each in windows)
    lines = [each[row] for row in range(deepest) for each in windows if row < len(each)][:most]
    if not lines:  # lines longer than what was read
        yield path, False
        return
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as sample:
        sample.write(b"".join(lines))
        sample.flush()
        yield Path(sample.name), True


def _lines(fd: int, start: int, most: int) -> list[bytes]:
    """The first whole lines from a place of the file on."""
    lines = os.pread(fd, _WINDOW, max(start - 1, 0)).splitlines(keepends=True)
    whole = lines if start == 0 else lines[1:]  # the first one may be the end of a line
    return [line for line in whole if line.endswith(b"\n") and line.strip()][:most]
