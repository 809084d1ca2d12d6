"""The model that a job made, or that one of its checkpoints is."""

from collections.abc import Mapping

from luthier_server.job import Job
from luthier_server.references import is_model_id
from luthier_server.store.models import Model


def made_by(
    job: Job,
    *,
    model_id: str,
    step: int,
    size_bytes: int,
    metrics: Mapping[str, float],
    now: int,
    base_licence: str = "",
    base_model_revision: str = "",
    checkpoint: str = "",
) -> Model:
    """What the server keeps of a job of fine-tuning as a model. now: microseconds since the epoch."""
    task = job.resolved_spec.fine_tune
    stem = task.base_model.rstrip("/").rpartition("/")[2]
    name = f"{stem}-{task.suffix or job.spec.display_name or 'tuned'}"
    return Model(
        id=model_id,
        tenant=job.tenant,
        name=f"{name}-step-{step}" if checkpoint else name,
        job_id=job.id,
        base_model=task.base_model,
        adaptation=task.WhichOneof("adaptation") or "lora",
        step=step,
        size_bytes=size_bytes,
        metrics=metrics,
        create_time=now,
        training_dataset=task.training_dataset,
        validation_dataset=task.validation_dataset,
        base_model_revision=base_model_revision or task.base_model_revision,
        base_licence=base_licence,
        parent_model=task.base_model if is_model_id(task.base_model) else "",
        checkpoint=checkpoint,
        spec=job.spec,
        resolved_spec=job.resolved_spec,
    )
