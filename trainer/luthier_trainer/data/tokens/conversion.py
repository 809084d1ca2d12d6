"""From the records of a file to the rows of the cache, with everything that is found on the way.

rows.arrow    one record a row that stands in the file, in its order:
              line         its place, as in findings
              tokens       of its longest sequence, before anything is cut
              input_ids    the tokens of its examples, one after the other
              trained      a byte each: whether the loss counts the token
              pieces       the length of each example; none for a row that is in error, dropped, or trains nothing
              text_hash    64 bits of its rendered text, 0 for a row in error
              prompt_hash  64 bits of the text before the first trained token, 0 when there is none
"""

import hashlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic as _monotonic
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from luthier.trainer.v1 import task_pb2
from luthier.v1 import event_pb2
from luthier_trainer.data.formats import records
from luthier_trainer.data.masks.render import Example, encode, examples_of, problems
from luthier_trainer.data.masks.spans import Rendered, render
from luthier_trainer.data.masks.template import RowRefused, Template
from luthier_trainer.data.problem import Level, Problem
from luthier_trainer.data.reading import Reading
from luthier_trainer.data.records import Passage, Record, images, passages
from luthier_trainer.data.tokens.options import Options
from luthier_trainer.data.tokens.overlong import Overlong, cut
from luthier_trainer.data.tokens.report import Tally, too_long
from luthier_trainer.errors import TrainingError
from luthier_trainer.report import Reporter
from luthier_trainer.stop import Check

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCHEMA = pa.schema(
    {
        "line": pa.int64(),
        "tokens": pa.int32(),
        "input_ids": pa.list_(pa.int32()),
        # A byte each rather than Arrow's bits, so that a row is a view of the mapped file.
        "trained": pa.list_(pa.uint8()),
        "pieces": pa.list_(pa.int32()),
        "text_hash": pa.uint64(),
        "prompt_hash": pa.uint64(),
    }
)
_BATCH_ROWS = 256
_BATCH_CHARACTERS = 4 * 1024 * 1024
_REPORT_SECONDS = 0.5
ERROR_FOUND = "some rows are in error: the check goes on to find all of them"
"""Told as soon as it is known."""


@dataclass(slots=True)
class _Row:
    """A row on its way: its sequences, or none when it is in error."""

    line: int
    passages: Sequence[Passage] = ()
    rendered: Sequence[Rendered] = ()


@dataclass(slots=True)
class _Batch:
    rows: list[_Row] = field(default_factory=list)
    characters: int = 0

    def add(self, row: _Row) -> None:
        self.rows.append(row)
        self.characters += sum(len(each.text) for each in row.rendered)

    @property
    def full(self) -> bool:
        return len(self.rows) == _BATCH_ROWS or self.characters >= _BATCH_CHARACTERS


