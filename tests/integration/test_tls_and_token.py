"""TLS and tokens with a real luthierd: who gets in, what is read again without a restart, what is never written."""

import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import Authority, Pair
from daemon import ROWS, Daemon, dense, details, puppet, reason, small
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from luthier.v1 import datasets_pb2 as ds
from luthier.v1 import datasets_pb2_grpc, fine_tuning_pb2_grpc, models_pb2_grpc
from luthier.v1 import fine_tuning_pb2 as ft
from luthier.v1 import models_pb2 as md
from luthier.v1.job_pb2 import Checkpoints
from luthier_client import AsyncClient, Client, TlsFailed, Unauthenticated, Unavailable, WatchOptions
from luthier_server.logs import redact
from luthier_server.settings import SettingsError, read

Start = Callable[..., Daemon]
TOKEN, OTHER, WRONG = "alpha-7f3a91c2d4e5", "beta-0b1c2d3e4f56", "gamma-99aabbccddee"
UNSHARED = [("grpc.use_local_subchannel_pool", 1)]
SLOW = puppet(steps=400, step_seconds=0.05)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority") / "ca")


@pytest.fixture
def served(authority: Authority, tmp_path: Path) -> Pair:
    """The files that a server is started with, which the test may replace."""
    made = authority.sign("first")
    pair = Pair(tmp_path / "server.pem", tmp_path / "server.key")
    shutil.copy(made.certificate, pair.certificate)
    shutil.copy(made.key, pair.key)
    return pair


def token_file(folder: Path, *tokens: str) -> Path:
    path = folder / "tokens"
    path.touch(mode=0o600)
    path.write_text("# who may call\n\n" + "".join(f"{token}\n" for token in tokens))
    return path


def flags(pair: Pair, tokens: Path) -> list[str]:
    return ["--tls-cert", str(pair.certificate), "--tls-key", str(pair.key), "--token-file", str(tokens)]


def credentials(authority: Authority, token: str = "") -> grpc.ChannelCredentials:
    trusted = grpc.ssl_channel_credentials(authority.certificate.read_bytes())
    return grpc.composite_channel_credentials(trusted, grpc.access_token_call_credentials(token)) if token else trusted


