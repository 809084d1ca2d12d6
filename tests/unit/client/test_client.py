"""Jobs, datasets, models and errors over a real channel, on both stacks."""

import pickle
from pathlib import Path
from typing import Any

import pytest
from unit.client.fake_models import FILES
from unit.client.fake_server import FakeServer, job_spec
from unit.client.fake_service import VERSION

from luthier.v1.job_pb2 import JOB_STATE_CANCELLED, JOB_STATE_FAILED, JOB_STATE_SUCCEEDED
from luthier_client import AsyncClient, Client, JobCancelled, JobFailed, errors
from luthier_client.endpoint import is_loopback, resolve

ERRORS = {
    "INVALID_ARGUMENT": errors.InvalidSpec,
    "NOT_FOUND": errors.NotFound,
    "ALREADY_EXISTS": errors.AlreadyExists,
    "FAILED_PRECONDITION": errors.FailedPrecondition,
    "RESOURCE_EXHAUSTED": errors.ResourceExhausted,
    "UNAVAILABLE": errors.Unavailable,
    "DEADLINE_EXCEEDED": errors.DeadlineExceeded,
    "OUT_OF_RANGE": errors.OutOfRange,
    "ABORTED": errors.Aborted,
    "CANCELLED": errors.CallCancelled,
    "UNIMPLEMENTED": errors.Unimplemented,
    "UNAUTHENTICATED": errors.Unauthenticated,
    "PERMISSION_DENIED": errors.PermissionDenied,
    "DATA_LOSS": errors.DataLoss,
    "INTERNAL": errors.Internal,
    "UNKNOWN": errors.Internal,
}


@pytest.mark.parametrize(("code", "kind"), ERRORS.items())
async def test_every_status_code_becomes_its_error_with_all_details_on_both_stacks(
    endpoint: str, code: str, kind: type[errors.LuthierError]
) -> None:
    caught: list[errors.LuthierError] = []
    # With a timeout below the suggested delay, an UNAVAILABLE is not tried again.
    async with AsyncClient(endpoint, timeout=1.0) as client:
        with pytest.raises(errors.LuthierError) as failed:
            await client.get_job(f"error-{code}")
        caught.append(failed.value)
    with Client(endpoint, timeout=1.0) as other:
        with pytest.raises(errors.LuthierError) as failed:
            other.get_job(f"error-{code}")
        caught.append(failed.value)
    for error in caught:
        assert type(error) is kind
        assert (error.code, error.message, error.reason) == (code, f"told {code}", f"WHY_{code}")
        assert error.metadata == {"fact": "42"} | ({"hint": error.hint} if code == "UNAUTHENTICATED" else {})
        assert ("LUTHIER_TOKEN" in error.hint) == (code == "UNAUTHENTICATED")
        assert error.violations == [("a.b", "is wrong")]
        assert error.retry_delay == 1.5
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), vars(again)) == (kind, vars(error))


def test_a_status_without_details_still_becomes_its_error(endpoint: str) -> None:
    with Client(endpoint) as client, pytest.raises(errors.OutOfRange, match="plain words") as caught:
        client.get_job("error-plain-OUT_OF_RANGE")
    assert caught.value.reason == "" and caught.value.violations == []


async def test_nobody_at_a_loopback_endpoint_says_how_to_start_one() -> None:
    with (
        Client("127.0.0.1:1") as client,
        pytest.raises(errors.Unavailable, match="with `luthierd`") as caught,
    ):
        client.get_job("job_x")
    assert caught.value.reason == "UNREACHABLE"
    async with AsyncClient("127.0.0.1:1") as other:
        with pytest.raises(errors.Unavailable, match="start one with `luthierd`"):
            await other.server_info()


