"""Tokens and TLS on the client's side: where they come from, where they go, and where they must not."""

import pickle
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from unit.client.command import job_file, run
from unit.client.fake_server import FakeServer, job_spec

from luthier_client import AsyncClient, Client, errors
from luthier_client.access import Access, read_token
from luthier_client.endpoint import resolve

TOKEN = "correct-horse.battery_staple~1"
VARIABLES = ("LUTHIER_ENDPOINT", "LUTHIER_TOKEN", "LUTHIER_TOKEN_FILE", "LUTHIER_TLS_CA")


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[FakeServer]:
    """A server that wants the token."""
    root = tmp_path / "guarded"
    root.mkdir()
    server = FakeServer(root, TOKEN)
    server.start()
    yield server
    server.stop()


async def test_every_call_of_both_clients_brings_the_token(guarded: FakeServer, tmp_path: Path) -> None:
    with Client(guarded.endpoint, token=TOKEN) as client:
        dataset = client.upload_dataset(b"{}\n", name="cards")
        client.get_dataset(dataset.id)
        list(client.list_datasets())
        client.import_dataset("more", hub="openai/gsm8k")
        client.preview_dataset("more")
        client.check_dataset("more", "builtin/tiny")
        client.sample_dataset("more", rows=1)
        client.delete_dataset(dataset.id)
        job = client.create_job(job_spec())
        job.wait(timeout=20)
        list(job.watch())
        job.metrics()
        job.checkpoints()
        list(client.list_jobs())
        for act in (job.cancel, job.pause, job.resume):
            with pytest.raises(errors.FailedPrecondition):
                act()
        client.get_job(job.id)
        model = next(iter(client.list_models()))
        client.get_model(model.id)
        client.download_model(model.id, tmp_path / "one")
        job.delete()
        assert client.server_info().serving
    async with AsyncClient(guarded.endpoint, token=TOKEN) as other:
        await other.upload_dataset(b"{}\n", name="cards")
        await other.import_dataset("more", hub="openai/gsm8k")
        await other.check_dataset("more", "builtin/tiny")
        same = await other.create_job(job_spec())
        await same.wait(timeout=20)
        assert [event async for event in same.watch()]
        await other.download_model(same.id, tmp_path / "two")
        await same.delete()
        assert (await other.server_info()).serving
    calls = guarded.calls("Guard")
    assert all(call["admitted"] for call in calls), calls
    assert {call["called"] for call in calls} == {
        "UploadDataset", "GetUpload", "ImportDataset", "PreviewDataset", "CheckDataset", "DeriveDataset", "GetDataset",
        "ListDatasets", "DeleteDataset", "CreateJob", "GetJob", "ListJobs", "WatchJob", "CancelJob",
        "PauseJob", "ResumeJob", "DeleteJob", "ListCheckpoints", "ListModels", "GetModel", "DownloadModel", "Check",
    }  # fmt: skip


async def test_without_or_with_a_wrong_token_every_kind_of_call_raises_with_a_hint_at_once(
    guarded: FakeServer, tmp_path: Path
) -> None:
    for token, reason in ((None, "UNAUTHENTICATED"), ("wrong", "BAD_TOKEN")):
        with Client(guarded.endpoint, token=token) as client:
            calls: list[Callable[[], Any]] = [
                partial(client.get_job, "job_x"),
                partial(client.upload_dataset, b"{}\n" * 400_000, name="cards"),
                partial(client.download_model, "model_x", tmp_path / "never"),
                partial(next, client.list_jobs()),
            ]
            for call in calls:
                with pytest.raises(errors.Unauthenticated) as refused:
                    call()
                assert refused.value.reason == reason
                assert "LUTHIER_TOKEN" in refused.value.hint
                assert "wrong" not in str(vars(refused.value)) + repr(refused.value)
                assert pickle.loads(pickle.dumps(refused.value)).hint == refused.value.hint
            assert client.server_info().serving
        async with AsyncClient(guarded.endpoint, token=token) as other:
            with pytest.raises(errors.Unauthenticated):
                await other.upload_dataset(b"{}\n", name="cards")
            with pytest.raises(errors.Unauthenticated):
                await other.get_job("job_x")
    assert not (tmp_path / "never").exists()


def test_a_token_that_is_taken_back_ends_a_watch_and_is_not_tried_for_ever(guarded: FakeServer) -> None:
    with Client(guarded.endpoint, token=TOKEN) as client:
        job = client.create_job(job_spec(steps="500", pace="0.05"))
        events = job.watch()
        next(events)
        guarded.kill()
        guarded.token = "another"
        guarded.start()
        with pytest.raises(errors.Unauthenticated):
            list(events)


def test_the_token_comes_from_the_argument_then_the_variable_then_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_text("# mine\n\n  of-the-file \n")
    assert Access.find().token == ""
    monkeypatch.setenv("LUTHIER_TOKEN_FILE", str(file))
    assert Access.find().token == "of-the-file"
    monkeypatch.setenv("LUTHIER_TOKEN", "of-the-variable")
    assert Access.find().token == "of-the-variable"
    assert Access.find(token="of-the-argument").metadata == (("authorization", "Bearer of-the-argument"),)
    assert Access.find(token="").metadata == ()
    file.write_text("one\ntwo\n")
    with pytest.raises(ValueError, match="holds 2 tokens"):
        read_token(file)
    monkeypatch.delenv("LUTHIER_TOKEN")
    with pytest.raises(ValueError, match="holds 2 tokens"):
        Client()