def convert(
    path: Path,
    source: task_pb2.DatasetSource,
    tokenizer: "PreTrainedTokenizerBase",
    template: Template,
    options: Options,
    reporter: Reporter,
    check: Check,
) -> Tally:
    """Writes the rows of a dataset to `path` and returns what was counted. Rows in error are findings, and keep their
    place. Reports PhaseProgressed at most twice a second, and once, as a line of the log, that there are errors. Raises
    what `check` raises, which is called for each row, and TrainingError for what no row can be blamed for."""
    tally = Tally()
    with open(path, "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
        for batch, encodings in _ahead(_batches(source, template, options, tally, reporter, check), tokenizer):
            for table in _tokenised(batch, encodings, tokenizer, template, options, tally):
                writer.write_batch(table)
    return tally


def convert_some(
    found: Iterable[tuple[int, Record | Problem]],
    tokenizer: "PreTrainedTokenizerBase",
    template: Template,
    options: Options,
) -> tuple[list[pa.RecordBatch], Tally]:
    """The rows of these (line, record) as `convert` writes them, and what was counted. Raises as `convert`."""
    tally = Tally()
    rows = [_row(line, record, template, options, tally) or _Row(line) for line, record in found]
    encodings: Future[list[Any]] = Future()
    try:
        encodings.set_result(encode([text for row in rows for text in row.rendered], tokenizer))
    except Exception as error:  # a tokenizer raises what it likes; `_tokenised` knows what it means
        encodings.set_exception(error)
    return list(_tokenised(_Batch(rows), encodings, tokenizer, template, options, tally)), tally


def progress(reporter: Reporter, completed: int, total: int) -> None:
    """Tells how many rows are tokenised; a total of 0 is unknown."""
    reporter.report(
        event_pb2.PhaseProgressed(phase=event_pb2.PHASE_TOKENIZING, completed=completed, total=total, unit="rows")
    )


def _batches(
    source: task_pb2.DatasetSource,
    template: Template,
    options: Options,
    tally: Tally,
    reporter: Reporter,
    check: Check,
) -> Iterator[_Batch]:
    batch = _Batch()
    told = _monotonic()
    told_error = False
    with records(Path(source.path), Reading.from_proto(source.reading)) as found:
        for line, record, _ in found:
            check()
            # By time and not by batch: rows of many turns may take a second each.
            if (now := _monotonic()) - told >= _REPORT_SECONDS:
                progress(reporter, tally.rows + len(batch.rows), source.rows)
                told = now
                if tally.findings.errors and not told_error:
                    told_error = True
                    reporter.report(event_pb2.LogEmitted(level=event_pb2.LOG_LEVEL_ERROR, message=ERROR_FOUND))
            row = _row(line, record, template, options, tally)
            if row is None:
                continue
            batch.add(row)
            if batch.full:
                yield batch
                batch = _Batch()
    if batch.rows:
        yield batch


def _ahead(
    batches: Iterator[_Batch], tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[tuple[_Batch, "Future[list[Any]]"]]:
    """Each batch with what the tokenizer makes of it, which it does while the next batch is rendered."""
    thread = ThreadPoolExecutor(1, "tokenizer")
    try:
        before: tuple[_Batch, Future[list[Any]]] | None = None
        for batch in batches:
            texts = [text for row in batch.rows for text in row.rendered]
            coming = batch, thread.submit(encode, texts, tokenizer)
            if before is not None:
                yield before
            before = coming
        if before is not None:
            yield before
    finally:
        # Who stops in the middle waits for nothing.
        thread.shutdown(wait=False, cancel_futures=True)


def _row(line: int, record: Record | Problem, template: Template, options: Options, tally: Tally) -> _Row | None:
    """The record on its way; None for what does not count as a row."""
    if not isinstance(record, Problem):
        return _rendered(line, record, template, options, tally)
    tally.findings.add(line, record)
    return _Row(line) if record.level is Level.ERROR and line else None


def _rendered(line: int, record: Record, template: Template, options: Options, tally: Tally) -> _Row:
    tally.kinds[type(record).__name__.lower()] += 1
    parts = passages(record)
    tally.images += sum(len(images(each.messages)) for each in parts if each.messages is not None)
    try:
        rendered = [render(each, template, options.masking) for each in parts]
    except RowRefused as refusal:
        tally.findings.add(line, refusal.problem)
        return _Row(line)
    except TrainingError as error:
        raise TrainingError(error.reason, f"Line {line}: {error.message}", error.hint) from error
    tally.methods.update(each.method for each in rendered if each.method)
    return _Row(line, parts, rendered)


def _tokenised(
    batch: _Batch,
    encodings: "Future[list[Any]]",
    tokenizer: "PreTrainedTokenizerBase",
    template: Template,
    options: Options,
    tally: Tally,
) -> Iterator[pa.RecordBatch]:
    """The batch as it is written. A text that the tokenizer cannot take is a finding of its row."""
    try:
        found = iter(examples_of([text for row in batch.rows for text in row.rendered], encodings.result()))
    except MemoryError:
        raise
    except Exception as error:  # a tokenizer raises what it likes
        if len(batch.rows) > 1:
            for alone, its in _ahead((_Batch([row]) for row in batch.rows), tokenizer):
                yield from _tokenised(alone, its, tokenizer, template, options, tally)
            return
        line = " ".join(str(error).split())[:300] or type(error).__name__
        tally.findings.add(batch.rows[0].line, Problem("NOT_TOKENISED", f"The tokenizer refuses the row: {line}"))
        batch.rows[0].passages = batch.rows[0].rendered = ()
        found = iter(())
    yield _packed(batch.rows, [[next(found) for _ in row.rendered] for row in batch.rows], template, options, tally)


def _packed(
    rows: Sequence[_Row],
    sequences: Sequence[Sequence[Example]],
    template: Template,
    options: Options,
    tally: Tally,
) -> pa.RecordBatch:
    """Cuts the sequences of each row to examples, and counts.

    All tokens of the batch lie one after the other in one array; what is cut is a range of it, so that the work for a
    token is numpy's."""
    flat = [example for examples in sequences for example in examples]
    lengths = np.array([len(example.input_ids) for example in flat], np.int64)
    bases = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    ids = np.concatenate([np.zeros(0, np.int32), *(example.input_ids for example in flat)])
    trained = np.concatenate([np.zeros(0, np.bool_), *(example.trained for example in flat)])
    trained_before = np.concatenate([np.zeros(1, np.int64), np.cumsum(trained, dtype=np.int64)])

    starts, ends, owners, wanted = _ranges(rows, sequences, bases, options)
    scored = trained_before[ends] - trained_before[np.minimum(starts + 1, ends)]
    kept = (scored > 0) | wanted
    longest = np.zeros(len(rows), np.int64)
    per_row = np.repeat(np.arange(len(rows)), [len(each) for each in sequences])
    np.maximum.at(longest, per_row, lengths)
    pieces = np.bincount(owners[kept], minlength=len(rows))
    sizes = np.bincount(owners[kept], (ends - starts)[kept], minlength=len(rows)).astype(np.int64)
    totals = np.bincount(per_row, lengths, minlength=len(rows)).astype(np.int64)

    tally.add_lengths(longest)
    tally.tokens += int(sizes.sum())
    tally.lost_tokens += int((totals - sizes).sum())
    tally.trained_tokens += int(scored[kept].sum())
    tally.examples += int(kept.sum())
    mask = _mask(starts[kept], ends[kept], len(ids))
    _count_roles(rows, flat, mask, tally)
    _find(rows, sequences, longest, pieces, totals - sizes, template, options, tally)
    return pa.record_batch(
        [
            pa.array([row.line for row in rows], pa.int64()),
            pa.array(longest, pa.int32()),
            _lists(sizes, pa.array(ids[mask], pa.int32())),
            _lists(sizes, pa.array(trained[mask].view(np.uint8), pa.uint8())),
            _lists(pieces, pa.array((ends - starts)[kept], pa.int32())),
            pa.array([_hash("\0".join(text.text for text in row.rendered)) for row in rows], pa.uint64()),
            pa.array([_prompt_hash(row.rendered) for row in rows], pa.uint64()),
        ],
        schema=SCHEMA,
    )


_Integers = npt.NDArray[np.int64]


def _ranges(
    rows: Sequence[_Row], sequences: Sequence[Sequence[Example]], bases: _Integers, options: Options
) -> tuple[_Integers, _Integers, _Integers, npt.NDArray[np.bool_]]:
    """(starts, ends) of what remains of each sequence in the batch's tokens, the number of the row it is of, and
    whether it is wanted though it trains nothing, as a prompt to answer is."""
    found: list[tuple[int, int, int, bool]] = []
    number = 0
    for owner, (row, examples) in enumerate(zip(rows, sequences, strict=True)):
        for passage, example in zip(row.passages, examples, strict=True):
            base = int(bases[number])
            number += 1
            for start, end in cut(len(example.input_ids), options.overlong, options.max_length):
                found.append((base + start, base + end, owner, passage.to_answer))
    columns = np.array(found, np.int64).reshape(-1, 4)
    return columns[:, 0], columns[:, 1], columns[:, 2], columns[:, 3].astype(np.bool_)


def _mask(starts: _Integers, ends: _Integers, size: int) -> npt.NDArray[np.bool_]:
    """True within the ranges, which do not overlap."""
    edges = np.zeros(size + 1, np.int8)
    np.add.at(edges, starts, 1)
    np.add.at(edges, ends, -1)
    return np.cumsum(edges[:-1], dtype=np.int8).astype(np.bool_)


def _count_roles(rows: Sequence[_Row], flat: Sequence[Example], mask: npt.NDArray[np.bool_], tally: Tally) -> None:
    """Each kept token counts for the role that the text at its first character is of."""
    numbers = np.zeros(len(mask), np.int64)
    texts = (text for row in rows for text in row.rendered)
    base = 0
    for text, example in zip(texts, flat, strict=True):
        tokens = range(len(example.input_ids))
        # As `render` finds trained tokens: places are searched one by one, as a list of all takes much longer to make.
        place = example._encoding.token_to_chars
        for start, end, role in text.roles:
            first = bisect_left(tokens, start, key=lambda token: place(token)[0])
            after = bisect_left(tokens, end, first, key=lambda token: place(token)[0])
            numbers[base + first : base + after] = tally.number_of(role)
        base += len(tokens)
    tally.add_roles(numbers[mask])


def _find(
    rows: Sequence[_Row],
    sequences: Sequence[Sequence[Example]],
    longest: _Integers,
    pieces: _Integers,
    lost: _Integers,
    template: Template,
    options: Options,
    tally: Tally,
) -> None:
    """The findings of the rows' tokens, each once a row: counts are of lines, and a row may be two sequences."""
    for number, (row, examples) in enumerate(zip(rows, sequences, strict=True)):
        found: dict[str, Problem] = {}
        for text, example in zip(row.rendered, examples, strict=True):
            for problem in problems(text, example, template):
                found.setdefault(problem.code, problem)
        for problem in found.values():
            tally.findings.add(row.line, problem)
        tokens = int(longest[number])
        if tokens <= options.max_length:
            continue
        tally.overlong_rows += 1
        tally.findings.add(
            row.line,
            too_long(tokens, options.max_length, options.overlong, int(pieces[number]), int(lost[number])),
        )
        trains = any(example.trained[1:].any() for example in examples)
        if trains and not pieces[number] and options.overlong in (Overlong.TRUNCATE, Overlong.SPLIT):
            message = f"No trained token lies within the first {options.max_length:,} tokens (max_length)."
            fix = "Raise max_length, or shorten the prompt."
            tally.findings.add(row.line, Problem("NOTHING_TRAINED", message, fix, Level.WARNING))


def _lists(sizes: _Integers, values: pa.Array) -> pa.ListArray:
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)


def _hash(text: str) -> int:
    """64 bits, 0 for an empty text alone."""
    if not text:
        return 0
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


def _prompt_hash(rendered: Sequence[Rendered]) -> int:
    first = rendered[0] if rendered else None
    if first is None:
        return 0
    return _hash(first.text[: first.spans[0][0]] if first.spans else first.text)
