"""Reports: what a trainer tells, and to whom."""

import re
import time
from typing import Protocol

from luthier.trainer.v1 import report_pb2
from luthier.v1 import event_pb2

Payload = (
    report_pb2.Started
    | event_pb2.PlanResolved
    | event_pb2.PhaseProgressed
    | event_pb2.StepCompleted
    | event_pb2.EvaluationCompleted
    | event_pb2.SamplesGenerated
    | event_pb2.CheckpointSaved
    | event_pb2.LogEmitted
    | event_pb2.ResumeChecked
    | event_pb2.LearningRateFound
    | event_pb2.ExportProven
    | report_pb2.Heartbeat
    | report_pb2.Finished
    | report_pb2.Failed
    | report_pb2.Stopped
)

_FIELD_OF = {
    field.message_type.full_name: field.name
    for field in report_pb2.TrainerReport.DESCRIPTOR.oneofs_by_name["payload"].fields
    if field.message_type is not None
}
_CHECKPOINT = re.compile(r"(\d{6,})-a(\d+)", re.ASCII)


class Reporter(Protocol):
    """Takes what happens in training, in order. Safe to call from several threads."""

    def report(self, payload: Payload, *, durable: bool = False) -> None:
        """Records the payload; with `durable` it survives a power cut once this returns."""


def trainer_report(payload: Payload, sequence: int) -> report_pb2.TrainerReport:
    """The record of a payload, made now. Raises KeyError for a message that no report can carry."""
    record = report_pb2.TrainerReport(sequence=sequence)
    record.time.FromNanoseconds(time.time_ns())
    getattr(record, _FIELD_OF[payload.DESCRIPTOR.full_name]).CopyFrom(payload)
    return record


def checkpoint_directory(step: int, attempt: int) -> str:
    """The name of a checkpoint's directory, such as `000200-a1`."""
    return f"{step:06d}-a{attempt}"


def checkpoint_step(directory: str) -> int:
    """The step that a checkpoint directory's name tells. Raises ValueError for any other name."""
    match = _CHECKPOINT.fullmatch(directory)
    if match is None:
        raise ValueError(f"{directory!r} is no checkpoint's name")
    return int(match[1])


def checkpoint_saved(job_id: str, step: int, attempt: int, size_bytes: int) -> event_pb2.CheckpointSaved:
    """The report of a checkpoint that lies complete in its directory."""
    return event_pb2.CheckpointSaved(
        step=step,
        name=f"{job_id}:step-{step}",
        directory=checkpoint_directory(step, attempt),
        size_bytes=size_bytes,
    )
