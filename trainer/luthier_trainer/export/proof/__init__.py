"""The proof of an export: what will load it loads it, and it is compared with the tuned model on held-out rows.

The tuned model answers first (`reference`), its small numbers are kept (`measure`), it leaves memory, the export is
loaded (`loaders`) and asked the same, and the answers are compared (`compare`) by the limits of its type
(`thresholds`).
"""

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from google.protobuf.json_format import ParseDict, ParseError

from luthier.trainer.v1.task_pb2 import DatasetSource
from luthier.v1 import event_pb2, tokenization_pb2
from luthier.v1.export_proof_pb2 import ExportProof, ProofCheck
from luthier.v1.export_task_pb2 import ExportTask, GgufExport
from luthier_trainer.errors import TrainingError
from luthier_trainer.export.proof import compare
from luthier_trainer.export.proof.artefact import Artefact, Loader, NotLoaded
from luthier_trainer.export.proof.measure import Continuation, Judged, Standing, judged
from luthier_trainer.export.proof.reference import Reference, ask
from luthier_trainer.export.proof.rows import ProofRow
from luthier_trainer.export.proof.thresholds import limits_of, thresholds_of
from luthier_trainer.export.source import Tuned
from luthier_trainer.report import Reporter
from luthier_trainer.stop import Check

__all__ = ["prove"]

ROWS = 16
"""Rows that are compared where nothing else is asked for."""


def prove(
    tuned: Tuned,
    exported: Path,
    export: ExportTask,
    dataset: DatasetSource,
    reporter: Reporter,
    check: Check,
) -> ExportProof:
    """Compares the export in the directory `exported` with the tuned model; the proof tells whether it passed, and of
    each check that did not the first difference. Leaves nothing beside what is there.

    Reports PhaseProgressed, PHASE_PROVING, by rows: each counts for the tuned model and for the export. Raises
    TrainingError: EXPORT_NOT_EQUAL when the export cannot be loaded, PROOF_IMPOSSIBLE without rows to compare or
    without a llama.cpp that is known, and as the trainer's own loading; StopRequested by `check`.
    """
    count = export.proof_rows if export.HasField("proof_rows") else ROWS
    thresholds = thresholds_of(export)
    progress = _Progress(reporter, 2 * min(count, dataset.rows or count))
    reference = ask(tuned, dataset, count, _tokenization(tuned), thresholds.noise, progress.step, check)
    progress.total = 2 * len(reference.rows)
    limits = limits_of(
        thresholds,
        Standing.joined(reference.standings),
        Judged.joined(reference.shaken) if reference.shaken else None,
        reference.vocabulary,
    )
    try:
        with _loaded(tuned, exported, export, reference, check) as (loader, artefact):
            checks = _words(reference, artefact, export)
            found: list[Judged] = []
            answers: list[Judged] = []
            for row, standing, answer in zip(*reference.by_row, strict=True):
                check()
                found.append(judged(artefact.logits(row.ids[:-1], row.positions), row.targets, standing))
                if limits.answers:
                    answers.append(_reads(artefact, row, answer))
                progress.step()
            ends = artefact.ends
    except NotLoaded as error:
        raise TrainingError(
            "EXPORT_NOT_EQUAL",
            f"The export cannot be used as it was meant: {_without_paths(str(error), exported, tuned.base)}.",
            "This is a fault of the export and not of the model; nothing of it was kept.",
        ) from error
    checks += compare.numbers(reference, found, answers, ends, limits)
    return ExportProof(
        loader=loader.name,
        loader_version=loader.version,
        passed=all(each.passed for each in checks),
        checks=checks,
        rows=len(reference.rows),
        tokens=reference.tokens,
        dataset_id=dataset.id,
    )


def _without_paths(text: str, *folders: Path) -> str:
    """What libraries say of a file, without where this server keeps it."""
    for each in folders:
        text = text.replace(f"{each}/", "").replace(str(each), "it")
    return text


