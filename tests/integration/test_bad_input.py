"""Bad input is a clear error that names the field or the line, and nothing is lost by it."""

import functools
import os
import random
import socket
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from daemon import ROWS, Daemon, details, puppet, reason, small

from luthier.v1 import datasets_pb2 as ds
from luthier.v1 import fine_tuning_pb2 as ft
from luthier.v1 import models_pb2 as md
from luthier.v1.job_pb2 import (
    Checkpoints,
    EarlyStopping,
    Evaluation,
    Hyperparameters,
    JobSpec,
    JobState,
    Lora,
    LrScheduler,
    Resources,
)

Start = Callable[..., Daemon]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    served = Daemon(tmp_path_factory.mktemp("bad"), puppet(steps=3)).start()
    served.upload()
    yield served
    # Whatever was thrown at it, it still works.
    assert served.wait(served.create().id).state == JobState.JOB_STATE_SUCCEEDED
    assert "Traceback" not in served.log()
    served.close()


def refused(call: Callable[[], Any]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def violations(error: grpc.RpcError) -> dict[str, str]:
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error
    return {each.field: each.description for each in details(error)["BadRequest"].field_violations}


def with_numbers(**numbers: Any) -> JobSpec:
    return small(hyperparameters=Hyperparameters(**numbers))


def flagged(**fields: Any) -> JobSpec:
    spec = small()
    spec.MergeFrom(JobSpec(**fields))
    return spec


@pytest.mark.parametrize(
    ("spec", "field", "words"),
    [
        (JobSpec(), "spec.task", "required"),
        (small(lora=Lora(rank=0)), "spec.fine_tune.lora.rank", "greater than or equal to 1"),
        (with_numbers(learning_rate=-1), "spec.fine_tune.hyperparameters.learning_rate", "greater than 0"),
        (with_numbers(epochs=0, max_steps=0), "spec.fine_tune.hyperparameters.epochs", "nothing would be trained"),
        (with_numbers(epochs=0), "spec.fine_tune.hyperparameters.epochs", "nothing would be trained"),
        (with_numbers(learning_rate=float("nan")), "spec.fine_tune.hyperparameters.learning_rate", "greater than 0"),
        (
            small(evaluation=Evaluation(early_stopping=EarlyStopping())),
            "spec.fine_tune.evaluation.early_stopping",
            "needs evaluations",
        ),
        (small(checkpoints=Checkpoints(keep_best=True)), "spec.fine_tune.checkpoints.keep_best", "needs evaluations"),
        (with_numbers(decay_ratio=0.2), "spec.fine_tune.hyperparameters.decay_ratio", "warmup_stable_decay alone"),
        (
            with_numbers(lr_scheduler=LrScheduler.LR_SCHEDULER_CONSTANT, min_learning_rate_ratio=0.1),
            "spec.fine_tune.hyperparameters.min_learning_rate_ratio",
            "has no meaning",
        ),
        (
            with_numbers(warmup_steps=1, warmup_ratio=0.1),
            "spec.fine_tune.hyperparameters.warmup_ratio",
            "not both",
        ),
        (
            with_numbers(batch_size=8, per_device_train_batch_size=2, gradient_accumulation_steps=2),
            "spec.fine_tune.hyperparameters.batch_size",
            "is 8, but per_device_train_batch_size x gradient_accumulation_steps is 4",
        ),
        (with_numbers(attn_implementation="magic"), "spec.fine_tune.hyperparameters.attn_implementation", "auto"),
        (with_numbers(max_length=100_000), "spec.fine_tune.hyperparameters.max_length", "was made for at most"),
        (
            small(lora=Lora(target_modules=["q_prj"])),
            "spec.fine_tune.lora.target_modules[0]",
            "matches no module of builtin/tiny: did you mean q_proj",
        ),
        (
            small(lora=Lora(modules_to_save=["embed_token"])),
            "spec.fine_tune.lora.modules_to_save[0]",
            "did you mean embed_tokens",
        ),
        (flagged(priority=1), "spec.priority", "not honoured yet"),
        (flagged(resources=Resources(gpus=2)), "spec.resources", "not honoured yet"),
        (small(validation_dataset="rows", validation_fraction=0.1), "spec.fine_tune.validation_fraction", "not both"),
        (small(evaluation=Evaluation(every_steps=5)), "spec.fine_tune.evaluation", "needs data"),
        (small(base_model="builtin/huge"), "spec.fine_tune.base_model", "tiny"),
        (small(base_model="/etc"), "spec.fine_tune.base_model", "--model-root"),
        (small(base_model="../../etc/passwd"), "spec.fine_tune.base_model", ""),
        (small(base_model="builtin/../../../etc"), "spec.fine_tune.base_model", ""),
        (small(base_model="builtin\x00/tiny"), "spec.fine_tune.base_model", "characters"),
        (small(base_model="--root"), "spec.fine_tune.base_model", ""),
        (small(base_model="model_01ARZ3NDEKTSV4RRFFQ69G5FAV"), "spec.fine_tune.base_model", "there is no model"),
        (small(base_model="model_../../etc"), "spec.fine_tune.base_model", "there is no model"),
        (small(suffix="../up"), "spec.fine_tune.suffix", "pattern"),
        (small(hub_token_secret="hf_NotASecretName"), "spec.fine_tune.hub_token_secret", "pattern"),
    ],
)
def test_a_spec_that_breaks_a_rule_is_refused_by_field(daemon: Daemon, spec: JobSpec, field: str, words: str) -> None:
    before = daemon.fine_tuning.ListJobs(ft.ListJobsRequest()).jobs
    found = violations(refused(lambda: daemon.create(spec)))
    assert field in found
    assert words in found[field]
    assert daemon.fine_tuning.ListJobs(ft.ListJobsRequest()).jobs == before


def test_every_violation_comes_at_once(daemon: Daemon) -> None:
    spec = with_numbers(learning_rate=-1, batch_size=0, max_grad_norm=-2)
    assert len(violations(refused(lambda: daemon.create(spec)))) == 3


def test_details_stay_small_however_much_is_wrong(daemon: Daemon) -> None:
    spec = small(lora=Lora(target_modules=[f"{'x' * 150}{n}" for n in range(200)]))
    error = refused(lambda: daemon.create(spec))
    assert 1 <= len(violations(error)) <= 25
    trailers: Any = error.trailing_metadata()
    assert sum(len(value) for _, value in trailers) < 6000


def test_unknown_things_are_not_found_by_their_kind(daemon: Daemon) -> None:
    job = refused(lambda: daemon.get("job_01ARZ3NDEKTSV4RRFFQ69G5FAV"))
    assert (job.code(), reason(job)) == (grpc.StatusCode.NOT_FOUND, "JOB_NOT_FOUND")
    assert details(job)["ResourceInfo"].resource_type == "job"
    dataset = refused(lambda: daemon.create(small(training_dataset="row")))
    assert (dataset.code(), reason(dataset)) == (grpc.StatusCode.NOT_FOUND, "DATASET_NOT_FOUND")
    assert "did you mean rows" in str(dataset.details())
    for name in ("model_x", "../../luthier.db", "job_01ARZ3NDEKTSV4RRFFQ69G5FAV:step-1", "/etc/passwd"):
        request = md.DownloadModelRequest(model_id=name)
        assert (
            refused(functools.partial(list, daemon.models.DownloadModel(request))).code() == grpc.StatusCode.NOT_FOUND
        )


def test_validate_only_answers_what_would_be_and_stores_nothing(daemon: Daemon) -> None:
    before = len(daemon.fine_tuning.ListJobs(ft.ListJobsRequest()).jobs)
    job = daemon.fine_tuning.CreateJob(ft.CreateJobRequest(spec=small(), validate_only=True)).job
    assert job.id == ""
    assert job.resolved_spec.fine_tune.lora.rank == 16
    assert job.resolved_spec.fine_tune.hyperparameters.epochs == 3
    assert len(daemon.fine_tuning.ListJobs(ft.ListJobsRequest()).jobs) == before


@pytest.mark.parametrize(
    ("content", "lines", "words"),
    [
        (b"", "", "no rows"),
        (b"\n\n  \n", "", "no rows"),
        (ROWS + b"{broken\n" + ROWS + b"[1]\n", "41,82", "line 41"),
        (b'{"messages": [{"role": "user", "content": "hi"}]}\n', "1", "assistant"),
        (b'{"text_": "a"}\n', "1", "line 1"),
        (b'{"prompt": "\xff", "completion": "b"}\n', "1", "line 1"),
        (b"\xff\xfe\x00\n", "", "UTF-16"),
        (b"PK\x03\x04 not a dataset at all", "", ""),
    ],
)
def test_a_dataset_with_bad_lines_is_refused_with_their_numbers(
    daemon: Daemon, content: bytes, lines: str, words: str
) -> None:
    error = refused(lambda: daemon.upload(content, "bad"))
    assert (error.code(), reason(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "DATASET_INVALID")
    assert details(error)["ErrorInfo"].metadata["lines"] == lines
    assert words in str(error.details())
    assert refused(lambda: daemon.datasets.GetDataset(ds.GetDatasetRequest(dataset="bad"))).code() == (
        grpc.StatusCode.NOT_FOUND
    )
    assert not list((daemon.data_dir / "blobs" / "incoming").iterdir())


def test_a_hundred_bad_lines_are_all_named(daemon: Daemon) -> None:
    error = refused(lambda: daemon.upload(b"{broken\n" * 250, "bad"))
    info = details(error)["ErrorInfo"]
    assert info.metadata["findings"] == "250"
    assert info.metadata["lines"] == ",".join(str(number) for number in range(1, 101))


@pytest.mark.parametrize("name", ["../up", "/abs", "UPPER", "", "a" * 64, "a b", "a\x00b", ".."])
def test_a_dataset_name_that_could_be_a_path_is_refused(daemon: Daemon, name: str) -> None:
    assert "metadata.name" in violations(refused(lambda: daemon.upload(ROWS, name))) or name == ".."


def test_an_upload_that_says_other_than_it_brings_is_refused(daemon: Daemon) -> None:
    def parts(**metadata: Any) -> Iterator[ds.UploadDatasetRequest]:
        yield ds.UploadDatasetRequest(metadata=ds.DatasetMetadata(name="other", **metadata))
        yield ds.UploadDatasetRequest(chunk=ROWS)

    wrong_hash = refused(lambda: daemon.datasets.UploadDataset(parts(sha256="0" * 64)))
    assert "metadata.sha256" in violations(wrong_hash)
    assert "metadata.size_bytes" in violations(refused(lambda: daemon.datasets.UploadDataset(parts(size_bytes=1))))
    chunk_first = iter([ds.UploadDatasetRequest(chunk=b"x")])
    assert "metadata" in violations(refused(lambda: daemon.datasets.UploadDataset(chunk_first)))
    assert "metadata" in violations(refused(lambda: daemon.datasets.UploadDataset(iter([]))))


def test_the_same_bytes_under_the_same_name_are_one_dataset(daemon: Daemon) -> None:
    first, again = daemon.upload(), daemon.upload()
    other = daemon.upload(ROWS + b'{"prompt": "x", "completion": "y"}\n')
    assert (again, other.version, other.name) == (first, first.version + 1, "rows")


def test_bytes_that_do_not_decode_are_a_malformed_request(daemon: Daemon) -> None:
    dice = random.Random(7)
    for method in ("FineTuning/CreateJob", "FineTuning/GetJob", "Datasets/GetDataset", "Models/GetModel"):
        raw: Any = daemon.channel.unary_unary(f"/luthier.v1.{method}", None, None)
        for _ in range(50):
            body = bytes([0xFF]) + dice.randbytes(dice.randrange(1, 200))
            error = refused(functools.partial(raw, body, timeout=5))
            assert (error.code(), reason(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_REQUEST")


def test_a_message_of_64_mib_is_refused_before_it_is_read(daemon: Daemon) -> None:
    request = ft.CreateJobRequest(spec=JobSpec(display_name="x" * (64 * 2**20)))
    with grpc.insecure_channel(daemon.address, options=[("grpc.max_send_message_length", -1)]) as channel:
        create: Any = channel.unary_unary(
            "/luthier.v1.FineTuning/CreateJob", ft.CreateJobRequest.SerializeToString, None
        )
        assert refused(lambda: create(request, timeout=20)).code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_frame_that_declares_two_gib_and_random_bytes_on_the_port_harm_nobody(daemon: Daemon) -> None:
    host, port = daemon.address.split(":")
    dice = random.Random(11)
    settings = struct.pack(">I", 0)[1:] + b"\x04\x00\x00\x00\x00\x00"
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings
    huge_frame = preface + b"\x7f\xff\xff\x00\x00\x00\x00\x00\x01" + b"\x00" * 64
    # A gRPC message whose length prefix says 2 GiB, in an otherwise sound call.
    raw: Any = daemon.channel.unary_unary("/luthier.v1.FineTuning/GetJob", None, None)
    for body in (huge_frame, preface + dice.randbytes(4096), dice.randbytes(4096), b"GET / HTTP/1.1\r\n\r\n"):
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(body)
            connection.settimeout(0.2)
            try:
                connection.recv(4096)
            except (TimeoutError, ConnectionResetError):
                continue
    assert refused(lambda: raw(b"\x0a\x03abc", timeout=5)).code() == grpc.StatusCode.NOT_FOUND


def test_a_full_disk_refuses_the_upload_and_keeps_everything_else(daemons: Start) -> None:
    daemon = daemons(*puppet(steps=3), limit_file_kib=4096)
    kept = daemon.upload()
    row = b'{"prompt": "%s", "completion": "y"}\n' % (b"x" * 1000)
    error = refused(lambda: daemon.upload(row * 8000, "large"))
    assert (error.code(), reason(error)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "STORAGE_FULL")
    assert not list((daemon.data_dir / "blobs" / "incoming").iterdir())
    assert daemon.datasets.GetDataset(ds.GetDatasetRequest(dataset="rows")).dataset == kept
    assert daemon.wait(daemon.create().id).state == JobState.JOB_STATE_SUCCEEDED


def test_a_database_that_cannot_grow_says_so_and_takes_writes_again(daemons: Start) -> None:
    daemon = daemons(*puppet(steps=3), limit_file_kib=1024)
    daemon.upload()
    made: list[str] = []
    spec = small(evaluation=Evaluation(sample_prompts=["x" * 4000] * 40))
    with pytest.raises(grpc.RpcError) as full:
        while len(made) < 200:
            made.append(daemon.create(spec).id)
    assert (full.value.code(), reason(full.value)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "STORAGE_FULL")
    listed = {job.id for job in daemon.fine_tuning.ListJobs(ft.ListJobsRequest(page_size=1000)).jobs}
    assert set(made) <= listed


def test_a_database_of_a_newer_luthier_or_a_damaged_one_is_refused_with_words(daemons: Start, tmp_path: Path) -> None:
    daemon = daemons()
    daemon.stop()
    database = daemon.data_dir / "luthier.db"
    with sqlite3.connect(database) as connection:
        connection.execute("PRAGMA user_version=999")
    connection.close()

    def start() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "luthier_server.main", "--listen", "127.0.0.1:0", "--warm", "off"]
        return subprocess.run(
            [*command, "--data-dir", str(daemon.data_dir)], capture_output=True, text=True, timeout=30
        )

    newer = start()
    assert (newer.returncode, "made by a newer Luthier" in newer.stderr) == (2, True)
    for left in ("luthier.db-wal", "luthier.db-shm"):
        (daemon.data_dir / left).unlink(missing_ok=True)
    database.write_bytes(os.urandom(8192))
    damaged = start()
    assert (damaged.returncode, "damaged" in damaged.stderr) == (2, True)
    assert "Traceback" not in newer.stderr + damaged.stderr
