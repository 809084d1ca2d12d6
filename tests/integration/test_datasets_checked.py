"""What a model will see of a dataset is shown, checked and kept before a device is held; a real tokenizer does it."""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from daemon import Daemon, details, kinds, reason, small, until

from luthier.v1 import datasets_pb2 as ds
from luthier.v1 import fine_tuning_pb2 as ft
from luthier.v1.dataset_report_pb2 import FindingLevel
from luthier.v1.job_pb2 import Hyperparameters, JobSpec, JobState
from luthier.v1.tokenization_pb2 import Overlong, Tokenization, TrainOn

Start = Callable[..., Daemon]
ROWS = b"".join(
    json.dumps({"prompt": f"What follows {n}?", "completion": f"After {n} comes {n + 1}."}).encode() + b"\n"
    for n in range(60)
)
STEPS = Hyperparameters(max_steps=2, batch_size=4)
# About a second a row, which is no crime.
SLOW = (
    "{% for i in range(99999) %}{% set x = i %}{% endfor %}" * 20
    + "{% for m in messages %}{{ m['role'] + ': ' }}"
    + "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    + "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    served = Daemon(tmp_path_factory.mktemp("checked"), ["--threads", "1"]).start()
    served.upload(ROWS)
    yield served
    assert not list((served.data_dir / "work").iterdir())
    served.close()


def job(**task: Any) -> JobSpec:
    return small(**({"hyperparameters": STEPS} | task))


def checked(daemon: Daemon, **fields: Any) -> tuple[list[ds.TransferProgress], ds.TokenReports]:
    responses = list(daemon.datasets.CheckDataset(ds.CheckDatasetRequest(base_model="builtin/tiny", **fields)))
    return [each.progress for each in responses[:-1]], responses[-1].reports


def test_a_job_waits_for_a_device_only_once_its_datasets_are_checked(daemon: Daemon) -> None:
    created = daemon.create(job())
    assert created.state == JobState.JOB_STATE_VALIDATING
    events = list(daemon.watch(created.id))
    told = [each for each in kinds(events) if each in ("VALIDATING", "datasets_checked", "QUEUED", "PREPARING")]
    assert told == ["VALIDATING", "datasets_checked", "QUEUED", "PREPARING"]
    assert daemon.get(created.id).state == JobState.JOB_STATE_SUCCEEDED
    [report] = [each.datasets_checked.training for each in events if each.HasField("datasets_checked")]
    assert report.statistics.rows == 60
    assert 0 < report.statistics.trained_tokens < report.statistics.tokens
    assert report.statistics.estimated_steps == 2
    got = daemon.datasets.GetDataset(ds.GetDatasetRequest(dataset="rows"))
    assert got.dataset.id in {each.dataset_id for each in got.token_reports}
    assert got.report.rows == 60


def test_what_training_would_refuse_fails_before_a_device_is_held(daemon: Daemon) -> None:
    refusing = Tokenization(chat_template="{{ raise_exception('no such thing') }}")
    created = daemon.create(job(tokenization=refusing))
    ended = daemon.wait(created.id)
    assert (ended.state, ended.attempt) == (JobState.JOB_STATE_FAILED, 0)
    assert ended.error.reason == "DATASET_INVALID"
    assert "no such thing" in ended.error.message
    assert "lines 1, 2, " in ended.error.message
    assert "luthier dataset doctor rows@1 --base-model builtin/tiny" in ended.error.hint


def test_rows_too_long_fail_the_job_when_that_is_asked_for(daemon: Daemon) -> None:
    strict = Tokenization(overlong=Overlong.OVERLONG_ERROR)
    numbers = Hyperparameters(max_steps=2, batch_size=4, max_length=16)
    ended = daemon.wait(daemon.create(job(tokenization=strict, hyperparameters=numbers)).id)
    assert ended.state == JobState.JOB_STATE_FAILED
    assert ended.error.reason == "DATASET_INVALID"


def test_a_job_on_preference_data_is_refused_with_the_field(daemon: Daemon) -> None:
    daemon.upload(b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n', "pairs")
    with pytest.raises(grpc.RpcError) as caught:
        daemon.create(job(training_dataset="pairs"))
    [violation] = details(caught.value)["BadRequest"].field_violations
    assert violation.field == "spec.fine_tune.training_dataset"


def test_a_cancel_ends_the_check_at_once(daemon: Daemon) -> None:
    created = daemon.create(job(tokenization=Tokenization(chat_template=SLOW)))
    work = daemon.data_dir / "work"
    until(lambda: any(work.iterdir()), what="the child's directory")
    with pytest.raises(grpc.RpcError) as caught:
        daemon.fine_tuning.PauseJob(ft.PauseJobRequest(job_id=created.id))
    assert reason(caught.value) == "JOB_VALIDATING"
    daemon.fine_tuning.CancelJob(ft.CancelJobRequest(job_id=created.id))
    assert daemon.get(created.id).state == JobState.JOB_STATE_CANCELLED
    until(lambda: not any(work.iterdir()), what="the end of the child")
    until(lambda: not daemon.host().trainers, what="the end of its process")


def test_a_server_that_was_killed_checks_again(daemons: Start) -> None:
    daemon = daemons("--threads", "1")
    daemon.upload(ROWS)
    created = daemon.create(job(tokenization=Tokenization(chat_template=SLOW)))
    until(lambda: any((daemon.data_dir / "work").iterdir()), what="the child's directory")
    other = daemon.create(job())
    daemon.kill()
    daemon.start()
    daemon.fine_tuning.CancelJob(ft.CancelJobRequest(job_id=created.id))
    assert daemon.wait(other.id).state == JobState.JOB_STATE_SUCCEEDED
    assert not any((daemon.data_dir / "work").iterdir())


def test_a_preview_shows_the_tokens_that_are_trained(daemon: Daemon) -> None:
    request = ds.PreviewDatasetRequest(dataset="rows", base_model="builtin/tiny", lines=[7, 3])
    response = daemon.datasets.PreviewDataset(request)
    assert [row.line for row in response.rows] == [3, 7]
    assert response.template_sha256
    for row in response.rows:
        [sequence] = row.sequences
        trained = "".join(token.text for token in sequence.tokens if token.trained)
        number = row.line - 1
        assert trained.startswith(f"After {number} comes {number + 1}.")
        assert f"What follows {number}?" not in trained
        assert sequence.token_count == len(sequence.tokens)
        assert sequence.trained_count == sum(token.trained for token in sequence.tokens)
        assert [turn.trained for turn in sequence.turns] == [False, True]


def test_a_preview_without_a_model_shows_turns(daemon: Daemon) -> None:
    response = daemon.datasets.PreviewDataset(ds.PreviewDatasetRequest(dataset="rows", count=2))
    assert len(response.rows) == 2
    [sequence] = response.rows[0].sequences
    assert [(turn.role, turn.content) for turn in sequence.turns] == [
        ("user", "What follows 0?"),
        ("assistant", "After 0 comes 1."),
    ]
    assert not sequence.tokens


def test_options_change_what_is_trained(daemon: Daemon) -> None:
    def trained(**options: Any) -> int:
        request = ds.PreviewDatasetRequest(
            dataset="rows", base_model="builtin/tiny", count=1, tokenization=Tokenization(**options)
        )
        return int(daemon.datasets.PreviewDataset(request).rows[0].sequences[0].trained_count)

    default, everything = trained(), trained(train_on=TrainOn.TRAIN_ON_ALL_TOKENS)
    assert 0 < default < everything


def test_a_check_says_how_far_it_is_and_finds_what_a_model_will_not_like(daemon: Daemon) -> None:
    daemon.upload(ROWS[: len(ROWS) // 2].rpartition(b"\n")[0] + b"\n", "half")
    _, reports = checked(daemon, dataset="rows", max_length=16, validation_dataset="half")
    assert reports.training.statistics.overlong_rows > 0
    assert reports.training.statistics.lost_tokens > 0
    codes = {each.code for each in reports.validation.findings}
    assert any("LEAKAGE" in each for each in codes), codes
    assert not [each for each in reports.training.findings if each.level == FindingLevel.FINDING_LEVEL_ERROR]


def test_rows_that_are_held_out_and_trained_on_are_found(daemon: Daemon) -> None:
    daemon.upload(ROWS + ROWS, "twice")
    created = daemon.create(job(training_dataset="twice", validation_fraction=0.1))
    [report] = [
        each.datasets_checked.training for each in daemon.watch(created.id) if each.HasField("datasets_checked")
    ]
    [leaks] = [each.count for each in report.counts if each.code == "LEAKAGE"]
    assert leaks >= 6


def test_a_job_that_would_score_nothing_is_no_success(daemon: Daemon) -> None:
    numbers = Hyperparameters(max_steps=2, batch_size=4, max_length=8)
    short = b'{"prompt": "a", "completion": "b"}\n'
    daemon.upload(ROWS[: ROWS.index(b"\n", 500) + 1] + short, "one-short")
    drop = Tokenization(overlong=Overlong.OVERLONG_DROP)
    created = job(training_dataset="one-short", validation_dataset="rows", tokenization=drop, hyperparameters=numbers)
    ended = daemon.wait(daemon.create(created).id)
    assert (ended.state, ended.error.reason) == (JobState.JOB_STATE_FAILED, "DATASET_INVALID")


def test_a_preview_of_long_rows_is_cut_and_says_so(daemon: Daemon) -> None:
    turns = [{"role": role, "content": "some words " * 5_000} for _ in range(60) for role in ("user", "assistant")]
    daemon.upload(json.dumps({"messages": turns}).encode() + b"\n", "long-rows")
    response = daemon.datasets.PreviewDataset(ds.PreviewDatasetRequest(dataset="long-rows", base_model="builtin/tiny"))
    assert response.ByteSize() < 4 * 1024 * 1024
    assert "PREVIEW_CUT" in {each.code for each in response.rows[-1].findings}


def test_a_template_that_never_ends_ends_its_call_alone(daemon: Daemon) -> None:
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = j %}{% endfor %}{% endfor %}"
    started = time.monotonic()
    with pytest.raises(grpc.RpcError) as caught:
        daemon.datasets.PreviewDataset(
            ds.PreviewDatasetRequest(
                dataset="rows", base_model="builtin/tiny", tokenization=Tokenization(chat_template=endless)
            )
        )
    assert time.monotonic() - started < 30
    assert reason(caught.value) == "TEMPLATE_TOO_SLOW"
    request = ds.PreviewDatasetRequest(dataset="rows", base_model="builtin/tiny")
    assert daemon.datasets.PreviewDataset(request).rows


def test_a_caller_that_leaves_ends_the_work(daemon: Daemon) -> None:
    request = ds.CheckDatasetRequest(
        dataset="rows", base_model="builtin/tiny", tokenization=Tokenization(chat_template=SLOW)
    )
    call = daemon.datasets.CheckDataset(request)
    work = daemon.data_dir / "work"
    until(lambda: any(work.iterdir()), what="the child's directory")
    call.cancel()
    until(lambda: not any(work.iterdir()), what="the end of the child")


def test_an_unknown_model_and_both_templates_are_named_by_field(daemon: Daemon) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        daemon.datasets.PreviewDataset(ds.PreviewDatasetRequest(dataset="rows", base_model="builtin/none"))
    assert reason(caught.value) == "MODEL_NOT_FOUND"
    both = Tokenization(chat_template="x", chat_template_name="chatml")
    with pytest.raises(grpc.RpcError) as caught:
        daemon.create(job(tokenization=both))
    assert "spec.fine_tune.tokenization.chat_template" in str(details(caught.value)["BadRequest"])


def test_a_split_has_no_row_on_both_sides_and_names_its_parent(daemon: Daemon) -> None:
    request = ds.DeriveDatasetRequest(split=ds.SplitDataset(dataset="rows", validation=0.2, seed=1))
    training, validation = daemon.datasets.DeriveDataset(request).datasets
    assert (training.name, validation.name) == ("rows-train", "rows-validation")
    assert (training.rows, validation.rows) == (48, 12)
    parent = daemon.datasets.GetDataset(ds.GetDatasetRequest(dataset="rows")).dataset
    assert list(validation.lineage.parents) == [parent.id]
    assert validation.lineage.parameters["part"] == "validation"
    again = daemon.datasets.DeriveDataset(request).datasets
    assert [each.id for each in again] == [training.id, validation.id]
    _, reports = checked(daemon, dataset="rows-train", validation_dataset="rows-validation")
    assert not [each for each in reports.validation.findings if each.code == "LEAKAGE"]
    whole = daemon.datasets.DeriveDataset(
        ds.DeriveDatasetRequest(
            concatenate=ds.ConcatenateDatasets(datasets=["rows-train", "rows-validation"], name="whole")
        )
    ).datasets[0]
    assert whole.rows == 60
    few = daemon.datasets.DeriveDataset(
        ds.DeriveDatasetRequest(sample=ds.SampleDataset(dataset="rows", rows=7, seed=3))
    ).datasets[0]
    assert (few.name, few.rows) == ("rows-sample", 7)
    with pytest.raises(grpc.RpcError) as caught:
        daemon.datasets.DeriveDataset(ds.DeriveDatasetRequest(sample=ds.SampleDataset(dataset="rows", rows=70)))
    assert reason(caught.value) == "NOT_DERIVABLE"
