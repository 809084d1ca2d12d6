"""An export's task: written aside, proven, renamed, and copied to where it shall go."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict, ParseDict, ParseError

from luthier.trainer.v1 import report_pb2, task_pb2
from luthier.v1 import event_pb2, export_proof_pb2, export_task_pb2, model_pb2
from luthier_trainer import durable
from luthier_trainer.control import Control
from luthier_trainer.errors import TrainingError
from luthier_trainer.export.adapter import write_adapter
from luthier_trainer.export.merged import write_merged
from luthier_trainer.export.progress import Progress
from luthier_trainer.export.proof import prove
from luthier_trainer.export.source import Tuned, read_json, read_tuned
from luthier_trainer.report import Reporter
from luthier_trainer.save import LINEAGE
from luthier_trainer.stop import Check, StopRequested, check_of

PROOF = "proof.json"
CARD = "README.md"
CREDENTIALS = "LUTHIER_EXPORT_CREDENTIALS"


def perform(
    task: task_pb2.TrainerTask, reporter: Reporter, control: Control, *, proven: bool = True
) -> report_pb2.Finished | report_pb2.Stopped:
    """Makes the export of `task.export`. Its directory is there whole and proven, or not at all; one that an earlier
    attempt left is kept and only copied. What is cancelled or fails leaves nothing; a pause while it is copied leaves
    the export for the attempt that goes on. `proven` is False for a person's own process alone, which may have no rows
    to prove it with.

    Raises TrainingError: MODEL_NOT_FOUND, MODEL_DAMAGED, EXPORT_UNSUPPORTED, EXPORT_NOT_EQUAL for one that behaves
    otherwise than the tuned model, QUANTIZATION_UNAVAILABLE, STORAGE_FULL, and as `proof.prove` and `publish.publish`.
    """
    check = check_of(control)
    output = Path(task.export.output_dir)
    try:
        tuned = read_tuned(task)
        proof = _earlier(output, task.export.export_id)
        if proof is None:
            with durable.new_directory(output) as aside:
                proof = _make(task, tuned, aside, reporter, check, proven)
        files = listed(output)
        uri = _publish(task, output, files, reporter, check)
    except StopRequested:
        if control.requested() == task_pb2.CONTROL_ACTION_CANCEL:
            shutil.rmtree(output, ignore_errors=True)
        return report_pb2.Stopped()
    except TrainingError as error:
        if not error.retryable:
            shutil.rmtree(output, ignore_errors=True)
        raise
    return report_pb2.Finished(
        size_bytes=durable.size(output),
        files=files,
        proof=proof,
        destination_uri=uri,
        base_licence=tuned.base_licence,
        base_revision=tuned.base_revision,
    )


def listed(folder: Path) -> list[model_pb2.ModelFile]:
    """The files of an export, as its manifest has them; the manifest itself is not among them."""
    noted = read_json(folder / durable.MANIFEST).get("files", {})
    return [
        model_pb2.ModelFile(path=path, size_bytes=each["size_bytes"], sha256=each["sha256"])
        for path, each in sorted(noted.items())
    ]


def _make(
    task: task_pb2.TrainerTask, tuned: Tuned, folder: Path, reporter: Reporter, check: Check, proven: bool
) -> export_proof_pb2.ExportProof:
    """Writes the export and proves it. Raises TrainingError EXPORT_NOT_EQUAL."""
    progress = Progress(reporter, event_pb2.PHASE_EXPORTING)
    write_files(tuned, task.spec.export, folder, progress, check, task.export.llama_cpp_dir)
    check()
    proof = export_proof_pb2.ExportProof()
    if proven:
        proof = prove(tuned, folder, task.spec.export, task.export.proof_dataset, reporter, check)
        reporter.report(event_pb2.ExportProven(proof=proof), durable=True)
        if not proof.passed:
            raise _not_equal(proof)
        durable.write_json(folder / PROOF, _as_json(proof))
    durable.write_json(folder / LINEAGE, _lineage(task, tuned, proof))
    if task.export.card:
        (folder / CARD).write_text(task.export.card, encoding="utf-8")
    check()
    durable.write_manifest(folder)
    return proof


def write_files(
    tuned: Tuned,
    export: export_task_pb2.ExportTask,
    folder: Path,
    progress: Callable[[int, int], None],
    check: Check,
    llama_cpp_dir: str = "",
) -> None:
    """Writes what the export is asked to be, without card, proof and manifest. Raises as `perform`."""
    kind = export.WhichOneof("format")
    if kind == "adapter":
        write_adapter(tuned, folder, progress, check)
    elif kind == "merged" and export.merged.weights == export_task_pb2.WEIGHT_TYPE_NF4:
        from luthier_trainer.export.quantized import write_nf4

        write_nf4(tuned, export.merged, folder, progress, check)
    elif kind == "merged":
        write_merged(tuned, export.merged, folder, progress, check)
    elif kind == "gguf":
        from luthier_trainer.export import gguf

        gguf.write(tuned, export.gguf, folder, progress, check, llama_cpp_dir)
    else:
        raise TrainingError("EXPORT_UNSUPPORTED", "The export has no format.", "Ask for adapter, merged or gguf.")


def _publish(
    task: task_pb2.TrainerTask,
    folder: Path,
    files: list[model_pb2.ModelFile],
    reporter: Reporter,
    check: Check,
) -> str:
    """Copies the export to its destination, if it has one. Returns where it lies then."""
    if not task.spec.export.destination.uri:
        return ""
    check()
    from luthier_trainer.export.publish import publish

    return publish(
        folder,
        files,
        task.spec.export.destination,
        os.environ.get(CREDENTIALS, ""),
        list(task.export.destination_roots),
        Progress(reporter, event_pb2.PHASE_PUBLISHING),
        check,
    )


def _earlier(output: Path, export_id: str) -> export_proof_pb2.ExportProof | None:
    """The proof of a whole export that an attempt before this one made; None for none, and for a damaged one."""
    if not (output / durable.MANIFEST).is_file():
        return None
    noted = read_json(output / LINEAGE).get("export", {})
    if not isinstance(noted, dict) or noted.get("id") != export_id:
        return None
    try:
        durable.verify_manifest(output)
        proof = ParseDict(read_json(output / PROOF), export_proof_pb2.ExportProof())
    except (TrainingError, ParseError):
        return None
    return proof if proof.passed else None


def _lineage(task: task_pb2.TrainerTask, tuned: Tuned, proof: export_proof_pb2.ExportProof) -> dict[str, Any]:
    """The model's luthier.json with what was exported; a checkpoint has none, and begins one."""
    lineage = read_json(tuned.directory / LINEAGE) or {"format": 1}
    export = _as_json(task.spec.export)
    export.pop("destination", None)  # where a copy goes is nobody's business who has one
    lineage["export"] = {
        "id": task.export.export_id,
        "model_id": tuned.name,
        "job_id": task.job_id,
        "task": export,
        "base_model": tuned.base_name,
        "base_revision": tuned.base_revision,
        "base_licence": tuned.base_licence,
        "proof": _as_json(proof),
    }
    return lineage


def _as_json(message: export_task_pb2.ExportTask | export_proof_pb2.ExportProof) -> dict[str, Any]:
    return MessageToDict(message, preserving_proto_field_name=True)


def _not_equal(proof: export_proof_pb2.ExportProof) -> TrainingError:
    failed = [each for each in proof.checks if not each.passed]
    told = "; ".join(f"{each.name}: {each.message}" for each in failed) or "no check was made"
    return TrainingError(
        "EXPORT_NOT_EQUAL",
        f"The export does not behave as the tuned model does. {told}",
        "Export it with more bits a weight, or with a template and tokenizer that the format can hold.",
    )
