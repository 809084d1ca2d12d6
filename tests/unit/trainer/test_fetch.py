"""The fetch worker as a process: what it says, what it leaves, when it ends."""

import hashlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from unit.trainer.fetches import Web, command, fetch, redirect, reports, send, web

from luthier_trainer.data.fetching.reports import Reports

BODY = b'{"text": "hello"}\n' * 1000


@pytest.fixture
def site() -> Iterator[Web]:
    with web() as started:
        yield started


def test_a_file_is_fetched_with_its_hash_checked(tmp_path: Path, site: Web) -> None:
    site.answers["/train.jsonl"] = send(BODY, headers={"ETag": '"abc"'})
    request = {"url": f"{site.url}/train.jsonl", "hosts": [site.url], "sha256": hashlib.sha256(BODY).hexdigest()}
    outcome = fetch(tmp_path, request)
    assert (outcome.code, outcome.stderr) == (0, "")
    assert outcome.source == f"{site.url}/train.jsonl#etag=abc"
    assert outcome.content == BODY
    assert [report.WhichOneof("part") for report in outcome.reports] == ["progress", "fetched"]
    assert outcome.reports[0].progress.total == len(BODY)
    assert outcome.path.stat().st_mode & 0o777 == 0o600


def test_a_file_with_another_hash_is_refused(tmp_path: Path, site: Web) -> None:
    site.answers["/a"] = send(BODY)
    outcome = fetch(tmp_path, {"url": f"{site.url}/a", "hosts": [site.url], "sha256": "0" * 64})
    assert (outcome.code, outcome.failed.reason) == (0, "HASH_MISMATCH")
    assert hashlib.sha256(BODY).hexdigest() in outcome.failed.message


def test_the_token_is_sent_and_never_told(tmp_path: Path, site: Web) -> None:
    site.answers["/a"] = send(b"", 403)
    outcome = fetch(tmp_path, {"url": f"{site.url}/a", "hosts": [site.url]}, token="hunter2")
    assert site.asked("/a")[0]["Authorization"] == "Bearer hunter2"
    assert outcome.failed.reason == "NOT_PERMITTED"
    assert "hunter2" not in str(outcome.reports) + outcome.stderr
    outcome = fetch(tmp_path, {"url": f"{site.url}/a", "hosts": [site.url]}, token="a\nX-Injected: b")
    assert outcome.failed.reason == "TOKEN_NOT_USABLE"
    assert len(site.requests) == 1


def test_proxies_of_the_environment_are_not_used(tmp_path: Path, site: Web) -> None:
    site.answers["/a"] = send(BODY)
    with web() as proxy:
        names = ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY")
        outcome = fetch(
            tmp_path, {"url": f"{site.url}/a", "hosts": [site.url]}, environment=dict.fromkeys(names, proxy.url)
        )
        assert outcome.content == BODY
        assert not proxy.requests


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://169.254.169.254/latest/meta-data/", "HOST_NOT_ALLOWED"), ("https://localhost/", "ADDRESS_NOT_ALLOWED"),
        ("ftp://files.example/a", "SCHEME_NOT_ALLOWED"), ("/etc/passwd", "SCHEME_NOT_ALLOWED"),
        ("", "SCHEME_NOT_ALLOWED"),
        ("file:///etc/passwd", "PATH_NOT_ALLOWED"), ("s3://bucket/key", "BUCKET_NOT_ALLOWED"),
        ("https://\ud800/", "INVALID_URL"),
    ],
)  # fmt: skip
def test_what_is_not_allowed_is_refused_with_a_reason_and_no_bytes(tmp_path: Path, url: str, reason: str) -> None:
    outcome = fetch(tmp_path, {"url": url, "hosts": ["localhost"]})
    assert (outcome.code, outcome.failed.reason) == (0, reason)
    assert outcome.content == b""


def test_an_output_that_is_a_link_is_not_followed(tmp_path: Path, site: Web) -> None:
    site.answers["/a"] = send(BODY)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "fetched").symlink_to(victim)
    fetch(tmp_path, {"url": f"{site.url}/a", "hosts": [site.url]})
    assert victim.read_text() == "precious"


def test_a_call_without_a_request_is_an_error_of_the_caller(tmp_path: Path) -> None:
    arguments = command(tmp_path, {})
    assert subprocess.run(arguments, capture_output=True).returncode == 2
    (tmp_path / "request.json").write_text("[]")
    assert subprocess.run(arguments, capture_output=True).returncode == 2
    assert subprocess.run(arguments[:-1], capture_output=True).returncode == 2


class Endless:
    """A body that never ends; sending says when it has begun."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.ended = threading.Event()

    def __call__(self, handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000000000")
        handler.end_headers()
        handler.wfile.write(b"x" * 1000)
        self.begun.set()
        self.ended.wait(30)
        handler.close_connection = True


@pytest.fixture
def endless(site: Web) -> Iterator[Endless]:
    answer = Endless()
    site.answers["/endless"] = answer
    yield answer
    answer.ended.set()


def started(folder: Path, request: Mapping[str, Any]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(command(folder, request), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def test_sigterm_ends_it_at_once_in_the_middle_of_a_stalled_transfer(
    tmp_path: Path, site: Web, endless: Endless
) -> None:
    with started(tmp_path, {"url": f"{site.url}/endless", "hosts": [site.url]}) as process:
        assert endless.begun.wait(30)
        process.send_signal(signal.SIGTERM)
        assert process.wait(2) == -signal.SIGTERM


def test_it_leaves_with_the_server_that_read_its_output(tmp_path: Path, site: Web, endless: Endless) -> None:
    with started(tmp_path, {"url": f"{site.url}/endless", "hosts": [site.url]}) as process:
        assert endless.begun.wait(30)
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(2) == 1


def test_progress_is_told_at_most_twice_a_second_and_the_end_once(tmp_path: Path) -> None:
    now = 100.0
    path = tmp_path / "reports"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        telling = Reports(descriptor, lambda: now)
        for step in range(100):
            now = 100.0 + step / 20  # five seconds in all
            telling.progress(step, 100, "bytes")
        telling.fetched("file:///a")
    finally:
        os.close(descriptor)
    told = list(reports(path.read_bytes()))
    assert [report.WhichOneof("part") for report in told] == ["progress"] * 10 + ["fetched"]


def test_a_redirect_to_a_private_address_is_refused_by_the_real_resolver(tmp_path: Path, site: Web) -> None:
    site.answers["/a"] = redirect(f"http://localhost:{site.port}/b")
    site.answers["/b"] = send(b"secret")
    request = {"url": f"{site.url}/a", "hosts": [site.url, f"http://localhost:{site.port}"]}
    assert fetch(tmp_path, request).failed.reason == "ADDRESS_NOT_ALLOWED"
    assert fetch(tmp_path, {**request, "networks": ["127.0.0.0/8", "::1/128"]}).content == b"secret"


def test_a_large_file_takes_little_memory(tmp_path: Path, site: Web) -> None:
    block = os.urandom(1 << 20)

    def large(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(block) * 200))
        handler.end_headers()
        for _ in range(200):
            handler.wfile.write(block)

    site.answers["/a"] = large
    peak = 0
    with started(tmp_path, {"url": f"{site.url}/a", "hosts": [site.url]}) as process:
        assert process.stdout is not None
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max(peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)
            time.sleep(0.02)
        told = list(reports(process.stdout.read()))
    assert told[-1].WhichOneof("part") == "fetched"
    assert (tmp_path / "fetched").stat().st_size == len(block) * 200
    assert 0 < peak < 100 * 1024, "KiB"
