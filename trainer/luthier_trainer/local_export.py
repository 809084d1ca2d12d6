"""Exporting a tuned model in one line, without a server: the same code, the same files."""

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from luthier.trainer.v1.report_pb2 import Finished
from luthier.trainer.v1.task_pb2 import BaseModelSource, ExportWork, TrainerTask
from luthier.v1 import export_task_pb2, job_pb2
from luthier.v1.export_proof_pb2 import ExportProof
from luthier_trainer.console import ConsoleReporter, SilentReporter
from luthier_trainer.control import NoControl
from luthier_trainer.local import dataset_source, model_source
from luthier_trainer.main import set_up_libraries
from luthier_trainer.report import Reporter

_WEIGHTS = {
    "bf16": export_task_pb2.WEIGHT_TYPE_BF16,
    "f16": export_task_pb2.WEIGHT_TYPE_F16,
    "f32": export_task_pb2.WEIGHT_TYPE_F32,
    "nf4": export_task_pb2.WEIGHT_TYPE_NF4,
}
_GGUF = {
    "f16": export_task_pb2.GGUF_TYPE_F16,
    "bf16": export_task_pb2.GGUF_TYPE_BF16,
    "q8_0": export_task_pb2.GGUF_TYPE_Q8_0,
    "q6_k": export_task_pb2.GGUF_TYPE_Q6_K,
    "q5_k_m": export_task_pb2.GGUF_TYPE_Q5_K_M,
    "q4_k_m": export_task_pb2.GGUF_TYPE_Q4_K_M,
    "q3_k_m": export_task_pb2.GGUF_TYPE_Q3_K_M,
    "q2_k": export_task_pb2.GGUF_TYPE_Q2_K,
}


@dataclass(frozen=True)
class Exported:
    """What came out: the directory, its files below it, their bytes, and the proof; None when there were no rows to
    prove it with."""

    directory: Path
    files: tuple[str, ...]
    size_bytes: int
    proof: ExportProof | None


def export_model(
    directory: str | Path,
    out: str | Path,
    *,
    format: Literal["adapter", "merged", "gguf"] = "merged",
    weights: Literal["bf16", "f16", "f32", "nf4"] = "bf16",
    max_shard_bytes: int | None = None,
    gguf_type: Literal["f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k"] = "f16",
    adapter_only: bool = False,
    base_model: str = "",
    proof_data: str | Path | None = None,
    proof_rows: int | None = None,
    progress: bool | None = None,
    reporter: Reporter | None = None,
) -> Exported:
    """Writes the model or adapter in `directory`, which `fine_tune` made or a server's model is downloaded to, into
    `out` in the form that others load.

    `weights` and `max_shard_bytes` are of `merged`, `gguf_type` and `adapter_only` of `gguf`; they are the fields of
    an export with the same names, which `docs/models.md` explains. `base_model` says where an adapter's base is when
    the adapter does not: a hub id, a directory, or `builtin/tiny`. With rows in `proof_data`, best ones that were not
    trained on, the export is loaded by what others load it with and compared with the tuned model; without, nothing is
    proven. `progress` writes lines to standard error, by default when that is a terminal; `reporter` takes the reports
    instead.

    Raises TrainingError, EXPORT_NOT_EQUAL for an export that behaves otherwise than the model, and FileExistsError when
    `out` is there already; neither leaves `out`.
    """
    set_up_libraries()
    target = Path(out).absolute()
    if target.exists():
        raise FileExistsError(f"{target} is there already")
    export = export_task_pb2.ExportTask(model=Path(directory).name, proof_rows=proof_rows)
    if format == "adapter":
        export.adapter.SetInParent()
    elif format == "merged":
        export.merged.weights = _WEIGHTS[weights]
        if max_shard_bytes is not None:
            export.merged.max_shard_bytes = max_shard_bytes
    else:
        export.gguf.type = _GGUF[gguf_type]
        export.gguf.adapter_only = adapter_only
    if reporter is None:
        shown = sys.stderr.isatty() if progress is None else progress
        reporter = ConsoleReporter() if shown else SilentReporter()
    model = Path(directory).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as work:
        task = TrainerTask(
            job_id=f"local-{target.name}",
            attempt=1,
            spec=job_pb2.JobSpec(display_name=target.name, export=export),
            base_model=_base(model, base_model),
            cache_dir=str(Path(work) / "cache"),
            export=ExportWork(
                model_dir=str(model),
                model_id=_name(model),
                output_dir=str(target),
                export_id=f"local-{target.name}",
                proof_dataset=None if proof_data is None else dataset_source(Path(proof_data), {}),
            ),
        )
        from luthier_trainer.export.perform import perform

        end = perform(task, reporter, NoControl(), proven=proof_data is not None)
    if not isinstance(end, Finished):
        raise RuntimeError("the export was stopped, and nobody asked for it")
    files = tuple(each.path for each in end.files)
    return Exported(target, files, end.size_bytes, end.proof if proof_data is not None else None)


def _base(model: Path, base_model: str) -> BaseModelSource:
    """Where the base of a model lies. Raises TrainingError MODEL_NOT_FOUND."""
    source = model_source(base_model or str(model))
    source.ClearField("adapter_dir")
    return source


def _name(model: Path) -> str:
    """The id that the model was made with, else what its directory is called."""
    try:
        noted = json.loads((model / "luthier.json").read_bytes()).get("model_id")
    except (OSError, ValueError, AttributeError):
        noted = None
    return noted if isinstance(noted, str) and noted else model.name
