"""Tokenised rows of a dataset: memory-mapped Arrow, made once for each (dataset, tokenizer, template, options).

    CACHE_DIR/tokenised/KEY/rows.arrow    the rows, as `conversion` writes them
    CACHE_DIR/tokenised/KEY/counts.json   what decides whether they can be trained
    CACHE_DIR/tokenised/KEY/report.binpb  the TokenReport, but for what only the caller knows: names, ids

A dataset with errors is cached too, so that a second check of it is as quick; `require_trainable` keeps a job from it.
"""

import hashlib
import importlib.metadata
import os
import weakref
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import tokenizers
import transformers
from google.protobuf.message import DecodeError

from luthier.trainer.v1 import task_pb2
from luthier.v1 import dataset_report_pb2, event_pb2, tokenization_pb2
from luthier_trainer import durable
from luthier_trainer.data.masks.render import template_sha256
from luthier_trainer.data.masks.template import Template
from luthier_trainer.data.tokens import cache
from luthier_trainer.data.tokens import report as tokens_report
from luthier_trainer.data.tokens.conversion import convert, progress
from luthier_trainer.data.tokens.options import Options
from luthier_trainer.data.tokens.stored import Chunk, StoredExample, chunk_of, lengths_and_scored
from luthier_trainer.errors import TrainingError
from luthier_trainer.report import Reporter
from luthier_trainer.stop import Check, never

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 3
"""Part of the key: count it up when the same inputs come to mean other tokens, other findings or another layout."""

ROWS = "rows.arrow"
REPORT = "report.binpb"
TRAINABLE = frozenset({"chat", "text"})
"""Kinds of records that supervised fine-tuning learns from."""


@dataclass(frozen=True, slots=True)
class Counts:
    """rows: that stand in the file; kinds: how many of them are of each kind of record; images: in all of them."""

    rows: int
    kinds: dict[str, int]
    images: int


Sizes = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]


@dataclass(frozen=True, eq=False)
class TokenisedRows:
    """The rows of a dataset in the order of its file, memory-mapped. A row is a slot of a batch and has any number of
    examples: none when it is dropped or trains nothing, several when it is split.

    lengths: int64 [rows], tokens of each row's longest example, 0 for none; scored: int64 [rows], tokens of all its
    examples that are targets of the loss; lines: int64 [rows], places in the file; text_hashes and prompt_hashes:
    uint64 [rows], see `conversion`; template_sha256: of the chat template's source, empty when all rows are texts.
    """

    lengths: npt.NDArray[np.int64]
    scored: npt.NDArray[np.int64]
    lines: npt.NDArray[np.int64]
    text_hashes: npt.NDArray[np.uint64]
    prompt_hashes: npt.NDArray[np.uint64]
    template_sha256: str
    counts: Counts
    report: dataset_report_pb2.TokenReport
    _chunks: tuple[Chunk, ...]
    _starts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def truncated(self) -> int:
        """How many rows were cut at their end."""
        truncates = self.report.tokenization.overlong == tokenization_pb2.OVERLONG_TRUNCATE
        return self.report.statistics.overlong_rows if truncates else 0

    def examples(self, index: int) -> list[StoredExample]:
        """What row `index`, from 0, is trained on, as arrays of its own. Raises IndexError."""
        if not 0 <= index < len(self.lengths):
            raise IndexError(f"row {index} of {len(self.lengths)}")
        number = bisect_right(self._starts, index) - 1
        return self._chunks[number].examples(index - self._starts[number])

    @property
    def sizes(self) -> Sizes:
        """(tokens of each row's longest example, of all its examples, its targets): int64 [rows] each."""
        tokens = [np.diff(chunk.offsets).astype(np.int64) for chunk in self._chunks]
        return self.lengths, np.concatenate([np.zeros(0, np.int64), *tokens]), self.scored

    def scores(self, indices: npt.NDArray[np.int64]) -> bool:
        """Whether any token of these rows is a target of the loss."""
        return bool(self.scored[indices].any())

    @property
    def is_whole(self) -> bool:
        """Whether every row is tokenised: always, unlike `StreamedRows`."""
        return True

    def complete(self) -> None:
        """Waits for nothing, unlike `StreamedRows`."""


