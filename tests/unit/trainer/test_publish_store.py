"""Copies in object stores: S3 (a real server of its API, by moto), and Google Cloud Storage and Azure as stubs."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import unquote

import pytest
from unit.trainer.fetches import Answer, send, web
from unit.trainer.publishing import KEY, PART, S3, SECRET, Attempt, breaking, export, killed_on_the_way, s3_server

from luthier_trainer.errors import TrainingError
from luthier_trainer.export.publish import credentials, store
from luthier_trainer.stop import StopRequested

SMALL_PARTS = f"from luthier_trainer.export.publish import store; store.PART_BYTES = {PART}"


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with s3_server() as server:
        yield server


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PART_BYTES", PART)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def test_all_bytes_arrive_and_the_manifest_comes_last(tmp_path: Path, s3: S3) -> None:
    copied = export(tmp_path / "export")
    attempt = Attempt(copied, s3.secret())
    assert attempt.to("s3://models/team/bot/") == "s3://models/team/bot"
    found = s3.below("team/bot")
    manifest = json.loads(found["manifest.json"])
    assert set(found) == {file.path for file in copied.files} | {"manifest.json"}, "the claim is gone"
    assert all(found[file.path] == copied.bytes_of(file.path) for file in copied.files)
    assert manifest["export"] == "export_1"
    assert manifest["files"]["model.safetensors"] == {
        "size_bytes": 2 * PART + 1000,
        "sha256": hashlib.sha256(found["model.safetensors"]).hexdigest(),
    }
    head = s3.client.head_object(Bucket="models", Key="team/bot/model.safetensors", ChecksumMode="ENABLED")
    assert head["ChecksumSHA256"], "the store was given a checksum of each part"
    assert head["ETag"].endswith('-3"')
    assert s3.uploads() == []
    assert attempt.told[-1] == (copied.size, copied.size)
    assert [done for done, _ in attempt.told] == sorted(done for done, _ in attempt.told)


def test_a_process_that_is_killed_leaves_no_manifest_and_the_next_attempt_sends_the_rest(
    tmp_path: Path, s3: S3
) -> None:
    copied = export(tmp_path / "export")
    killed_on_the_way(copied, "s3://models/killed", s3.secret(), (), moment=6, setup=SMALL_PARTS)
    left = s3.below("killed")
    assert "manifest.json" not in left
    assert "model.safetensors" not in left, "an object is there whole or not at all"
    assert set(left) == {".luthier-publishing.json", "README.md", "luthier.json"}
    before = s3.client.head_object(Bucket="models", Key="killed/README.md")["LastModified"]
    assert Attempt(copied, s3.secret()).to("s3://models/killed") == "s3://models/killed"
    found = s3.below("killed")
    assert all(found[file.path] == copied.bytes_of(file.path) for file in copied.files)
    assert "manifest.json" in found and ".luthier-publishing.json" not in found
    assert s3.client.head_object(Bucket="models", Key="killed/README.md")["LastModified"] == before, "not sent again"
    for each in s3.client.list_multipart_uploads(Bucket="models").get("Uploads", []):  # what no process can tidy up
        s3.client.abort_multipart_upload(Bucket="models", Key=each["Key"], UploadId=each["UploadId"])


def test_a_leftover_with_other_bytes_of_the_same_size_is_sent_again(tmp_path: Path, s3: S3) -> None:
    copied = export(tmp_path / "export")
    stopped = Attempt(copied, s3.secret(), stop_after=9)
    with pytest.raises(StopRequested):
        stopped.to("s3://models/leftover")
    s3.client.put_object(Bucket="models", Key="leftover/README.md", Body=b"?" * copied.files[0].size_bytes)
    Attempt(copied, s3.secret()).to("s3://models/leftover")
    assert s3.below("leftover")["README.md"] == copied.bytes_of("README.md")


def test_until_every_other_file_was_verified_there_is_no_manifest(tmp_path: Path, s3: S3) -> None:
    copied = export(tmp_path / "export", weights=10)
    whole = Attempt(copied, s3.secret())
    whole.to("s3://models/whole")
    for stop_after in range(whole.checks):
        with pytest.raises(StopRequested):
            Attempt(copied, s3.secret(), stop_after=stop_after).to(f"s3://models/stop-{stop_after}")
        left = s3.below(f"stop-{stop_after}")
        assert "manifest.json" not in left and ".luthier-publishing.json" in left
    assert len(left) == len(copied.files) + 1


def test_a_stop_in_the_middle_of_an_object_aborts_its_upload(tmp_path: Path, s3: S3) -> None:
    copied = export(tmp_path / "export", weights=4 * PART)
    for stop_after in range(3, 9):
        attempt = Attempt(copied, s3.secret(), stop_after=stop_after)
        with pytest.raises(StopRequested):
            attempt.to("s3://models/stopped")
        assert s3.uploads() == []
        assert "manifest.json" not in s3.below("stopped")


def test_a_store_that_breaks_every_connection_gets_no_manifest_and_later_the_whole_export(
    tmp_path: Path, s3: S3
) -> None:
    copied = export(tmp_path / "export")
    with breaking(s3.port) as relay:
        relay.limit = 2_000_000
        error = Attempt(copied, s3.secret(relay.port)).refused("s3://models/broken")
        assert (error.reason, error.retryable) == ("DESTINATION_FAILED", True)
        assert relay.broken > 1, "the library tries again by itself first"
        assert "manifest.json" not in s3.below("broken")
        assert s3.uploads() == []
        relay.limit = 1 << 60
        Attempt(copied, s3.secret(relay.port)).to("s3://models/broken")
    assert s3.below("broken")["model.safetensors"] == copied.bytes_of("model.safetensors")


def test_a_connection_that_breaks_once_costs_nothing_but_time(tmp_path: Path, s3: S3) -> None:
    copied = export(tmp_path / "export")
    with breaking(s3.port) as relay:
        relay.limit, relay.times = 2_000_000, 2
        Attempt(copied, s3.secret(relay.port)).to("s3://models/once")
        assert relay.broken == 2
    assert s3.below("once")["model.safetensors"] == copied.bytes_of("model.safetensors")


def test_a_prefix_of_another_export_or_of_something_else_is_left_as_it_is(tmp_path: Path, s3: S3) -> None:
    first, second = export(tmp_path / "1"), export(tmp_path / "2", "export_2", weights=PART, seed=1)
    Attempt(first, s3.secret()).to("s3://models/taken")
    before = s3.below("taken")
    error = Attempt(second, s3.secret()).refused("s3://models/taken")
    assert (error.reason, error.retryable) == ("DESTINATION_FAILED", False)
    assert "another export" in error.message
    with pytest.raises(StopRequested):
        Attempt(first, s3.secret(), stop_after=3).to("s3://models/claimed")
    assert "another export, on its way" in Attempt(second, s3.secret()).refused("s3://models/claimed").message
    s3.client.put_object(Bucket="models", Key="mine/thesis.txt", Body=b"mine")
    assert "something else" in Attempt(first, s3.secret()).refused("s3://models/mine").message
    assert s3.below("taken") == before
    assert s3.below("mine") == {"thesis.txt": b"mine"}
    Attempt(first, s3.secret()).to("s3://models/min")  # a neighbour whose name begins alike


def test_the_same_export_is_copied_twice_without_sending_it_and_mended_where_it_is_damaged(
    tmp_path: Path, s3: S3
) -> None:
    copied = export(tmp_path / "export")
    Attempt(copied, s3.secret()).to("s3://models/again")
    sent = {
        key: each for key in s3.below("again") if (each := s3.client.head_object(Bucket="models", Key=f"again/{key}"))
    }
    again = Attempt(copied, s3.secret())
    assert again.to("s3://models/again") == "s3://models/again"
    assert again.told[-1] == (copied.size, copied.size)
    for key, head in sent.items():
        assert s3.client.head_object(Bucket="models", Key=f"again/{key}")["LastModified"] == head["LastModified"]
    s3.client.delete_object(Bucket="models", Key="again/model.safetensors")
    with pytest.raises(StopRequested):
        Attempt(copied, s3.secret(), stop_after=8).to("s3://models/again")
    assert "manifest.json" not in s3.below("again"), "a copy that is being mended does not look complete"
    Attempt(copied, s3.secret()).to("s3://models/again")
    assert s3.below("again")["model.safetensors"] == copied.bytes_of("model.safetensors")


def test_a_file_that_changed_since_it_was_proven_is_not_copied(tmp_path: Path, s3: S3) -> None:
    copied = export(tmp_path / "export")
    (copied.folder / "model.safetensors").write_bytes(b"\0" * (2 * PART + 1000))
    error = Attempt(copied, s3.secret()).refused("s3://models/changed")
    assert "model.safetensors changed" in error.message
    assert not {"manifest.json", "model.safetensors"} & set(s3.below("changed"))
    assert s3.uploads() == []


def test_credentials_of_the_environment_are_never_used(tmp_path: Path, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = export(tmp_path / "export", weights=10)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "operators")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "operators-session")
    with web() as site:
        said = f"<Error><Code>InvalidAccessKeyId</Code><AWSAccessKeyId>{KEY}</AWSAccessKeyId></Error>"
        site.default = send(said.encode(), 403)  # as S3 does: the key is repeated
        monkeypatch.setenv("AWS_ENDPOINT_URL", site.url)
        secret = json.dumps({"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET})
        error = Attempt(copied, secret).refused("s3://models/a")
        headers = [dict(each) for _, each in site.requests]
    assert "'store' may not write" in error.message and not error.retryable
    assert headers and "operators" not in str(headers), "the endpoint is the environment's, the credentials are not"
    assert KEY in str(headers)
    assert "no secret" in Attempt(copied).refused("s3://models/a").message


@pytest.mark.parametrize(
    ("secret", "said"),
    [
        ("", "names no secret"), ("   ", "'store' is empty"), (SECRET, "JSON object of AWS_"), ("{}", "no credentials"),
        (json.dumps({"AWS_REGION": "eu"}), "no credentials"), (json.dumps([SECRET]), "JSON object"),
        (json.dumps({"AWS_ACCESS_KEY_ID": KEY, SECRET: "x"}), "JSON object"),
        (json.dumps({"AWS_ACCESS_KEY_ID": 1}), "JSON object"),
        (json.dumps({"AZURE_STORAGE_ACCOUNT_KEY": SECRET}), "JSON object"),
    ],
)  # fmt: skip
def test_a_secret_that_holds_no_credentials_is_named_and_not_repeated(secret: str, said: str, tmp_path: Path) -> None:
    error = Attempt(export(tmp_path / "export", weights=10), secret).refused("s3://models/a")
    assert error.reason == "DESTINATION_FAILED" and said in error.message


def test_a_service_accounts_own_key_is_a_secret_for_google_alone() -> None:
    key = json.dumps({"type": "service_account", "private_key": SECRET, "client_email": "us@project"})
    assert credentials.variables("gs", key, "store") == {"GOOGLE_SERVICE_ACCOUNT_KEY": key}
    with pytest.raises(TrainingError) as error:
        credentials.variables("s3", key, "store")
    assert SECRET not in str(error.value)


def test_what_is_wrong_is_told_apart_and_no_log_holds_the_secret(
    tmp_path: Path, s3: S3, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    copied = export(tmp_path / "export", weights=10)
    with caplog.at_level(logging.DEBUG):
        missing = Attempt(copied, s3.secret()).refused("s3://nothing-here/a")
        down = Attempt(copied, s3.secret(port=1)).refused("s3://models/a")
        Attempt(copied, s3.secret()).to("s3://models/logged")
    assert "no bucket s3://nothing-here" in missing.message and not missing.retryable
    assert "did not answer" in down.message and down.retryable
    printed = capfd.readouterr()
    logged = caplog.text + printed.out + printed.err
    assert SECRET not in logged and KEY not in logged
    assert all(SECRET.encode() not in data and KEY.encode() not in data for data in s3.below("logged").values())


def opaque(objects: dict[str, bytes], damage: dict[str, bytes]) -> Answer:
    """A store whose ETags say nothing, as far as Google's and Azure's are alike. damage: what it keeps of a file in
    place of its bytes."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        path, _, query = handler.path.partition("?")
        path = unquote(path)
        data = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        known = {"ETag": '"0x8D"', "Last-Modified": "Wed, 21 Oct 2026 07:28:00 GMT", "x-goog-generation": "1"}
        if handler.command == "PUT":
            objects[path] = damage.get(path.rpartition("/")[2], data)
            send(b"", 201, known)(handler)
        elif handler.command == "DELETE":
            objects.pop(path)
            send(b"", 204)(handler)
        elif "comp=list" in query:
            send(b"<EnumerationResults><Blobs></Blobs></EnumerationResults>")(handler)
        elif "list-type" in query:
            send(b"<ListBucketResult></ListBucketResult>")(handler)
        elif path in objects:
            send(objects[path], 200, known)(handler)
        else:
            send(b"", 404)(handler)

    return answer