def test_a_token_is_never_shown(tmp_path: Path) -> None:
    access = Access.find("https://trainer.example", token=TOKEN)
    client = Client("127.0.0.1:1", token=TOKEN, timeout=1)
    with client, pytest.raises(errors.Unavailable) as nobody:
        client.get_job("job_x")
    for shown in (repr(access), str(access), repr(client), repr(nobody.value), str(vars(nobody.value))):
        assert TOKEN not in shown
    for bad in ("spaced secret", "sécret", "secret\nx"):
        with pytest.raises(ValueError) as refused:
            Client("127.0.0.1:1", token=bad)
        assert "cret" not in str(refused.value)


@pytest.mark.parametrize(
    "endpoint", ["10.0.0.1:50051", "trainer.example", "localhost.example:1", "127.0.0.1.example:1"]
)
def test_a_token_does_not_leave_this_machine_in_clear_text_unless_asked_to(endpoint: str) -> None:
    with pytest.raises(ValueError, match="in clear text") as refused:
        Client(endpoint, token=TOKEN)
    assert TOKEN not in str(refused.value)
    with pytest.raises(ValueError, match="in clear text"):
        AsyncClient(endpoint, token=TOKEN, tls=False)
    assert Access.find(endpoint, token=TOKEN, insecure=True).metadata
    assert Access.find(endpoint, token=TOKEN, tls=True).metadata == ()
    assert Access.find(f"https://{endpoint}", token=TOKEN).metadata == ()
    for here in ("127.0.0.1:1", "localhost:1", "[::1]:1", "unix:/run/luthier"):
        assert Access.find(here, token=TOKEN).metadata


def test_tls_is_spoken_by_scheme_by_argument_or_by_a_private_authority(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert resolve("https://trainer.example") == "trainer.example:50051"
    assert resolve("HTTPS://trainer.example:443/") == "trainer.example:443"
    for wrong in ("http://trainer.example", "https://trainer.example/path", "https://", "https:///"):
        with pytest.raises(ValueError):
            resolve(wrong)
    assert not Access.find("trainer.example").tls
    assert Access.find("trainer.example", tls=True).tls
    assert Access.find("https://trainer.example").tls
    with pytest.raises(ValueError, match="forbids"):
        Access.find("https://trainer.example", tls=False)
    monkeypatch.setenv("LUTHIER_ENDPOINT", "https://trainer.example:7")
    assert (Access.find().target, Access.find().tls) == ("trainer.example:7", True)
    broken = tmp_path / "ca.pem"
    broken.write_text("-----BEGIN NOTHING-----\n")
    for source in (broken, str(broken), b"", b"nonsense"):
        with pytest.raises(ValueError, match="no certificate"):
            Client("trainer.example", tls_ca=source)
    monkeypatch.setenv("LUTHIER_TLS_CA", str(tmp_path / "missing.pem"))
    with pytest.raises(FileNotFoundError):
        Client("trainer.example")
    assert not Access.find("trainer.example", tls=False).tls


async def test_tls_towards_a_server_without_it_is_an_error_that_says_so_and_is_not_tried_again(endpoint: str) -> None:
    with Client(endpoint, tls=True) as client, pytest.raises(errors.TlsFailed, match="does not speak TLS") as caught:
        client.get_job("job_x")
    assert caught.value.reason == "NO_TLS" and caught.value.hint
    async with AsyncClient(f"https://{endpoint}") as other:
        with pytest.raises(errors.TlsFailed):
            await other.list_jobs().__anext__()


def test_the_command_takes_the_token_from_a_file_or_the_environment(guarded: FakeServer, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    server = guarded.endpoint
    alone = run("job", "list", endpoint=server)
    assert alone.returncode == 1
    assert alone.stderr.startswith("error: a token is wanted\nhint: give the token")
    for arguments in (["--token-file", str(file), "job", "list"], ["job", "list", "--token-file", str(file)]):
        assert run(*arguments, endpoint=server).returncode == 0
    assert run("job", "list", endpoint=server, LUTHIER_TOKEN=TOKEN).returncode == 0
    assert run("job", "list", endpoint=server, LUTHIER_TOKEN_FILE=str(file)).returncode == 0
    watched = run("job", "create", "--watch", "-f", job_file(tmp_path), endpoint=server, LUTHIER_TOKEN=TOKEN)
    assert watched.returncode == 0 and TOKEN not in watched.stdout + watched.stderr
    abroad = run("job", "list", "--token-file", str(file), endpoint="10.0.0.1")
    assert abroad.returncode == 2 and "in clear text" in abroad.stderr and TOKEN not in abroad.stderr
    assert run("job", "list", "--token-file", str(tmp_path / "none"), endpoint=server).returncode == 2
    plain = run("--tls", "job", "list", endpoint=server)
    assert plain.returncode == 1
    assert plain.stderr.startswith("error: the server at 127.0.0.1") and "does not speak TLS" in plain.stderr
    assert len(plain.stderr.splitlines()) == 2