def load(
    source: task_pb2.DatasetSource,
    tokenizer: "PreTrainedTokenizerBase",
    template: Template,
    options: Options,
    *,
    cache_dir: Path,
    reporter: Reporter,
    cache_max_bytes: int = 0,
    check: Check = never,
    directory: Path | None = None,
) -> TokenisedRows:
    """The tokenised rows of a dataset; from the cache, or made and put there. What is wrong with rows is in their
    report: a job asks `require_trainable`.

    After rows were made, entries of the cache that nobody uses are deleted until it has at most `cache_max_bytes`, 0
    for no limit; what is returned here counts as used. Reports PhaseProgressed at most twice a second and at the end.
    `check` is called for each row and ends the work with what it raises. directory: what `entry_of` says, for those
    who have asked it.
    Raises TrainingError: STORAGE_FULL, and as `render` what no row can be blamed for. Raises OSError when the file
    cannot be read.
    """
    sha256 = template_sha256(tokenizer, template)
    directory = directory or entry_of(source, tokenizer, template, options, cache_dir)
    opened = find(directory, sha256)
    for _ in range(2):  # another process that wants room may delete it before it is opened
        if opened is not None:
            break

        def write(aside: Path) -> None:
            _write(aside, source, tokenizer, template, options, reporter, check)

        try:
            cache.build(directory, write, lambda built: find(built, sha256) is not None)
        except Exception as error:
            if not durable.is_full(error):
                raise
            raise durable.storage_full("the tokenised dataset") from error
        opened = find(directory, sha256)
        cache.shrink(cache_dir, cache_max_bytes)
    if opened is None:
        raise TrainingError("CACHE_DAMAGED", f"The tokenised dataset {directory.name} cannot be read back.")
    progress(reporter, len(opened), source.rows or len(opened))
    return opened


def entry_of(
    source: task_pb2.DatasetSource,
    tokenizer: "PreTrainedTokenizerBase",
    template: Template,
    options: Options,
    cache_dir: Path,
) -> Path:
    """Where in the cache the rows lie, or will."""
    return cache.entry(cache_dir, cache_key(source, tokenizer, template, options))


def find(directory: Path, sha256: str) -> TokenisedRows | None:
    """What lies in an entry of the cache; None when there is nothing, or nothing that can be used. It counts as used as
    long as the rows live."""
    try:
        lock = cache.use(directory)
    except FileNotFoundError:
        return None
    opened = _read(directory, sha256)
    if opened is None:
        os.close(lock)
    else:
        weakref.finalize(opened, os.close, lock)
    return opened


def require_trainable(rows: TokenisedRows, reporter: Reporter) -> None:
    """Reports as warnings what of the rows is not trained as it is. Raises TrainingError when supervised fine-tuning
    cannot use them: DATASET_INVALID with the first lines, DATASET_NOT_FOR_OBJECTIVE for other records than
    conversations and texts, IMAGES_NOT_SUPPORTED."""
    other = sorted(kind for kind, count in rows.counts.kinds.items() if count and kind not in TRAINABLE)
    if other:
        raise TrainingError(
            "DATASET_NOT_FOR_OBJECTIVE",
            f"The dataset has rows of another kind ({', '.join(other)}) than supervised fine-tuning learns from.",
            "Supervised fine-tuning takes conversations, prompts with completions, instructions and texts. Preference "
            "data and prompts alone need an objective that is not offered yet.",
        )
    if rows.counts.images:
        raise TrainingError(
            "IMAGES_NOT_SUPPORTED",
            f"The dataset refers to {rows.counts.images:,} images, and training on images is not offered yet.",
            "Leave the images out of the rows; no chat template changes this.",
        )
    if tokens_report.errors(rows.report):
        raise TrainingError("DATASET_INVALID", *tokens_report.first_errors(rows.report))
    for message in tokens_report.warnings(rows.report):
        reporter.report(event_pb2.LogEmitted(level=event_pb2.LOG_LEVEL_WARNING, message=message))