@pytest.mark.parametrize(
    ("scheme", "variables"),
    [
        ("gs", {"GOOGLE_BASE_URL": "", "GOOGLE_BEARER_TOKEN": SECRET}),
        ("az", {"AZURE_ENDPOINT": "", "AZURE_STORAGE_ACCOUNT_NAME": "us", "AZURE_STORAGE_ACCOUNT_KEY": "aHVudGVyMg=="}),
    ],
)
def test_a_store_whose_etags_say_nothing_is_read_back(
    scheme: str, variables: Mapping[str, str], tmp_path: Path
) -> None:
    copied = export(tmp_path / "export", weights=1000)
    objects: dict[str, bytes] = {}
    damage = {"tokenizer.json": b'{"version": "1.1"}'}
    with web(methods=("PUT", "DELETE")) as site:
        site.default = opaque(objects, damage)
        secret = json.dumps({name: value or site.url for name, value in variables.items()})
        error = Attempt(copied, secret).refused(f"{scheme}://models/bot")
        assert "tokenizer.json is not what was sent" in error.message and error.retryable
        assert "/models/bot/manifest.json" not in objects
        damage.clear()
        assert Attempt(copied, secret).to(f"{scheme}://models/bot") == f"{scheme}://models/bot"
    assert all(objects[f"/models/bot/{file.path}"] == copied.bytes_of(file.path) for file in copied.files)
    assert json.loads(objects["/models/bot/manifest.json"])["export"] == "export_1"
