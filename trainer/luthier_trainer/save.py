"""The finished model: a directory that PEFT or transformers loads, with a note of where it came from."""

import importlib.metadata
from datetime import UTC, datetime

from google.protobuf.json_format import MessageToDict

from luthier.trainer.v1.task_pb2 import DatasetSource
from luthier_trainer import durable
from luthier_trainer.job import Job
from luthier_trainer.weights import write_weights

LINEAGE = "luthier.json"
_LIBRARIES = (
    "luthier-trainer",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
)


def save_model(job: Job, metrics: dict[str, float], base_licence: str) -> int:
    """Writes the model to the task's `model_dir`, aside and then renamed. Returns the bytes of all files."""
    with durable.new_directory(job.places.model) as aside:
        write_weights(job.trained, job.masters, job.tokenizer, aside)
        durable.write_json(aside / LINEAGE, _lineage(job, metrics, base_licence))
    return durable.size(job.places.model)


def _lineage(job: Job, metrics: dict[str, float], base_licence: str) -> dict[str, object]:
    task = job.task
    source = task.base_model
    lineage: dict[str, object] = {
        "format": 1,
        "job_id": task.job_id,
        "model_id": task.model_id,
        "attempt": task.attempt,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "training_seconds": round(job.counters.seconds, 3),
        "spec": MessageToDict(task.spec, preserving_proto_field_name=True),
        "plan": MessageToDict(job.plan(), preserving_proto_field_name=True),
        "base_model": {
            "name": task.spec.fine_tune.base_model,
            "hub_id": source.location if source.is_hub else "",
            "revision": base_revision(job),
            "licence": base_licence,
            "continued_adapter": bool(source.adapter_dir),
        },
        "training_dataset": _dataset(task.training_dataset),
        "chat_template_sha256": job.rows.template_sha256,
        "tokenization": MessageToDict(job.rows.report.tokenization, preserving_proto_field_name=True),
        "mask_method": job.rows.report.mask_method,
        "seed": job.settings.seed,
        "learning_rate": job.peak_rate,
        "steps": job.counters.step,
        "trained_tokens": job.counters.trained_tokens,
        "computed_tokens": job.counters.computed_tokens,
        "metrics": metrics,
        "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
    }
    if task.HasField("validation_dataset"):
        lineage["validation_dataset"] = _dataset(task.validation_dataset)
    return lineage


def base_revision(job: Job) -> str:
    """The revision of the base, where it came from a hub: the commit, or what was asked for where that is not known."""
    source = job.task.base_model
    return (job.trained.revision or source.revision) if source.is_hub else ""


def _dataset(source: DatasetSource) -> dict[str, object]:
    return {
        "id": source.id,
        "name": source.name,
        "sha256": source.sha256,
        "rows": source.rows,
        "reading": MessageToDict(source.reading, preserving_proto_field_name=True),
    }