def shown(address: str) -> str:
    """The certificate that a new connection is shown, as PEM."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=5) as plain, context.wrap_socket(plain) as secure:
        return ssl.DER_cert_to_PEM_cert(secure.getpeercert(binary_form=True) or b"")


def pem(pair: Pair) -> str:
    return pair.certificate.read_text()


def health(daemon: Daemon, *more: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "luthier_server.main", "health", "--listen", daemon.address, *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


def calls(channel: grpc.Channel) -> dict[str, Callable[[], Any]]:
    """One call of each shape, and reflection."""
    jobs = fine_tuning_pb2_grpc.FineTuningStub(channel)
    datasets = datasets_pb2_grpc.DatasetsStub(channel)
    models = models_pb2_grpc.ModelsStub(channel)
    reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    unknown: Any = channel.unary_unary("/luthier.v1.FineTuning/NoSuchMethod")

    def upload() -> Iterator[ds.UploadDatasetRequest]:
        yield ds.UploadDatasetRequest(metadata=ds.DatasetMetadata(name="rows"))
        for _ in range(200):
            yield ds.UploadDatasetRequest(chunk=ROWS * 20)

    def silence() -> Iterator[ds.UploadDatasetRequest]:
        time.sleep(3)
        yield from ()

    def ask() -> Iterator[reflection_pb2.ServerReflectionRequest]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")

    return {
        "unary": lambda: jobs.ListJobs(ft.ListJobsRequest(), timeout=10),
        "server stream": lambda: list(jobs.WatchJob(ft.WatchJobRequest(job_id="job_x"), timeout=10)),
        "download": lambda: list(models.DownloadModel(md.DownloadModelRequest(model_id="model_x"), timeout=10)),
        "upload": lambda: datasets.UploadDataset(upload(), timeout=10),
        "upload that does not begin": lambda: datasets.UploadDataset(silence(), timeout=2),
        "reflection": lambda: list(reflection.ServerReflectionInfo(ask(), timeout=10)),
        "no such method": lambda: unknown(b"", timeout=10),
    }


def outcome(call: Callable[[], Any]) -> tuple[str, str]:
    """The status of a call and its reason."""
    try:
        call()
    except grpc.RpcError as error:
        return error.code().name, reason(error) if details(error) else ""
    return "OK", ""


def test_only_the_right_token_opens_calls_of_every_shape_and_health_needs_none(
    daemons: Start, authority: Authority, served: Pair, tmp_path: Path
) -> None:
    tokens = token_file(tmp_path, OTHER, TOKEN)
    daemon = daemons(*puppet(), *flags(served, tokens), credentials=credentials(authority, TOKEN))
    with grpc.secure_channel(daemon.address, credentials(authority)) as channel:
        answers = {name: outcome(call) for name, call in calls(channel).items()}
        assert answers == dict.fromkeys(answers, ("UNAUTHENTICATED", "UNAUTHENTICATED"))
        stub: Any = health_pb2_grpc.HealthStub(channel)
        assert stub.Check(health_pb2.HealthCheckRequest(), timeout=5).status == 1
        watching = stub.Watch(health_pb2.HealthCheckRequest(service="luthier.v1.FineTuning"), timeout=5)
        assert next(watching).status == 1
        watching.cancel()
        jobs = fine_tuning_pb2_grpc.FineTuningStub(channel)

        def listed(*headers: str) -> tuple[str, str]:
            metadata = tuple(("authorization", header) for header in headers)
            return outcome(partial(jobs.ListJobs, ft.ListJobsRequest(), metadata=metadata))

        for wrong in (TOKEN, f"Basic {TOKEN}", "Bearer ", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}"):
            assert listed(wrong) == ("UNAUTHENTICATED", "BAD_TOKEN"), wrong
        assert listed(f"Bearer {TOKEN}", f"Bearer {TOKEN}") == ("UNAUTHENTICATED", "BAD_TOKEN")
        assert listed(f"bearer {OTHER}") == ("OK", "")
    with grpc.secure_channel(daemon.address, credentials(authority, WRONG)) as channel:
        answers = {name: outcome(call) for name, call in calls(channel).items()}
        assert answers == dict.fromkeys(answers, ("UNAUTHENTICATED", "BAD_TOKEN"))
    answers = {name: outcome(call) for name, call in calls(daemon.channel).items()}
    assert {name: code for name, (code, _) in answers.items()} == {
        "unary": "OK",
        "server stream": "NOT_FOUND",
        "download": "NOT_FOUND",
        "upload": "OK",
        "upload that does not begin": "DEADLINE_EXCEEDED",
        "reflection": "OK",
        "no such method": "UNIMPLEMENTED",
    }
    assert daemon.wait(daemon.create().id).model_id
    # Nothing that it keeps or says holds a token.
    assert daemon.stop() == 0
    written = b"".join(path.read_bytes() for path in daemon.data_dir.rglob("*") if path.is_file())
    assert b"BAD_TOKEN" in written
    for token in (TOKEN, OTHER, WRONG):
        assert token.encode() not in written


def test_the_client_goes_through_tls_with_its_token_and_says_what_is_wrong_without(
    daemons: Start, authority: Authority, served: Pair, tmp_path: Path
) -> None:
    daemon = daemons(*puppet(), *flags(served, token_file(tmp_path, TOKEN)), credentials=credentials(authority, TOKEN))
    ca = authority.certificate
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(ROWS)
    with Client(f"https://{daemon.address}", token=TOKEN, tls_ca=ca) as client:
        client.upload_dataset(rows)
        job = client.create_job(small(checkpoints=Checkpoints(every_steps=10, keep=10)))
        assert dense(list(job.watch()))
        client.download_model(job.refresh().model_id, tmp_path / "model")
        assert job.checkpoints()
    stranger = Authority(tmp_path / "stranger")
    for trusted, reason_ in ((None, "CERTIFICATE_NOT_TRUSTED"), (stranger.certificate, "CERTIFICATE_NOT_TRUSTED")):
        began = time.monotonic()
        with (
            Client(daemon.address, token=TOKEN, tls=True, tls_ca=trusted) as client,
            pytest.raises(TlsFailed, match=r"is not trusted: .*issuer") as failed,
        ):
            client.get_job(job.id)
        assert (failed.value.reason, "tls_ca" in failed.value.hint) == (reason_, True)
        assert time.monotonic() - began < 5
    with Client(daemon.address, token="not-" + TOKEN, tls_ca=ca) as client, pytest.raises(Unauthenticated) as refused:
        client.get_job(job.id)
    assert refused.value.reason == "BAD_TOKEN" and TOKEN not in str(vars(refused.value))
    with Client(daemon.address) as client, pytest.raises(Unavailable, match="if it speaks TLS, name it as https://"):
        client.get_job(job.id)


def test_a_certificate_for_another_name_is_refused(daemons: Start, authority: Authority, tmp_path: Path) -> None:
    pair = authority.sign("elsewhere", "DNS:elsewhere.example")
    daemon = daemons(
        *puppet(),
        *flags(pair, token_file(tmp_path, TOKEN)),
        credentials=credentials(authority),
        channel_options=[("grpc.ssl_target_name_override", "elsewhere.example")],
    )
    client = Client(daemon.address, token=TOKEN, tls_ca=authority.certificate)
    with client, pytest.raises(TlsFailed) as failed:
        client.get_job("job_x")
    assert failed.value.reason == "CERTIFICATE_OF_ANOTHER_NAME"
    # The health command goes to an address of this machine, which no certificate needs to name.
    assert health(daemon, *flags(pair, tmp_path / "tokens")).stdout == f"{daemon.address}: SERVING\n"


async def test_a_watch_goes_on_over_tls_after_the_server_was_killed(
    daemons: Start, authority: Authority, served: Pair, tmp_path: Path
) -> None:
    protected = flags(served, token_file(tmp_path, TOKEN))
    daemon = daemons(*puppet(steps=60, step_seconds=0.05), *protected, credentials=credentials(authority, TOKEN))
    daemon.flags = [*daemon.flags, "--listen", daemon.address]
    daemon.upload()
    tries: list[str] = []
    options = WatchOptions(None, lambda _, error: tries.append(error.reason), first_pause=0.02, longest_pause=0.2)
    async with AsyncClient(f"https://{daemon.address}", token=TOKEN, tls_ca=authority.certificate) as client:
        job = await client.create_job(small())
        seen = []
        async for event in job.watch(options=options):
            seen.append(event)
            if event.step_completed.step in (10, 30):
                daemon.kill()
                daemon.start()
    assert tries and dense(seen)
    assert [event.step_completed.step for event in seen if event.HasField("step_completed")] == list(range(1, 61))
    assert seen[-1].state_changed.model_id


def test_a_renewed_certificate_is_shown_without_a_restart_and_a_broken_one_never(
    daemons: Start, authority: Authority, served: Pair, tmp_path: Path
) -> None:
    daemon = daemons(*SLOW, *flags(served, token_file(tmp_path, TOKEN)), credentials=credentials(authority, TOKEN))
    daemon.upload()
    job = daemon.create()
    watch = daemon.fine_tuning.WatchJob(ft.WatchJobRequest(job_id=job.id))
    next(watch)
    first, second = pem(served), authority.sign("second")
    assert shown(daemon.address) == first
    # The certificate comes before its key: until both are there, the old pair is shown.
    shutil.copy(second.certificate, served.certificate)
    assert [shown(daemon.address) for _ in range(3)] == [first] * 3
    assert health(daemon, *flags(served, tmp_path / "tokens")).returncode == 0
    shutil.copy(second.key, served.key)
    assert shown(daemon.address) == pem(second)
    for path, content in (
        (served.certificate, "no certificate"),
        (served.key, ""),
        (served.certificate, first),
    ):
        path.write_text(content)
        assert shown(daemon.address) == pem(second)
    served.key.unlink()
    assert shown(daemon.address) == pem(second)
    third = authority.sign("third")
    os.replace(third.certificate, served.certificate)
    os.replace(third.key, served.key)
    with grpc.secure_channel(daemon.address, credentials(authority, TOKEN), UNSHARED) as channel:
        stub = fine_tuning_pb2_grpc.FineTuningStub(channel)
        assert stub.GetJob(ft.GetJobRequest(job_id=job.id), timeout=5).job.id == job.id
    assert shown(daemon.address) == served.certificate.read_text()
    assert daemon.process.poll() is None
    assert next(watch).events
    watch.cancel()
    log = daemon.log()
    assert log.count("the certificate was changed and cannot be used") == 5
    assert log.count("certificate read again") == 2
    assert "PRIVATE KEY" not in log


def test_a_token_is_added_and_taken_back_without_a_restart(
    daemons: Start, authority: Authority, served: Pair, tmp_path: Path
) -> None:
    tokens = token_file(tmp_path, TOKEN)
    daemon = daemons(*puppet(), *flags(served, tokens), credentials=credentials(authority, TOKEN))

    def answer(token: str) -> str:
        with grpc.secure_channel(daemon.address, credentials(authority, token), UNSHARED) as channel:
            stub = fine_tuning_pb2_grpc.FineTuningStub(channel)
            return outcome(lambda: stub.ListJobs(ft.ListJobsRequest(), timeout=5))[0]

    assert (answer(TOKEN), answer(OTHER)) == ("OK", "UNAUTHENTICATED")
    token_file(tmp_path, TOKEN, OTHER)
    assert (answer(TOKEN), answer(OTHER)) == ("OK", "OK")
    token_file(tmp_path, OTHER)
    assert (answer(TOKEN), answer(OTHER)) == ("UNAUTHENTICATED", "OK")
    # A file that cannot be used is said, and changes nothing.
    for content, mode in (("# none\n", 0o600), (f"{TOKEN}\n", 0o644), ("has a space\n", 0o600), ("\udcff", 0o600)):
        tokens.write_bytes(content.encode(errors="surrogateescape"))
        tokens.chmod(mode)
        assert (answer(TOKEN), answer(OTHER)) == ("UNAUTHENTICATED", "OK")
    tokens.unlink()
    assert (answer(TOKEN), answer(OTHER)) == ("UNAUTHENTICATED", "OK")
    assert daemon.log().count("the token file was changed and cannot be used") >= 5
    token_file(tmp_path, TOKEN)
    assert (answer(TOKEN), answer(OTHER)) == ("OK", "UNAUTHENTICATED")


def test_the_health_command_speaks_tls_and_needs_no_token(
    daemons: Start, authority: Authority, served: Pair, tmp_path: Path
) -> None:
    tokens = token_file(tmp_path, TOKEN)
    daemon = daemons(*puppet(), *flags(served, tokens), credentials=credentials(authority, TOKEN))
    protected = flags(served, tokens)
    assert health(daemon, *protected).stdout == f"{daemon.address}: SERVING\n"
    assert health(daemon, *protected, "--tls-ca", str(authority.certificate)).returncode == 0
    stranger = Authority(tmp_path / "stranger").certificate
    wrong = health(daemon, *protected, "--tls-ca", str(stranger))
    assert wrong.returncode == 1 and "TLS failed: unable to get local issuer certificate" in wrong.stderr
    assert health(daemon).returncode == 1
    daemon.stop()
    gone = health(daemon, *protected)
    assert gone.returncode == 1 and "Connection refused" in gone.stderr


def test_tokens_alone_serve_on_loopback_without_tls(daemons: Start, tmp_path: Path) -> None:
    daemon = daemons(*puppet(), "--token-file", str(token_file(tmp_path, TOKEN)))
    assert outcome(lambda: daemon.fine_tuning.ListJobs(ft.ListJobsRequest()))[1] == "UNAUTHENTICATED"
    with Client(daemon.address, token=TOKEN) as client:
        client.upload_dataset(ROWS, name="rows")
        assert dense(list(client.create_job(small()).watch()))
    assert health(daemon).returncode == 0


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [
        ("", 0o600, "holds no token"),
        ("# only this\n\n", 0o600, "holds no token"),
        ("secret-token\n", 0o644, "chmod 600"),
        ("secret-token\n", 0o604, "chmod 600"),
        ("secret-token\n", 0o620, "chmod 600"),
        ("secret-token and more\n", 0o600, "line 1"),
        (None, 0o600, "No such file"),
    ],
)
def test_a_token_file_that_cannot_be_used_ends_the_start_with_words(
    tmp_path: Path, content: str | None, mode: int, words: str
) -> None:
    path = tmp_path / "tokens"
    if content is not None:
        path.write_text(content)
        path.chmod(mode)
    started = start(tmp_path, "--token-file", str(path))
    assert started.returncode == 2
    assert started.stderr.startswith("luthierd: ") and words in started.stderr
    assert "secret-token" not in started.stderr and "Traceback" not in started.stderr


def test_a_certificate_that_cannot_be_used_ends_the_start_with_words(authority: Authority, tmp_path: Path) -> None:
    one, two = authority.sign("one"), authority.sign("two")
    locked = tmp_path / "locked.key"
    subprocess.run(
        ["openssl", "ec", "-in", one.key, "-aes256", "-passout", "pass:hidden", "-out", locked],
        check=True,
        capture_output=True,
    )
    for certificate, key, words in (
        (one.certificate, two.key, "are not a certificate and its key"),
        (one.key, one.key, "are not a certificate and its key"),
        (one.certificate, locked, "without a password"),
        (tmp_path / "none.pem", one.key, "none.pem cannot be read: No such file"),
    ):
        started = start(tmp_path, "--tls-cert", str(certificate), "--tls-key", str(key))
        assert started.returncode == 2 and words in started.stderr, started.stderr
        assert "Traceback" not in started.stderr


@pytest.mark.parametrize(
    "listen",
    ["0.0.0.0:1", "[::]:1", ":1", "10.0.0.1:1", "trainer.example:1", "localhost.example:1", "127.0.0.1.other:1"],
)
def test_an_address_that_others_reach_needs_both_tls_and_tokens(listen: str) -> None:
    tls, tokens = ["--tls-cert", "c.pem", "--tls-key", "c.key"], ["--token-file", "tokens"]
    for half in ([], tls, tokens):
        with pytest.raises(SettingsError, match="--tls-cert, --tls-key and --token-file"):
            read(["--listen", listen, *half], {})
        assert read(["--listen", listen, *half, "--insecure-bind"], {}).insecure_bind
    assert not read(["--listen", listen, *tls, *tokens], {}).insecure_bind
    for lone in (tls[:2], tls[2:]):
        with pytest.raises(SettingsError, match="belong together"):
            read(lone, {})
    assert read([], {"LUTHIER_TOKEN_FILE": "/run/tokens"}).token_file == Path("/run/tokens")


def test_a_token_in_a_text_that_somebody_else_wrote_does_not_reach_the_log() -> None:
    event = redact(None, "error", {"exception": f"metadata: authorization: Bearer {TOKEN}, next", "count": 3})
    assert event == {"exception": "metadata: authorization: Bearer [redacted], next", "count": 3}


def start(folder: Path, *more: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "luthier_server.main", "--listen", "127.0.0.1:0", "--warm", "off"]
    command += ["--data-dir", str(folder / "data"), *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL)
