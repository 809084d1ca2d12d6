"""Objects of S3 (a real server of its API, by moto) and of Google Cloud Storage (as far as a stub of it goes)."""

import warnings
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from unit.trainer.fetches import Outcome, fetch, send, web

from luthier_trainer.data.fetching import objects
from luthier_trainer.data.fetching.output import Output
from luthier_trainer.data.fetching.request import FetchError, Request

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    moto_server = pytest.importorskip("moto.server")
    import boto3  # type: ignore[import-untyped]

BODY = b'{"text": "hello"}\n' * 200_000


@pytest.fixture(scope="module")
def s3() -> Iterator[Mapping[str, str]]:
    """An S3 server with a bucket of objects; the environment that leads to it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        client: Any = boto3.client(
            "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="id", aws_secret_access_key="key"
        )
        for bucket in ("sets", "other"):
            client.create_bucket(Bucket=bucket)
        for key in ("train.jsonl", "team/train.jsonl", "teams/train.jsonl", "team/a b#c?d%20é.jsonl"):
            client.put_object(Bucket="sets", Key=key, Body=BODY)
        client.put_object(Bucket="other", Key="train.jsonl", Body=b"secret")
        client.close()
    yield {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "key",
        "AWS_REGION": "us-east-1",
    }
    server.stop()


def from_s3(
    folder: Path, environment: Mapping[str, str], url: str, buckets: list[str], max_bytes: int = 1 << 30
) -> Outcome:
    request = {"url": url, "buckets": buckets, "max_bytes": max_bytes}
    return fetch(folder, request, environment={"HOME": str(folder), **environment})


def test_an_object_comes_whole_with_its_version(tmp_path: Path, s3: Mapping[str, str]) -> None:
    outcome = from_s3(tmp_path, s3, "s3://sets/team/train.jsonl", ["s3://sets"])
    assert outcome.content == BODY
    assert outcome.source.startswith("s3://sets/team/train.jsonl#etag=")
    assert len(outcome.source.partition("#etag=")[2]) == 32
    assert outcome.reports[0].progress.total == len(BODY)


def test_a_key_is_taken_as_it_stands(tmp_path: Path, s3: Mapping[str, str]) -> None:
    outcome = from_s3(tmp_path, s3, "s3://sets/team/a b#c?d%20é.jsonl", ["s3://sets/team"])
    assert outcome.content == BODY
    assert outcome.source.startswith("s3://sets/team/a%20b%23c%3Fd%2520%C3%A9.jsonl#etag=")


@pytest.mark.parametrize(
    ("url", "buckets"),
    [
        ("s3://other/train.jsonl", ["s3://sets"]), ("s3://sets/teams/train.jsonl", ["s3://sets/team"]),
        ("s3://sets/train.jsonl", ["s3://sets/team/"]), ("s3://sets/train.jsonl", ["gs://sets"]),
        ("s3://sets/train.jsonl", []), ("gs://sets/train.jsonl", ["s3://sets"]), ("s3://SETS/train.jsonl", ["s3://sets"]),
    ],
)  # fmt: skip
def test_only_listed_buckets_and_prefixes_are_read(url: str, buckets: list[str], tmp_path: Path) -> None:
    assert refused(url, buckets, tmp_path) == "BUCKET_NOT_ALLOWED"


@pytest.mark.parametrize(
    "url",
    [
        "s3://sets/team/../train.jsonl", "s3://sets/team//train.jsonl", "s3://sets/./train.jsonl", "s3://sets/team/",
        "s3://sets", "s3://", "s3:///train.jsonl", "s3://se%74s/train.jsonl", "s3://user@sets/a", "s3://sets:80/a",
        "s3://sets/a\nb",
    ],
)  # fmt: skip
def test_a_key_that_could_mean_another_one_is_refused(url: str, tmp_path: Path) -> None:
    assert refused(url, ["s3://sets/team", "s3://sets"], tmp_path) == "INVALID_URL"


def refused(url: str, buckets: list[str], folder: Path) -> str:
    with Output(folder / "fetched", 100) as output, pytest.raises(FetchError) as error:
        objects.fetch(url, Request(url, 100, buckets=tuple(buckets)), output, None)  # type: ignore[arg-type]
    return error.value.reason


def test_what_is_not_there_or_too_large_is_said(tmp_path: Path, s3: Mapping[str, str]) -> None:
    assert from_s3(tmp_path, s3, "s3://sets/nothing", ["s3://sets"]).failed.reason == "NOT_FOUND"
    assert from_s3(tmp_path, s3, "s3://nothing/a", ["s3://nothing"]).failed.reason == "NOT_FOUND"
    outcome = from_s3(tmp_path, s3, "s3://sets/train.jsonl", ["s3://sets"], max_bytes=len(BODY) - 1)
    assert outcome.failed.reason == "TOO_LARGE"
    assert outcome.content == b""


def test_credentials_that_do_not_suffice_are_the_operators_to_mend_and_not_told(tmp_path: Path) -> None:
    with web() as site:
        site.default = send(b"<Error><Code>AccessDenied</Code></Error>", 403)
        environment = {"AWS_ENDPOINT_URL": site.url, "AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "hunter2"}
        outcome = from_s3(tmp_path, environment, "s3://sets/a", ["s3://sets"])
    assert outcome.failed.reason == "NOT_PERMITTED"
    assert "hunter2" not in str(outcome.reports) + outcome.stderr


def test_a_transfer_from_a_store_that_breaks_off_goes_on(tmp_path: Path) -> None:
    broken = [True]

    def breaking(handler: BaseHTTPRequestHandler) -> None:
        start = 0
        if wanted := handler.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").split("-")[0])
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(BODY) - start))
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(BODY) - 1}/{len(BODY)}")
        handler.send_header("ETag", '"v1"')
        handler.send_header("Last-Modified", "Wed, 21 Oct 2026 07:28:00 GMT")
        handler.end_headers()
        if broken.pop() if broken else False:
            handler.wfile.write(BODY[:1_000_000])
            handler.close_connection = True
        else:
            handler.wfile.write(BODY[start:])

    with web() as site:
        site.default = breaking
        environment = {"AWS_ENDPOINT_URL": site.url, "AWS_SKIP_SIGNATURE": "true"}
        outcome = from_s3(tmp_path, environment, "s3://sets/a", ["s3://sets"])
    assert outcome.content == BODY
    assert len(site.requests) == 2


def test_an_object_of_google_cloud_storage_comes_whole(tmp_path: Path) -> None:
    with web() as site:
        site.default = send(BODY, headers={"ETag": '"g1"', "Last-Modified": "Wed, 21 Oct 2026 07:28:00 GMT"})
        environment = {"GOOGLE_BASE_URL": site.url, "GOOGLE_SKIP_SIGNATURE": "true", "HTTP_PROXY": "http://127.0.0.1:9"}
        outcome = from_s3(tmp_path, environment, "gs://sets/team/train.jsonl", ["gs://sets/team"])
        assert [path for path, _ in site.requests] == ["/sets/team%2Ftrain%2Ejsonl"]
    assert outcome.content == BODY
    assert outcome.source == "gs://sets/team/train.jsonl#etag=g1"