def drop_unused(cache_dir: Path) -> tuple[int, int]:
    """Deletes the tokenised datasets that no process uses now. Returns (how many, bytes)."""
    return cache.drop_unused(cache_dir)


def cache_key(
    source: task_pb2.DatasetSource, tokenizer: "PreTrainedTokenizerBase", template: Template, options: Options
) -> str:
    """SHA-256 of all that the tokens and the report depend on, hexadecimal."""
    reading = source.reading
    parts = [
        FORMAT_VERSION,
        importlib.metadata.version("luthier-trainer"),
        transformers.__version__,
        jinja2.__version__,
        tokenizers.__version__,
        source.sha256 or _sha256_of_file(Path(source.path)),
        [reading.file_format, reading.format, dict(reading.columns)],
        tokenizer_fingerprint(tokenizer),
        template_sha256(tokenizer, template),
        template.variables,
        [template.frame.start, template.frame.end, template.ends, template.start_id, template.unknown_id],
        dict(template.needs),
        options,
    ]
    return hashlib.sha256(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)).hexdigest()


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """SHA-256 of the tokenizer's definition, hexadecimal. Truncation and padding are left out: calls change them."""
    definition = orjson.loads(tokenizer.backend_tokenizer.to_str())
    definition.pop("truncation", None)
    definition.pop("padding", None)
    return hashlib.sha256(orjson.dumps(definition, option=orjson.OPT_SORT_KEYS)).hexdigest()


def _sha256_of_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(
    aside: Path,
    source: task_pb2.DatasetSource,
    tokenizer: "PreTrainedTokenizerBase",
    template: Template,
    options: Options,
    reporter: Reporter,
    check: Check,
) -> None:
    tally = convert(aside / ROWS, source, tokenizer, template, options, reporter, check)
    report = tally.report()
    report.max_length = options.max_length
    only_texts = bool(tally.kinds) and tally.kinds.keys() <= {"text"}
    report.tokenization.CopyFrom(options.tokenization(only_texts))
    (aside / REPORT).write_bytes(report.SerializeToString(deterministic=True))
    counts = {"rows": tally.rows, "kinds": dict(tally.kinds), "images": tally.images}
    (aside / cache.COUNTS).write_bytes(orjson.dumps(counts))


def _read(directory: Path, sha256: str) -> TokenisedRows | None:
    try:
        content = orjson.loads((directory / cache.COUNTS).read_bytes())
        counts = Counts(content["rows"], content["kinds"], content["images"])
        report = dataset_report_pb2.TokenReport.FromString((directory / REPORT).read_bytes())
        table = pa.ipc.open_stream(pa.memory_map(os.fspath(directory / ROWS))).read_all()
    except (OSError, ValueError, KeyError, TypeError, DecodeError, pa.ArrowException):
        return None
    if table.num_rows != counts.rows:
        return None
    chunks = tuple(chunk_of(batch) for batch in table.to_batches())
    lengths, scored = lengths_and_scored(chunks)
    starts = np.cumsum([0, *(len(chunk.offsets) - 1 for chunk in chunks)])[:-1]
    only_texts = bool(counts.kinds) and counts.kinds.keys() <= {"text"}
    report.template_sha256 = "" if only_texts else sha256
    return TokenisedRows(
        lengths,
        scored,
        table.column("line").to_numpy(),
        table.column("text_hash").to_numpy(),
        table.column("prompt_hash").to_numpy(),
        report.template_sha256,
        counts,
        report,
        chunks,
        tuple(starts.tolist()),
    )
