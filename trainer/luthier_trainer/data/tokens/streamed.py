"""Rows that are tokenised as they are wanted, while another process tokenises all of them.

A job of a hundred thousand rows need not wait for the last one to make its first step. When the rows are not in the
cache, and somebody is about to put them there (the check of the job, see `luthier_trainer.work`), training begins on
rows that this process tokenises itself, by the same code: the same tokens to the last bit, in the same order. Once all
of them are there, they are judged as those of any job, and take the place of these.

So a row in error ends the job with the message that it would have had before, only later: as soon as training comes to
such a row, or when all rows are there, and in any case before the job succeeds (`complete`).
"""

import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from luthier.trainer.v1 import task_pb2
from luthier.v1 import dataset_report_pb2, tokenization_pb2
from luthier_trainer.data.files.numbered import NumberedRows, numbered_rows
from luthier_trainer.data.formats import Records, records
from luthier_trainer.data.masks.render import template_sha256
from luthier_trainer.data.masks.sandbox import end_process_when_stuck
from luthier_trainer.data.masks.template import Template
from luthier_trainer.data.problem import Problem
from luthier_trainer.data.reading import Format, Reading
from luthier_trainer.data.records import Record
from luthier_trainer.data.tokens import cache, tokenised
from luthier_trainer.data.tokens.conversion import convert_some, progress
from luthier_trainer.data.tokens.options import Options
from luthier_trainer.data.tokens.stored import StoredExample, chunk_of, lengths_and_scored
from luthier_trainer.data.tokens.tokenised import TRAINABLE, Sizes, TokenisedRows
from luthier_trainer.errors import TrainingError
from luthier_trainer.report import Reporter
from luthier_trainer.stop import Check, never

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOOK_SECONDS = 0.5
_POLL_SECONDS = 0.05
_LOST_SECONDS = 10.0
"""A builder that is gone so long does not come again: a server that checks anew does so 2 seconds after the check
died."""
_FEW = 1024
"""So many rows, a batch, are tokenised in one go; of more it is only asked whether any of them is trained."""
_TOGETHER = 16
_SEARCHED = 256

Accept = Callable[[TokenisedRows], None]
"""Judges the rows of a dataset once all of them are there. Raises TrainingError for what cannot be trained."""


@dataclass(frozen=True)
class Wanted:
    """The rows that are wanted, and how: as the arguments of `tokenised.load`, which may wait for nobody."""

    source: task_pb2.DatasetSource
    tokenizer: "PreTrainedTokenizerBase"
    template: Template
    options: Options
    cache_dir: Path
    cache_max_bytes: int
    reporter: Reporter
    check: Check = never

    def directory(self) -> Path:
        """Where in the cache they lie, or will."""
        return tokenised.entry_of(self.source, self.tokenizer, self.template, self.options, self.cache_dir)

    def load(self, directory: Path) -> TokenisedRows:
        """All of them, from the cache or made here. Raises as `tokenised.load`."""
        return tokenised.load(
            self.source,
            self.tokenizer,
            self.template,
            self.options,
            cache_dir=self.cache_dir,
            cache_max_bytes=self.cache_max_bytes,
            reporter=self.reporter,
            check=self.check,
            directory=directory,
        )


@dataclass(frozen=True, slots=True)
class _Made:
    """A row that was tokenised here. scored: its targets of the loss."""

    examples: tuple[StoredExample, ...]
    scored: int


_ENDLESS = np.int64(1 << 40)
"""Tokens: more than any micro-batch takes."""


