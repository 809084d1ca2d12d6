"""Requests about models, their names and their exports, made of what people write."""

import uuid
from collections.abc import Iterable, Mapping

from luthier.v1.export_task_pb2 import ExportDestination
from luthier.v1.models_pb2 import (
    ExportModelRequest,
    ListExportsRequest,
    ListModelNamesRequest,
    ListModelsRequest,
    UpdateModelRequest,
)
from luthier_client import exports


def list_request(name: str, tags: Mapping[str, str] | None, id_prefix: str, page_size: int) -> ListModelsRequest:
    return ListModelsRequest(name=name, tags=tags, id_prefix=id_prefix, page_size=page_size)


def names_request(prefix: str, page_size: int) -> ListModelNamesRequest:
    return ListModelNamesRequest(prefix=prefix, page_size=page_size)


def update_request(
    model_id: str, set_tags: Mapping[str, str] | None, remove_tags: Iterable[str], description: str | None
) -> UpdateModelRequest:
    """Raises ValueError when nothing is to be changed."""
    if isinstance(remove_tags, str):
        raise ValueError("remove_tags is a list of tags, not one text")
    removed = list(remove_tags)
    if not set_tags and not removed and description is None:
        raise ValueError("nothing to change: give set_tags, remove_tags or description")
    return UpdateModelRequest(model_id=model_id, set_tags=set_tags, remove_tags=removed, description=description)


def export_request(
    model: str,
    format: exports.Format,
    *,
    proof_dataset: str,
    proof_rows: int | None,
    destination: ExportDestination | str | None,
    request_id: str | None,
    validate_only: bool,
) -> ExportModelRequest:
    task = exports.task(model, format, proof_dataset=proof_dataset, proof_rows=proof_rows, to=destination)
    return ExportModelRequest(export=task, request_id=request_id or str(uuid.uuid4()), validate_only=validate_only)


def exports_request(model: str, id_prefix: str, page_size: int) -> ListExportsRequest:
    return ListExportsRequest(model_id=model, id_prefix=id_prefix, page_size=page_size)