def test_an_endpoint_is_read_from_the_argument_then_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LUTHIER_ENDPOINT", raising=False)
    assert resolve(None) == "127.0.0.1:50051"
    monkeypatch.setenv("LUTHIER_ENDPOINT", "trainer.local")
    assert resolve(None) == "trainer.local:50051"
    assert resolve("[::1]:7") == "[::1]:7"
    assert resolve("::1") == "[::1]:50051"
    assert is_loopback("[::1]:7") and is_loopback("localhost:7") and not is_loopback("10.0.0.1:7")
    for wrong in ("http://localhost:50051", "host:0", "host:99999", "host:port", ":50051"):
        with pytest.raises(ValueError):
            resolve(wrong)


async def test_a_refused_create_is_sent_again_with_its_request_id_and_makes_one_job(
    own_server: FakeServer,
) -> None:
    async with AsyncClient(own_server.endpoint) as client:
        await client.create_job(job_spec(refuse="2"))
        assert len([job async for job in client.list_jobs()]) == 1
    with Client(own_server.endpoint) as other:
        other.create_job(job_spec(refuse="2"))
        assert len(list(other.list_jobs())) == 2
    ids = [call["request_id"] for call in own_server.calls("CreateJob")]
    assert len(ids) == 6 and len(set(ids[:3])) == 1 and len(set(ids[3:])) == 1 and len(set(ids)) == 2


def test_a_call_is_not_sent_again_for_ever(own_server: FakeServer) -> None:
    with Client(own_server.endpoint) as client, pytest.raises(errors.Unavailable) as caught:
        client.create_job(job_spec(refuse="100"))
    assert caught.value.reason == "SERVER_DRAINING"
    assert len(own_server.calls("CreateJob")) == 4


def test_every_violation_of_a_spec_arrives_at_once(endpoint: str) -> None:
    spec = job_spec()
    spec.fine_tune.base_model = "bad"
    with Client(endpoint) as client, pytest.raises(errors.InvalidSpec) as caught:
        client.create_job(spec)
    assert caught.value.violations == [
        ("spec.fine_tune.base_model", "no such model"),
        ("spec.fine_tune.hyperparameters.epochs", "must be >= 0"),
    ]


async def test_waiting_returns_the_last_state_and_raises_only_when_asked_to(endpoint: str) -> None:
    with Client(endpoint) as client:
        assert client.create_job(job_spec(pace="0.01")).wait(timeout=30).state == JOB_STATE_SUCCEEDED
        failing = client.create_job(job_spec(outcome="failed"))
        assert failing.wait().state == JOB_STATE_FAILED
        with pytest.raises(JobFailed, match="The loss became infinite") as caught:
            failing.wait(check=True)
        again = pickle.loads(pickle.dumps(caught.value))
        assert (again.reason, again.job.id) == ("LOSS_NOT_FINITE", failing.id)
        slow = client.create_job(job_spec(steps="1000", pace="0.05"))
        with pytest.raises(TimeoutError):
            slow.wait(timeout=0.3)
    async with AsyncClient(endpoint) as other:
        same = await other.get_job(slow.id)
        with pytest.raises(TimeoutError):
            await same.wait(timeout=0.3)
        await same.cancel()
        assert (await same.wait()).state == JOB_STATE_CANCELLED
        with pytest.raises(JobCancelled):
            await same.wait(check=True)
        with pytest.raises(errors.FailedPrecondition):
            await (await other.get_job(failing.id)).cancel()


async def test_lists_run_over_every_page_and_filter(own_server: FakeServer) -> None:
    with Client(own_server.endpoint) as client:
        created = [client.create_job(job_spec(f"job {n}", team="a" if n % 2 else "b")).id for n in range(7)]
        client.create_job(job_spec("slow", steps="1000", pace="0.1"))
        listed = [job.id for job in client.list_jobs(page_size=2, states=["succeeded"])]
        assert listed == created[::-1]
        assert [job.id for job in client.list_jobs(labels={"team": "a"})] == created[1::2][::-1]
        with pytest.raises(ValueError, match="succeeded"):
            list(client.list_jobs(states=["done"]))
    async with AsyncClient(own_server.endpoint) as other:
        assert [job.id async for job in other.list_jobs(page_size=3, states=[JOB_STATE_SUCCEEDED])] == listed