def _reads(artefact: Artefact, row: ProofRow, answer: Continuation) -> Judged:
    """What the export thinks of the tuned model's answer."""
    ids = [*row.prompt_ids, *answer.ids]
    places = range(len(row.prompt_ids) - 1, len(ids) - 1)
    logits = artefact.logits(ids[:-1], places) if places else np.zeros((0, 1), np.float32)
    return judged(logits, answer.ids, answer.standing)


class _Progress:
    """Rows done, of both models."""

    def __init__(self, reporter: Reporter, total: int) -> None:
        self._reporter = reporter
        self._completed = 0
        self.total = total
        self._tell()

    def step(self) -> None:
        """One row more."""
        self._completed += 1
        self._tell()

    def _tell(self) -> None:
        self._reporter.report(
            event_pb2.PhaseProgressed(
                phase=event_pb2.PHASE_PROVING, completed=self._completed, total=self.total, unit="rows"
            )
        )


def _words(reference: Reference, artefact: Artefact, export: ExportTask) -> list[ProofCheck]:
    """The checks without numbers. A GGUF adapter has no words of its own: those of the base that it is used with."""
    checks = [compare.tokenization(reference, artefact)]
    if not export.gguf.adapter_only:
        checks += [compare.template(reference, artefact), compare.stop_tokens(reference, artefact)]
    return checks


@contextlib.contextmanager
def _loaded(
    tuned: Tuned, exported: Path, export: ExportTask, reference: Reference, check: Check
) -> Iterator[tuple[Loader, Artefact]]:
    """The export in what will load it. Each loader is imported where it is used: PEFT's proof needs no llama.cpp."""
    match export.WhichOneof("format"):
        case "adapter":
            from luthier_trainer.export.proof.loaders import peft

            with peft.load(exported, tuned.base) as artefact:
                yield peft.LOADER, artefact
        case "merged":
            from luthier_trainer.export.proof.loaders import whole

            with whole.load(exported, tuned.base) as artefact:
                yield whole.LOADER, artefact
        case "gguf":
            from luthier_trainer.export.proof.loaders import llama

            with _gguf_files(tuned, exported, export.gguf, check) as (file, adapter):
                # llama.cpp's threads wait by spinning: no more of them than torch was given.
                threads = torch.get_num_threads()
                longest = reference.longest
                with llama.load(file, adapter, base=tuned.base, longest=longest, threads=threads) as artefact:
                    yield llama.loader(), artefact
        case other:
            raise ValueError(f"an export of format {other}")


@contextlib.contextmanager
def _gguf_files(
    tuned: Tuned, exported: Path, options: GgufExport, check: Callable[[], None]
) -> Iterator[tuple[Path, Path | None]]:
    """The file, and the adapter's on top. For an adapter alone its base is written as GGUF, and deleted afterwards; it
    lies in the export's own folder, with which it goes when nobody comes to delete it."""
    own = _only_gguf(exported)
    if not options.adapter_only:
        yield own, None
        return
    from luthier_trainer.export import gguf

    with tempfile.TemporaryDirectory(prefix=".proof-", dir=exported) as folder:
        base = Tuned(directory=tuned.directory, base=tuned.base, adapter=None, name=tuned.name)
        gguf.write(base, GgufExport(), Path(folder), lambda _done, _total: None, check)
        yield _only_gguf(Path(folder)), own


def _only_gguf(folder: Path) -> Path:
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise NotLoaded(f"it has {len(files)} GGUF files, and one is expected")
    return files[0]


def _tokenization(tuned: Tuned) -> tokenization_pb2.Tokenization:
    """What of a row the model was trained on, as its own notes tell; the default where they do not."""
    try:
        noted = json.loads((tuned.directory / "luthier.json").read_text(encoding="utf-8")).get("tokenization", {})
        return ParseDict(noted, tokenization_pb2.Tokenization(), ignore_unknown_fields=True)
    except (OSError, ValueError, AttributeError, ParseError):
        return tokenization_pb2.Tokenization()
