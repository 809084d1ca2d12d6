"""What holds between the domain and the contract: every field mapped, every error coded, every state reachable."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from luthier.v1.dataset_pb2 import DatasetFormat, DatasetLineage, DatasetReading
from luthier.v1.export_proof_pb2 import ExportProof
from luthier.v1.export_task_pb2 import ExportTask, GgufExport
from luthier.v1.job_pb2 import JobError, JobSpec, JobState, Progress
from luthier.v1.model_pb2 import LineageKind, ModelFile
from luthier_server import errors
from luthier_server.change import Change
from luthier_server.grpc import boundary, convert, paging
from luthier_server.ids import Ids
from luthier_server.job import FAILED, TERMINAL, TRANSITIONS, IllegalTransition, Job, check_transition
from luthier_server.lineage import Edge, Graph, Node
from luthier_server.store.datasets import Dataset
from luthier_server.store.exports import Export
from luthier_server.store.jobs import Checkpoint
from luthier_server.store.model_names import Alias, Move, Name
from luthier_server.store.models import Model, Version


def a_job(**fields: Any) -> Job:
    job = Job(
        id="job_1",
        tenant="default",
        state=FAILED,
        spec=JobSpec(display_name="x"),
        resolved_spec=JobSpec(display_name="x"),
        error=JobError(reason="X"),
        progress=Progress(step=1),
        attempt=1,
        retries=0,
        last_sequence=7,
        model_id="model_1",
        create_time=1,
        start_time=2,
        end_time=3,
        retry_time=4,
        export_id="export_1",
    )
    return dataclasses.replace(job, **fields)


def a_dataset() -> Dataset:
    return Dataset(
        id="ds_1",
        tenant="default",
        name="n",
        version=1,
        sha256="0" * 64,
        size_bytes=1,
        row_count=1,
        format=DatasetFormat.DATASET_FORMAT_MESSAGES,
        create_time=1,
        reading=DatasetReading(format=DatasetFormat.DATASET_FORMAT_MESSAGES),
        source="hf://datasets/x",
        lineage=DatasetLineage(operation="split"),
        warnings=1,
    )


VERSION = Version("support-bot", 3, "model_1", 1)
ALIAS = Alias("support-bot", "production", 3, "model_1", [Move(1, 3, 0, 1, rollback=True)])
LINEAGE = Graph(
    {"m": Node("m", LineageKind.LINEAGE_KIND_MODEL, "n", "mit", deleted=True)}, {Edge("m", "n", "parent"): None}
)


def a_model() -> Model:
    return Model(
        id="model_1",
        tenant="default",
        name="n",
        job_id="job_1",
        base_model="b",
        adaptation="lora",
        step=1,
        size_bytes=1,
        metrics={"loss": 1.0},
        create_time=1,
        training_dataset="ds_1",
        validation_dataset="ds_2",
        base_model_revision="main",
        base_licence="mit",
        parent_model="model_0",
        checkpoint="job_1:step-1",
        description="d",
        spec=JobSpec(display_name="x"),
        resolved_spec=JobSpec(display_name="x"),
        tags={"a": "b"},
        versions=(VERSION,),
        aliases=("support-bot@production",),
    )


def an_export() -> Export:
    file = ModelFile(path="model.gguf", size_bytes=1, sha256="0" * 64)
    task = ExportTask(model="model_1", gguf=GgufExport())
    proof = ExportProof(loader="llama.cpp", passed=True)
    return Export("export_1", "default", "model_1", "job_1", task, [file], proof, 1, "s3://models/1", 1)


@pytest.mark.parametrize(
    "message",
    [
        convert.job_proto(a_job(), "history", 3),
        convert.dataset_proto(a_dataset()),
        convert.checkpoint_proto(Checkpoint("job_1", 1, 1, "000001-a1", 1, 1)),
        convert.model_proto(a_model()),
        convert.export_proto(an_export()),
        convert.version_proto(VERSION),
        convert.alias_proto(ALIAS),
        convert.alias_proto(ALIAS).history[0],
        convert.name_proto(Name("support-bot", [VERSION], [ALIAS])),
        convert.lineage_proto(LINEAGE),
        convert.lineage_proto(LINEAGE).nodes[0],
        convert.lineage_proto(LINEAGE).edges[0],
    ],
    ids=lambda message: type(message).__name__,
)
def test_every_field_of_a_resource_has_a_mapping(message: Message) -> None:
    unmapped = {field.name for field in message.DESCRIPTOR.fields} - {field.name for field, _ in message.ListFields()}
    assert not unmapped


def tree(root: type[errors.LuthierError]) -> Iterator[type[errors.LuthierError]]:
    yield root
    for child in root.__subclasses__():
        yield from tree(child)


def an_error(kind: type[errors.LuthierError]) -> errors.LuthierError:
    many = [errors.Violation(f"field{n}", "y" * 300) for n in range(100)]
    long = "m" * 5000
    if issubclass(kind, errors.NotFound):
        return kind("job", long)
    if issubclass(kind, errors.AlreadyExists):
        return kind(long, kind="job", name=long)
    if issubclass(kind, errors.FailedPrecondition):
        return kind(long, subject="job", obstacles=[errors.Obstacle("JOB", long, long)] * 100)
    if issubclass(kind, errors.InvalidArgument):
        return kind(long, many, metadata={"lines": "1," * 2000})
    if kind in (errors.StorageFull, errors.Draining):
        return kind()
    if issubclass(kind, errors.Exhausted):
        return kind(long, subject="queue", retry_seconds=1)
    return kind(long)


@pytest.mark.parametrize("kind", list(tree(errors.LuthierError)), ids=lambda kind: kind.__name__)
def test_every_error_has_a_code_one_reason_and_a_small_status(kind: type[errors.LuthierError]) -> None:
    status = boundary.status_of(an_error(kind))
    types = [detail.type_url.rpartition(".")[2] for detail in status.details]
    assert status.code != grpc.StatusCode.OK.value[0]
    assert (status.code == grpc.StatusCode.INTERNAL.value[0]) == (kind is errors.LuthierError)
    assert types.count("ErrorInfo") == 1
    assert len(types) == len(set(types))
    assert status.ByteSize() < 7000


def test_terminal_states_lead_nowhere_and_every_other_leads_to_one() -> None:
    for state in TERMINAL:
        assert not TRANSITIONS[state]
    for state, following in TRANSITIONS.items():
        if state not in TERMINAL:
            reached, frontier = set(following), set(following)
            while frontier:
                frontier = {after for each in frontier for after in TRANSITIONS[each]} - reached
                reached |= frontier
            assert reached & TERMINAL, JobState.Name(state)
    with pytest.raises(IllegalTransition):
        check_transition(JobState.JOB_STATE_SUCCEEDED, JobState.JOB_STATE_QUEUED)


def test_nothing_follows_a_terminal_event() -> None:
    change = Change(a_job(state=JobState.JOB_STATE_RUNNING), now=1)
    change.move(FAILED, "X", error=JobError(reason="X"))
    with pytest.raises(AssertionError):
        change.emit(change.events[0].state_changed)
    assert [event.sequence for event in change.events] == [8]


def test_ids_grow_when_the_clock_does_not() -> None:
    times = iter([2.0, 2.0, 1.0, 0.0, 3.0])
    ids = Ids(clock=lambda: next(times))
    made = [ids.new("job") for _ in range(5)]
    assert made == sorted(set(made))
    later = Ids(last=made[-1], clock=lambda: 0.0)
    assert later.new("job") > made[-1]
    assert all(len(each) == len("job_") + 26 for each in made)


def test_a_page_token_is_bound_to_the_other_arguments() -> None:
    from luthier.v1.fine_tuning_pb2 import ListJobsRequest

    request = ListJobsRequest(page_size=5, labels={"a": "b"})
    token = paging.token(request, "job_1")
    assert paging.below(ListJobsRequest(page_size=9, labels={"a": "b"}), token) == "job_1"
    for bad, arguments in ((token, {"a": "c"}), ("%%%", {"a": "b"}), (token[:-4], {"a": "b"}), ("AAAA", {})):
        with pytest.raises(errors.InvalidArgument):
            paging.below(ListJobsRequest(labels=arguments), bad)
