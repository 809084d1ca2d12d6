"""Rows' values as protos. A test fails when a field of a proto has no place here."""

from luthier.v1.checkpoint_pb2 import Checkpoint as CheckpointProto
from luthier.v1.dataset_pb2 import Dataset as DatasetProto
from luthier.v1.export_pb2 import Export as ExportProto
from luthier.v1.job_pb2 import Job as JobProto
from luthier.v1.model_pb2 import AliasMove, LineageEdge, LineageNode, ModelAlias, ModelName, ModelVersion
from luthier.v1.model_pb2 import Model as ModelProto
from luthier.v1.models_pb2 import GetModelLineageResponse
from luthier_server.change import timestamp
from luthier_server.job import FAILED, Job
from luthier_server.lineage import Graph
from luthier_server.store.datasets import Dataset
from luthier_server.store.exports import Export
from luthier_server.store.jobs import Checkpoint
from luthier_server.store.model_names import Alias, Name
from luthier_server.store.models import Model, Version


def job_proto(job: Job, history_id: str, queue_position: int = 0) -> JobProto:
    """A job as clients see it."""
    return JobProto(
        id=job.id,
        spec=job.spec,
        resolved_spec=job.resolved_spec,
        state=job.state,
        error=job.error if job.state == FAILED else None,
        progress=job.progress,
        attempt=job.attempt,
        last_sequence=job.last_sequence,
        history_id=history_id,
        model_id=job.model_id,
        export_id=job.export_id,
        create_time=timestamp(job.create_time),
        start_time=timestamp(job.start_time) if job.start_time else None,
        end_time=timestamp(job.end_time) if job.end_time else None,
        queue_position=queue_position,
        retry_time=timestamp(job.retry_time) if job.retry_time else None,
    )


def checkpoint_proto(checkpoint: Checkpoint) -> CheckpointProto:
    """A checkpoint as clients see it."""
    return CheckpointProto(
        name=f"{checkpoint.job_id}:step-{checkpoint.step}",
        job_id=checkpoint.job_id,
        step=checkpoint.step,
        attempt=checkpoint.attempt,
        size_bytes=checkpoint.size_bytes,
        create_time=timestamp(checkpoint.create_time),
    )


def dataset_proto(dataset: Dataset) -> DatasetProto:
    """A dataset as clients see it."""
    return DatasetProto(
        id=dataset.id,
        name=dataset.name,
        version=dataset.version,
        sha256=dataset.sha256,
        size_bytes=dataset.size_bytes,
        rows=dataset.row_count,
        format=dataset.format,
        create_time=timestamp(dataset.create_time) if dataset.id else None,
        reading=dataset.reading,
        source=dataset.source,
        lineage=dataset.lineage,
        warnings=dataset.warnings,
    )


def export_proto(export: Export) -> ExportProto:
    """An export as clients see it."""
    return ExportProto(
        id=export.id,
        model_id=export.model_id,
        job_id=export.job_id,
        task=export.task,
        files=export.files,
        size_bytes=export.size_bytes,
        proof=export.proof,
        create_time=timestamp(export.create_time),
        destination_uri=export.destination_uri,
    )


def model_proto(model: Model) -> ModelProto:
    """A model as clients see it."""
    return ModelProto(
        id=model.id,
        name=model.name,
        job_id=model.job_id,
        base_model=model.base_model,
        adaptation=model.adaptation,
        step=model.step,
        size_bytes=model.size_bytes,
        metrics=model.metrics,
        create_time=timestamp(model.create_time),
        training_dataset=model.training_dataset,
        validation_dataset=model.validation_dataset,
        base_model_revision=model.base_model_revision,
        base_licence=model.base_licence,
        parent_model=model.parent_model,
        checkpoint=model.checkpoint,
        tags=model.tags,
        description=model.description,
        versions=[version_proto(each) for each in model.versions],
        aliases=model.aliases,
        spec=model.spec,
        resolved_spec=model.resolved_spec,
    )


def version_proto(version: Version) -> ModelVersion:
    """A version of a name as clients see it."""
    return ModelVersion(
        name=version.name,
        version=version.version,
        model_id=version.model_id,
        create_time=timestamp(version.create_time),
    )


def alias_proto(alias: Alias) -> ModelAlias:
    """An alias as clients see it."""
    return ModelAlias(
        name=alias.name,
        alias=alias.alias,
        version=alias.version,
        model_id=alias.model_id,
        history=[
            AliasMove(version=each.version, time=timestamp(each.time), rollback=each.rollback) for each in alias.moves
        ],
    )


def name_proto(name: Name) -> ModelName:
    """A name with its versions and aliases as clients see it."""
    return ModelName(
        name=name.name,
        versions=[version_proto(each) for each in name.versions],
        aliases=[alias_proto(each) for each in name.aliases],
    )


def lineage_proto(graph: Graph) -> GetModelLineageResponse:
    """Lineage as clients see it."""
    return GetModelLineageResponse(
        nodes=[
            LineageNode(id=each.id, kind=each.kind, name=each.name, licence=each.licence, deleted=each.deleted)
            for each in graph.nodes.values()
        ],
        edges=[LineageEdge(from_id=each.from_id, to_id=each.to_id, relation=each.relation) for each in graph.edges],
    )