class StreamedRows:
    """The rows of a dataset as `TokenisedRows` has them, each tokenised when it is asked for until all are there.

    watched: where all of them will be, and entries of the cache that the same process makes before."""

    def __init__(
        self, wanted: Wanted, watched: Sequence[Path], rows: NumberedRows, read: Records, accept: Accept
    ) -> None:
        only_texts = read.reading.format is Format.TEXT
        self._wanted = wanted
        self._directory = watched[0]
        self._watched = tuple(watched)
        self._rows = rows
        self._records = read
        self._close = weakref.finalize(self, _closed, rows, read)
        self._accept = accept
        self._count = len(rows)
        self._whole: TokenisedRows | None = None
        self._made: dict[int, _Made] = {}
        self._in_error = False
        self._looked = self._built = time.monotonic()
        self._sha256 = template_sha256(wanted.tokenizer, wanted.template)
        self._report = dataset_report_pb2.TokenReport(
            max_length=wanted.options.max_length,
            tokenization=wanted.options.tokenization(only_texts),
            template_sha256="" if only_texts else self._sha256,
        )

    def __len__(self) -> int:
        return self._count

    @property
    def is_whole(self) -> bool:
        """Whether every row is tokenised."""
        return self._whole is not None

    @property
    def sizes(self) -> Sizes:
        """As `TokenisedRows` has them; until all rows are there the most that they can be. What is split has no end."""
        if self._whole is not None:
            return self._whole.sizes
        longest = np.full(self._count, self._wanted.options.max_length, np.int64)
        splits = self._report.tokenization.overlong == tokenization_pb2.OVERLONG_SPLIT
        tokens = np.full(self._count, _ENDLESS) if splits else longest
        return longest, tokens, tokens

    @property
    def report(self) -> dataset_report_pb2.TokenReport:
        """What is known: until all rows are there, how they are tokenised and nothing of what they are."""
        return self._report if self._whole is None else self._whole.report

    @property
    def template_sha256(self) -> str:
        """Of the chat template's source, empty when all rows are texts."""
        return self.report.template_sha256

    @property
    def truncated(self) -> int:
        """How many rows were cut at their end, as far as that is known."""
        return 0 if self._whole is None else self._whole.truncated

    def examples(self, index: int) -> list[StoredExample]:
        """What row `index`, from 0, is trained on, as arrays of its own; none for a row in error. Waits for nothing, so
        that a checkpoint can be saved at any time. Raises IndexError, and TrainingError for what no row can be blamed
        for."""
        if self._whole is not None:
            return self._whole.examples(index)
        if not 0 <= index < self._count:
            raise IndexError(f"row {index} of {self._count}")
        if index not in self._made:
            if len(self._made) >= _FEW:
                self._made.clear()
            self._make([index])
        return [StoredExample(each.input_ids.copy(), each.trained.copy()) for each in self._made[index].examples]

    def scores(self, indices: npt.NDArray[np.int64]) -> bool:
        """Whether any token of these rows, which are wanted next, is a target of the loss. Takes over the rows of the
        cache when they are there, and waits for them when there is no other way to know. Raises as `complete`."""
        self._look()
        self._made.clear()
        few = len(indices) <= _FEW
        for start in range(0, min(len(indices), _SEARCHED), _FEW if few else _TOGETHER):
            if self._whole is not None:
                break
            some = indices[start : start + (_FEW if few else _TOGETHER)].tolist()
            self._make(some)
            if self._in_error:
                self.complete()
            elif any(self._made[index].scored for index in some):
                return True
        if self._whole is None and few:
            return False
        self.complete()
        assert self._whole is not None
        return self._whole.scores(indices)

    def complete(self) -> None:
        """Waits until all rows are there. Raises TrainingError when they cannot be trained, and what `check` raises."""
        told = False
        while self._whole is None:
            self._wanted.check()
            self._look(at_once=True)
            if self._whole is None:
                if not told:
                    told = True
                    progress(self._wanted.reporter, 0, self._count)
                time.sleep(_POLL_SECONDS)

    def _look(self, *, at_once: bool = False) -> None:
        """Takes over the rows of the cache when they are there. Tokenises all of them here when nobody else does."""
        now = time.monotonic()
        if self._whole is not None or (now - self._looked < _LOOK_SECONDS and not at_once):
            return
        self._looked = now
        found = tokenised.find(self._directory, self._sha256)
        if found is None and any(map(cache.is_being_built, self._watched)):
            self._built = now
        elif found is None and now - self._built > _LOST_SECONDS:
            found = self._wanted.load(self._directory)
        if found is None:
            return
        self._accept(found)
        if len(found) != self._count:
            raise TrainingError(
                "CACHE_DAMAGED",
                f"The tokenised dataset has {len(found):,} rows, and training began on {self._count:,}.",
                "Create the job anew.",
            )
        self._whole = found
        self._made.clear()
        self._close()

    def _make(self, indices: Sequence[int]) -> None:
        """Tokenises these rows, beside those that are kept."""
        wanted = self._wanted
        batches, tally = convert_some(map(self._record, indices), wanted.tokenizer, wanted.template, wanted.options)
        self._in_error |= bool(tally.findings.errors or tally.images or tally.kinds.keys() - TRAINABLE)
        chunks = tuple(chunk_of(batch) for batch in batches)
        _, scored = lengths_and_scored(chunks)
        examples = [tuple(chunk.examples(row)) for chunk in chunks for row in range(len(chunk.offsets) - 1)]
        made = (_Made(each, count) for each, count in zip(examples, scored.tolist(), strict=True))
        self._made.update(zip(indices, made, strict=True))

    def _record(self, index: int) -> tuple[int, Record | Problem]:
        row = self._rows.row(index)
        return row.line, row.value if isinstance(row.value, Problem) else self._records.record(row.value)


def _closed(rows: NumberedRows, read: Records) -> None:
    rows.close()
    read.close()


Rows = TokenisedRows | StreamedRows


class Streams:
    """The datasets of one job, of which the same process makes one entry of the cache after the other."""

    def __init__(self) -> None:
        self._directories: list[Path] = []

    def load(self, wanted: Wanted, accept: Accept) -> Rows:
        """The tokenised rows of a dataset, accepted; or rows that are tokenised as they are wanted, when another
        process is about to put all of them into the cache. Raises as `tokenised.load`, and what `accept` raises."""
        directory = wanted.directory()
        if not (directory / cache.COUNTS).exists():
            watched = (directory, *self._directories)
            streamed = _streamed(wanted, watched, accept) if any(map(cache.is_being_built, watched)) else None
            if streamed is not None:
                self._directories.append(directory)
                return streamed
        found = wanted.load(directory)
        accept(found)
        return found


def _streamed(wanted: Wanted, watched: Sequence[Path], accept: Accept) -> StreamedRows | None:
    """None for a file whose rows cannot be read one by one, or whose format was not told when it came."""
    path, reading = Path(wanted.source.path), Reading.from_proto(wanted.source.reading)
    if reading.format is None or reading.file_format is None or not wanted.source.rows:
        return None
    rows = numbered_rows(path, reading, wanted.check)
    if rows is None:
        return None
    if len(rows) != wanted.source.rows:
        rows.close()
        return None
    if threading.current_thread() is threading.main_thread():
        with contextlib.suppress(OSError):
            end_process_when_stuck()
    return StreamedRows(wanted, watched, rows, records(path, reading), accept)
