"""Requests about jobs, made of what people write."""

import uuid
from collections.abc import Iterable, Mapping
from typing import TypeAlias

from luthier.v1.fine_tuning_pb2 import CreateJobRequest, EstimateJobRequest, ListJobsRequest
from luthier.v1.job_pb2 import JobSpec, JobState
from luthier_client import enums

State: TypeAlias = "JobState.ValueType | str"
"""A job state: its number, or its name in lower case, such as `running`."""


def create_request(spec: JobSpec, request_id: str | None, validate_only: bool) -> CreateJobRequest:
    return CreateJobRequest(spec=spec, request_id=request_id or str(uuid.uuid4()), validate_only=validate_only)


def estimate_request(spec: JobSpec, probe: bool) -> EstimateJobRequest:
    return EstimateJobRequest(spec=spec, probe=probe)


def list_request(
    states: Iterable[State], labels: Mapping[str, str] | None, id_prefix: str, page_size: int
) -> ListJobsRequest:
    """Raises ValueError for a state that is none."""
    numbers = [_state(state) for state in states]
    return ListJobsRequest(states=numbers, labels=labels, id_prefix=id_prefix, page_size=page_size)


def _state(state: State) -> JobState.ValueType:
    return JobState.ValueType(enums.number(JobState.DESCRIPTOR, state)) if isinstance(state, str) else state