async def test_the_same_bytes_give_the_same_version_as_file_rows_or_bytes(endpoint: str, tmp_path: Path) -> None:
    path = tmp_path / "My Cards.v2.jsonl"
    path.write_bytes(b'{"prompt": "a", "completion": "\xc3\xa9"}\n' * 30_000)
    seen: list[tuple[int, int]] = []
    async with AsyncClient(endpoint) as client:
        first = await client.upload_dataset(path, on_progress=lambda done, total: seen.append((done, total)))
        assert (first.name, first.version, first.rows, first.size_bytes) == ("my-cards", 1, 30_000, path.stat().st_size)
        assert seen[-1] == (first.size_bytes, first.size_bytes) and seen[0][0] == 0 and seen == sorted(seen)
    with Client(endpoint) as other:
        rows = ({"prompt": "a", "completion": "é"} for _ in range(30_000))
        again = other.upload(rows, name="my-cards")
        assert again.dataset == first and not again.created
        assert other.upload_dataset(b'{"a": 1}\n', name="my-cards").version == 2
        assert [each.version for each in other.list_datasets(name="my-cards")] == [2, 1]
        assert other.delete_dataset("my-cards@2").version == 2
        assert other.get_dataset("my-cards") == first
        with pytest.raises(ValueError, match="need a name"):
            other.upload_dataset(b"{}")
        with pytest.raises(ValueError, match="row 2"):
            other.upload_dataset([{"a": 1}, {"a": float("nan")}], name="x")


def test_a_refused_upload_names_its_lines(endpoint: str) -> None:
    content = b"".join(b"{}\n" if number % 3 else b"oops\n" for number in range(1, 121))
    with Client(endpoint) as client, pytest.raises(errors.InvalidDataset) as caught:
        client.upload_dataset(content, name="broken")
    assert caught.value.findings == 40
    assert caught.value.lines == list(range(3, 121, 3))
    assert caught.value.violations[0] == ("line 3", "is not a JSON object") and len(caught.value.violations) == 25


async def test_a_download_brings_every_file_whole(endpoint: str, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    with Client(endpoint) as client:
        target = client.download_model("model_x", tmp_path / "one", on_progress=lambda *each: seen.append(each))
        with pytest.raises(FileExistsError):
            client.download_model("model_x", tmp_path / "one")
    async with AsyncClient(endpoint) as other:
        (tmp_path / "two").mkdir()
        await other.download_model("model_x", tmp_path / "two")
    for directory in (target, tmp_path / "two"):
        assert {each.name: each.read_bytes() for each in directory.iterdir()} == FILES
    total = sum(map(len, FILES.values()))
    assert seen[-1] == (total, total)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.parametrize(
    ("model", "reason"), [("escape", "UNSAFE_PATH"), ("damaged", "SHA256_MISMATCH"), ("short", "SIZE_MISMATCH")]
)
async def test_a_download_that_is_not_what_it_says_leaves_nothing(
    endpoint: str, tmp_path: Path, model: str, reason: str
) -> None:
    async with AsyncClient(endpoint) as client:
        with pytest.raises(errors.DownloadDamaged) as caught:
            await client.download_model(model, tmp_path / "inside" / "target")
    assert caught.value.reason == reason
    assert not list(tmp_path.rglob("*.json")) and not list((tmp_path / "inside").iterdir())


async def test_the_server_says_its_version_and_health(endpoint: str) -> None:
    with Client(endpoint) as client:
        info = client.server_info()
    assert (info.serving, info.version, info.endpoint) == (True, VERSION, endpoint)
    async with AsyncClient(endpoint) as other:
        assert await other.server_info() == info


def test_the_two_clients_and_handles_offer_the_same_methods() -> None:
    from luthier_client import AsyncJobHandle, JobHandle

    def names(kind: Any) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    assert names(AsyncClient) == names(Client)
    assert names(AsyncJobHandle) == names(JobHandle)
