"""Tokenised rows of a dataset: memory-mapped Arrow, made once for each (dataset, tokenizer, template, max_length).

    CACHE_DIR/tokenised/KEY/rows.arrow   one record a row: input_ids, trained, truncated
    CACHE_DIR/tokenised/KEY/counts.json  what was counted on the way

The directory is built aside and renamed when it is complete and on disk, so a reader sees all of it or nothing; of two
trainers that build the same one, the first to finish wins and the other takes its work. Whoever uses one holds a
shared lock on its counts.json, so that `drop_unused` can tell what nobody needs.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
import weakref
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import tokenizers
import transformers
from datasets.arrow_writer import ArrowWriter

from luthier.trainer.v1 import task_pb2
from luthier.v1 import event_pb2
from luthier_trainer import durable
from luthier_trainer.data.formats import Conversation, Problem, conversations
from luthier_trainer.data.render import Example, tokenise
from luthier_trainer.data.spans import Rendered, render
from luthier_trainer.data.template import Template, template_of
from luthier_trainer.errors import TrainingError
from luthier_trainer.report import Reporter
from luthier_trainer.stop import Check, never

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Part of the key: count it up when the same inputs come to mean other tokens or another layout.
FORMAT_VERSION = 1

_BATCH_ROWS = 256
_BATCH_CHARACTERS = 4 * 1024 * 1024
_LINES_NAMED = 10
_REPORT_SECONDS = 0.5
_STALE_SECONDS = 24 * 3600
_FEATURES = {
    "input_ids": datasets.List(datasets.Value("int32")),
    # A byte each rather than Arrow's bits, so that a row is a view of the mapped file.
    "trained": datasets.List(datasets.Value("uint8")),
    "truncated": datasets.Value("bool"),
}


@dataclass(frozen=True, slots=True)
class _Chunk:
    """The rows of one record batch, as views of the mapped file; row i has tokens offsets[i] to offsets[i + 1]."""

    offsets: npt.NDArray[np.int32]
    input_ids: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class TokenisedRows:
    """The rows of a dataset in the order of its file, memory-mapped.

    lengths: int64 [rows], tokens of each; scored: int64 [rows], tokens of each that are targets of the loss (the first
    token of a row never is); was_truncated: bool [rows]; truncated: how many rows were cut; template_sha256: of the
    chat template's source.
    """

    lengths: npt.NDArray[np.int64]
    scored: npt.NDArray[np.int64]
    was_truncated: npt.NDArray[np.bool_]
    truncated: int
    template_sha256: str
    _chunks: tuple[_Chunk, ...]
    _starts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.lengths)

    def example(self, index: int) -> Example:
        """Row `index`, from 0, as arrays of its own. Raises IndexError."""
        if not 0 <= index < len(self.lengths):
            raise IndexError(f"row {index} of {len(self.lengths)}")
        number = bisect_right(self._starts, index) - 1
        chunk = self._chunks[number]
        row = index - self._starts[number]
        start, end = chunk.offsets[row], chunk.offsets[row + 1]
        return Example(
            chunk.input_ids[start:end].copy(), chunk.trained[start:end].copy(), bool(self.was_truncated[index])
        )


@dataclass(frozen=True, slots=True)
class _Counts:
    rows: int
    untrained: int
    untrained_lines: tuple[int, ...]


def load(
    source: task_pb2.DatasetSource,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    cache_dir: Path,
    reporter: Reporter,
    check: Check = never,
) -> TokenisedRows:
    """The tokenised rows of a dataset, each cut at the end to max_length tokens; from the cache, or made and put there.

    Reports PhaseProgressed at most twice a second and at the end, and a warning when some rows train no token (they
    stay in place, so that row numbers are the file's). `check` is called between batches, at least every 256 rows, and
    ends the work with what it raises.
    Raises TrainingError: DATASET_INVALID with line numbers when rows are wrong or none trains a token, STORAGE_FULL,
    and as `template_of` and `render`. Raises OSError when the file cannot be read.
    """
    template = template_of(tokenizer)
    directory = cache_dir / "tokenised" / cache_key(source, tokenizer, template, max_length)
    opened = _open(directory, template)
    for _ in range(2):  # another trainer that wants room may delete it before it is opened
        if opened is not None:
            break
        try:
            _build(source, tokenizer, template, max_length, directory, reporter, check)
        except Exception as error:
            if not durable.is_full(error):
                raise
            raise durable.storage_full("the tokenised dataset") from error
        opened = _open(directory, template)
    if opened is None:
        raise TrainingError("CACHE_DAMAGED", f"The tokenised dataset {directory.name} cannot be read back.")
    rows, counts = opened
    _warn_of_untrained(counts, max_length, reporter)
    _progress(reporter, len(rows), source.rows or len(rows))
    return rows


def drop_unused(cache_dir: Path) -> tuple[int, int]:
    """Deletes the tokenised datasets that no trainer uses now. Returns (how many, bytes)."""
    count = freed = 0
    for counts in (cache_dir / "tokenised").glob("[!.]*/counts.json"):
        with contextlib.suppress(FileNotFoundError), open(counts, "rb") as file:  # another trainer was faster
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            if os.fstat(file.fileno()).st_nlink == 0:
                continue
            size = durable.size(counts.parent)
            _delete(counts.parent)
            count, freed = count + 1, freed + size
    return count, freed


def _delete(directory: Path) -> None:
    """Renamed first: a reader never meets a directory that is half gone. Raises FileNotFoundError."""
    doomed = directory.rename(directory.with_name(f".doomed-{directory.name[:16]}-{os.getpid()}"))
    shutil.rmtree(doomed, ignore_errors=True)


def cache_key(
    source: task_pb2.DatasetSource, tokenizer: "PreTrainedTokenizerBase", template: Template, max_length: int
) -> str:
    """SHA-256 of all that the tokens depend on, hexadecimal."""
    content = source.sha256 or _sha256_of_file(Path(source.path))
    parts = [
        FORMAT_VERSION,
        transformers.__version__,
        tokenizers.__version__,
        content,
        tokenizer_fingerprint(tokenizer),
        template.source,
        template.variables,
        max_length,
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


def _open(directory: Path, template: Template) -> tuple[TokenisedRows, _Counts] | None:
    """What lies in a directory of the cache; None when there is nothing, or nothing that can be used. It counts as used
    as long as the rows live."""
    try:
        lock = _lock(directory / "counts.json")
    except FileNotFoundError:
        return None
    opened = _read(directory, template)
    if opened is None:
        os.close(lock)
    else:
        weakref.finalize(opened[0], os.close, lock)
    return opened


def _lock(counts: Path) -> int:
    """A descriptor that holds a shared lock until it is closed. Raises FileNotFoundError, also for a file that was
    deleted while another held it."""
    lock = os.open(counts, os.O_RDONLY | os.O_CLOEXEC)
    fcntl.flock(lock, fcntl.LOCK_SH)
    if os.fstat(lock).st_nlink == 0:
        os.close(lock)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(counts))
    return lock


def _read(directory: Path, template: Template) -> tuple[TokenisedRows, _Counts] | None:
    try:
        content = orjson.loads((directory / "counts.json").read_bytes())
        counts = _Counts(content["rows"], content["untrained"], tuple(content["untrained_lines"]))
        table = datasets.Dataset.from_file(str(directory / "rows.arrow")).data
    except (OSError, ValueError, KeyError):
        return None
    if table.num_rows != counts.rows:
        return None
    ids, trained = table.column("input_ids").chunks, table.column("trained").chunks
    chunks = tuple(
        _Chunk(i.offsets.to_numpy(), i.values.to_numpy(), t.values.to_numpy().view(np.bool_))
        for i, t in zip(ids, trained, strict=True)
    )
    was_truncated = table.column("truncated").to_numpy().astype(np.bool_)
    lengths, scored = _lengths_and_scored(chunks)
    starts = np.cumsum([0, *(len(chunk.offsets) - 1 for chunk in chunks)])[:-1]
    sha256 = hashlib.sha256(template.source.encode()).hexdigest()
    rows = TokenisedRows(
        lengths, scored, was_truncated, int(was_truncated.sum()), sha256, chunks, tuple(starts.tolist())
    )
    return rows, counts


def _lengths_and_scored(chunks: tuple[_Chunk, ...]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Tokens of each row, and trained tokens of each row without its first: nothing predicts that one."""
    lengths = [np.zeros(0, np.int64)]
    scored = [np.zeros(0, np.int64)]
    for chunk in chunks:
        starts, ends = chunk.offsets[:-1].astype(np.int64), chunk.offsets[1:].astype(np.int64)
        trained = np.concatenate([np.zeros(1, np.int64), np.cumsum(chunk.trained, dtype=np.int64)])
        lengths.append(ends - starts)
        scored.append(trained[ends] - trained[np.minimum(starts + 1, ends)])
    return np.concatenate(lengths), np.concatenate(scored)


def _build(
    source: task_pb2.DatasetSource,
    tokenizer: "PreTrainedTokenizerBase",
    template: Template,
    max_length: int,
    directory: Path,
    reporter: Reporter,
    check: Check,
) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    _sweep(directory.parent)
    aside = Path(tempfile.mkdtemp(prefix=f".{directory.name[:16]}-", dir=directory.parent))
    try:
        counts = _write(aside / "rows.arrow", source, tokenizer, template, max_length, reporter, check)
        (aside / "counts.json").write_bytes(
            orjson.dumps(
                {"rows": counts.rows, "untrained": counts.untrained, "untrained_lines": counts.untrained_lines}
            )
        )
        for name in ("rows.arrow", "counts.json", "."):
            _sync(aside / name)
        _move(aside, directory, template)
        _sync(directory.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write(
    path: Path,
    source: task_pb2.DatasetSource,
    tokenizer: "PreTrainedTokenizerBase",
    template: Template,
    max_length: int,
    reporter: Reporter,
    check: Check,
) -> _Counts:
    rows = untrained = 0
    untrained_lines: list[int] = []
    reported = time.monotonic()
    with ArrowWriter(features=datasets.Features(_FEATURES), path=str(path)) as writer:
        for lines, rendered in _batches(Path(source.path), template):
            check()
            examples = tokenise(rendered, tokenizer, max_length=max_length)
            writer.write_table(_table(examples))
            rows += len(examples)
            for line, example in zip(lines, examples, strict=True):
                if not example.trained[1:].any():
                    untrained += 1
                    untrained_lines.append(line)
            del untrained_lines[_LINES_NAMED:]
            if (now := time.monotonic()) - reported >= _REPORT_SECONDS:
                _progress(reporter, rows, source.rows)
                reported = now
        writer.finalize()
    return _Counts(rows, untrained, tuple(untrained_lines))


def _table(examples: list[Example]) -> pa.Table:
    offsets = pa.array(np.cumsum([0, *(len(example.input_ids) for example in examples)]), pa.int32())
    ids = np.concatenate([example.input_ids for example in examples])
    trained = np.concatenate([example.trained for example in examples]).view(np.uint8)
    return pa.table(
        {
            "input_ids": pa.ListArray.from_arrays(offsets, pa.array(ids)),
            "trained": pa.ListArray.from_arrays(offsets, pa.array(trained)),
            "truncated": pa.array([example.truncated for example in examples], pa.bool_()),
        }
    )


def _batches(path: Path, template: Template) -> Iterator[tuple[list[int], list[Rendered]]]:
    """Batches of (line numbers, rendered rows). Raises DATASET_INVALID at the end, or once enough rows were wrong."""
    wrong: list[str] = []
    lines: list[int] = []
    batch: list[Rendered] = []
    characters = 0
    for line, _, row in conversations(path):
        rendered = _rendered(row, template)
        if isinstance(rendered, str):
            wrong.append(f"line {line}: {rendered}" if line else rendered)
            if len(wrong) == _LINES_NAMED:
                break
        elif not wrong:
            lines.append(line)
            batch.append(rendered)
            characters += len(rendered.text)
            if len(batch) == _BATCH_ROWS or characters >= _BATCH_CHARACTERS:
                yield lines, batch
                lines, batch, characters = [], [], 0
    if wrong:
        first = f"The first {len(wrong)} wrong rows" if len(wrong) == _LINES_NAMED else "Wrong rows"
        hint = "Correct these rows, or the role order that the model's chat template wants."
        raise TrainingError("DATASET_INVALID", f"{first}: {'; '.join(wrong)}", hint)
    if batch:
        yield lines, batch


def _rendered(row: Conversation | Problem, template: Template) -> Rendered | str:
    """The rendered row, or what is wrong with it; TEMPLATE_UNSUPPORTED is nothing that a row can be blamed for."""
    if isinstance(row, Problem):
        return row.message
    try:
        return render(row, template)
    except TrainingError as error:
        if error.reason != "DATASET_INVALID":
            raise
        return error.message


def _move(aside: Path, directory: Path, template: Template) -> None:
    """Renames a complete directory to its place, unless another trainer was faster; replaces a damaged one."""
    for _ in range(3):
        try:
            aside.rename(directory)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if _open(directory, template) is not None:
            return
        with contextlib.suppress(FileNotFoundError):  # another trainer moved it away
            _delete(directory)


def _sweep(parent: Path) -> None:
    """Removes what trainers that were killed left behind."""
    for left in parent.glob(".*"):
        try:
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
        except FileNotFoundError:
            continue


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _progress(reporter: Reporter, completed: int, total: int) -> None:
    reporter.report(
        event_pb2.PhaseProgressed(phase=event_pb2.PHASE_TOKENIZING, completed=completed, total=total, unit="rows")
    )


def _warn_of_untrained(counts: _Counts, max_length: int, reporter: Reporter) -> None:
    if not counts.untrained:
        return
    lines = ", ".join(str(line) for line in counts.untrained_lines)
    more = ", ..." if counts.untrained > len(counts.untrained_lines) else ""
    why = f"no assistant token lies within the first {max_length} tokens (max_length)"
    if counts.untrained == counts.rows:
        raise TrainingError(
            "DATASET_INVALID",
            f"No row trains anything: {why}. Lines {lines}{more}.",
            "Raise max_length, or shorten the prompts.",
        )
    message = f"{counts.untrained} of {counts.rows} rows train nothing: {why}. Lines {lines}{more}."
    reporter.report(event_pb2.LogEmitted(level=event_pb2.LOG_LEVEL_WARNING, message=message))
