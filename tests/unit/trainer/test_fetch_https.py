"""Files by https and http: redirects, transfers that break off, servers that lie."""

import hashlib
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from certificates import Authority
from unit.trainer.fetches import Web, breaking, redirect, send, web

from luthier_trainer.data.fetching import https
from luthier_trainer.data.fetching.address import Policy, resolve
from luthier_trainer.data.fetching.output import Output
from luthier_trainer.data.fetching.request import FetchError

BODY = bytes(range(256)) * 4096
QUICK = https.Timing(connect=2, stall=0.4, crawl=1.0, pauses=())


@pytest.fixture
def site() -> Iterator[Web]:
    with web() as started:
        yield started


@pytest.fixture
def other() -> Iterator[Web]:
    with web() as started:
        yield started


class Fetching:
    """Fetches URLs into a file, with the sites that are allowed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.hosts: list[str] = []
        self.progress: list[tuple[int, int, str]] = []

    def __call__(self, url: str, *, token: str = "", max_bytes: int = 1 << 24, policy: Policy | None = None) -> str:
        with Output(self.path, max_bytes) as output:
            return https.fetch(
                url,
                policy or Policy(self.hosts, []),
                output,
                lambda *progress: self.progress.append(progress),
                token,
                QUICK,
            )

    def refused(self, url: str, max_bytes: int = 1 << 24) -> FetchError:
        with pytest.raises(FetchError) as error:
            self(url, max_bytes=max_bytes)
        return error.value


@pytest.fixture
def fetching(tmp_path: Path, site: Web) -> Fetching:
    made = Fetching(tmp_path / "fetched")
    made.hosts.append(site.url)
    return made


def test_a_file_comes_whole_with_its_version_and_without_the_query(site: Web, fetching: Fetching) -> None:
    site.answers["/a/train.jsonl"] = send(BODY, headers={"ETag": '"v 7"'})
    source = fetching(f"{site.url}/a/train.jsonl?sig=SECRET#part")
    assert fetching.path.read_bytes() == BODY
    assert source == f"{site.url}/a/train.jsonl#etag=v%207"
    assert fetching.progress[-1] == (len(BODY), len(BODY), "bytes")
    (headers,) = site.asked("/a/train.jsonl?sig=SECRET")
    assert headers["Accept-Encoding"] == "identity"
    assert headers["Host"] == f"127.0.0.1:{site.port}"


def test_a_chunked_body_comes_whole(site: Web, fetching: Fetching) -> None:
    def chunked(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n")

    site.answers["/x"] = chunked
    fetching(f"{site.url}/x")
    assert fetching.path.read_bytes() == b"hello world"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed_and_the_token_stays_with_the_first_host(
    site: Web, other: Web, fetching: Fetching, status: int
) -> None:
    site.answers["/a"] = redirect("/b", status)
    site.answers["/b"] = redirect(f"{other.url}/c", status)
    other.answers["/c"] = redirect(f"{site.url}/d", status)
    site.answers["/d"] = send(b"{}")
    fetching.hosts.append(other.url)
    fetching(f"{site.url}/a", token="hunter2")
    assert [headers.get("Authorization") for headers in site.asked("/a") + site.asked("/b")] == ["Bearer hunter2"] * 2
    assert "Authorization" not in other.asked("/c")[0]
    assert "Authorization" not in site.asked("/d")[0]


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("http://169.254.169.254/latest/meta-data/", "HOST_NOT_ALLOWED"),
        ("http://localhost:1/", "HOST_NOT_ALLOWED"),
        ("http://[::1]:22/", "HOST_NOT_ALLOWED"),
        ("//10.0.0.1/", "HOST_NOT_ALLOWED"),
        ("file:///etc/passwd", "SCHEME_NOT_ALLOWED"),
        ("gopher://127.0.0.1/", "SCHEME_NOT_ALLOWED"),
        ("http://user:pass@127.0.0.1/", "INVALID_URL"),
        ("", "UNAVAILABLE"),
        ("http://[", "INVALID_URL"),
    ],
)
def test_a_redirect_leads_nowhere_that_the_caller_could_not_name(
    site: Web, fetching: Fetching, location: str, reason: str
) -> None:
    site.answers["/a"] = redirect(location)
    assert fetching.refused(f"{site.url}/a").reason == reason


def test_a_name_in_a_redirect_that_leads_to_a_private_address_is_refused_without_a_connection(
    site: Web, other: Web, fetching: Fetching
) -> None:
    site.answers["/a"] = redirect(f"http://inside.example:{other.port}/b")

    def inside(host: str, port: int) -> Sequence[str]:
        return ["127.0.0.1"] if host == "inside.example" else resolve(host, port)

    policy = Policy([site.url, f"http://inside.example:{other.port}"], [], inside)
    with pytest.raises(FetchError) as error:
        fetching(f"{site.url}/a", policy=policy)
    assert error.value.reason == "ADDRESS_NOT_ALLOWED"
    assert not other.requests


def test_a_loop_of_redirects_ends(site: Web, fetching: Fetching) -> None:
    site.answers["/a"] = redirect("/b")
    site.answers["/b"] = redirect("/a")
    assert fetching.refused(f"{site.url}/a").reason == "TOO_MANY_REDIRECTS"
    assert len(site.requests) == https.MAX_REDIRECTS + 1


def test_a_name_is_resolved_once_and_that_very_address_is_connected_to(site: Web, fetching: Fetching) -> None:
    site.answers["/a"] = send(b"{}")
    asked: list[str] = []

    def rebinding(host: str, port: int) -> Sequence[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["169.254.169.254"]

    policy = Policy([f"http://name.example:{site.port}"], ["127.0.0.0/8"], rebinding)
    fetching(f"http://name.example:{site.port}/a", policy=policy)
    assert asked == ["name.example"]
    assert site.asked("/a")[0]["Host"] == f"name.example:{site.port}"


def test_an_answer_that_rebinds_between_two_connections_is_judged_each_time(site: Web, fetching: Fetching) -> None:
    site.answers["/a"] = breaking(BODY, 1000)
    turns = iter([["127.0.0.1"], ["169.254.169.254"]])
    policy = Policy([f"http://name.example:{site.port}"], ["127.0.0.0/8"], lambda host, port: next(turns))
    with pytest.raises(FetchError) as error:
        fetching(f"http://name.example:{site.port}/a", policy=policy)
    assert error.value.reason == "ADDRESS_NOT_ALLOWED"


def test_a_transfer_that_breaks_off_goes_on_where_it_was(site: Web, fetching: Fetching) -> None:
    site.answers["/a"] = breaking(BODY, 300_000, times=3)
    fetching(f"{site.url}/a")
    assert hashlib.sha256(fetching.path.read_bytes()).digest() == hashlib.sha256(BODY).digest()
    assert [headers.get("Range") for headers in site.asked("/a")] == [
        None, "bytes=300000-", "bytes=600000-", "bytes=900000-",
    ]  # fmt: skip


@pytest.mark.parametrize(("etag", "ranges"), [("", True), ('W/"v1"', True), ('"v1"', False)])
def test_a_transfer_that_cannot_be_resumed_exactly_starts_anew(
    site: Web, fetching: Fetching, etag: str, ranges: bool
) -> None:
    site.answers["/a"] = breaking(BODY, 300_000, etag=etag, ranges=ranges, times=2)
    fetching(f"{site.url}/a")
    assert fetching.path.read_bytes() == BODY


def test_a_file_that_changes_between_two_parts_is_never_mixed(site: Web, fetching: Fetching) -> None:
    first, second = breaking(BODY, 300_000, etag='"v1"'), breaking(BODY[::-1], 0, etag='"v2"', times=0)

    def changing(handler: BaseHTTPRequestHandler) -> None:
        (first if len(site.requests) == 1 else second)(handler)

    site.answers["/a"] = changing
    source = fetching(f"{site.url}/a")
    assert fetching.path.read_bytes() == BODY[::-1]
    assert source.endswith("#etag=v2")


def test_a_server_that_sends_another_part_than_asked_for_is_not_believed(site: Web, fetching: Fetching) -> None:
    breaks = breaking(BODY, 300_000)

    def wrong(handler: BaseHTTPRequestHandler) -> None:
        if handler.headers.get("Range"):
            send(BODY[:10], 206, {"Content-Range": f"bytes 0-9/{len(BODY)}"})(handler)
        else:
            breaks(handler)

    site.answers["/a"] = wrong
    assert fetching.refused(f"{site.url}/a").reason == "UNAVAILABLE"


def test_a_transfer_that_always_breaks_off_fails_after_five_more_tries(site: Web, fetching: Fetching) -> None:
    site.answers["/a"] = breaking(BODY, 10, times=100)
    failed = fetching.refused(f"{site.url}/a")
    assert failed.reason == "UNAVAILABLE"
    assert len(site.requests) == 1 + https.MAX_RESUMES


@pytest.mark.parametrize("where", ["head", "body"])
def test_a_server_that_stalls_does_not_hold_the_worker(site: Web, fetching: Fetching, where: str) -> None:
    ended = threading.Event()

    def stall(handler: BaseHTTPRequestHandler) -> None:
        if where == "body":
            handler.send_response(200)
            handler.send_header("Content-Length", "100")
            handler.end_headers()
            handler.wfile.write(b"x")
            handler.wfile.flush()
        ended.wait(20)
        handler.close_connection = True

    site.answers["/a"] = stall
    started = time.monotonic()
    try:
        assert fetching.refused(f"{site.url}/a").reason == "UNAVAILABLE"
    finally:
        ended.set()
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("where", ["head", "body"])
def test_a_server_that_drips_does_not_hold_the_worker(site: Web, fetching: Fetching, where: str) -> None:
    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        if where == "body":
            handler.send_header("Content-Length", "1000000")
            handler.end_headers()
        else:
            handler.flush_headers()
        for _ in range(100):
            handler.wfile.write(b"x")
            handler.wfile.flush()
            time.sleep(0.1)

    site.answers["/a"] = drip
    started = time.monotonic()
    assert fetching.refused(f"{site.url}/a").reason == "UNAVAILABLE"
    assert time.monotonic() - started < (1 + https.MAX_RESUMES) * 3


def test_a_file_over_the_limit_is_refused_before_it_is_sent(site: Web, fetching: Fetching) -> None:
    site.answers["/a"] = send(BODY)
    assert fetching.refused(f"{site.url}/a", max_bytes=len(BODY) - 1).reason == "TOO_LARGE"
    assert fetching.path.stat().st_size == 0
    fetching(f"{site.url}/a", max_bytes=len(BODY))


def test_a_body_that_never_ends_is_cut_at_the_limit(site: Web, fetching: Fetching) -> None:
    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Connection", "close")
        handler.end_headers()
        while True:
            handler.wfile.write(BODY)

    site.answers["/a"] = endless
    assert fetching.refused(f"{site.url}/a", max_bytes=5_000_000).reason == "TOO_LARGE"
    assert fetching.path.stat().st_size <= 5_000_000


@pytest.mark.parametrize("length", ["-1", "1e3", "99999999999999999999", "0x10", "five"])
def test_a_length_that_is_no_number_is_not_believed(site: Web, fetching: Fetching, length: str) -> None:
    site.answers["/a"] = send(b"hello", headers={"Content-Length": length})
    assert fetching.refused(f"{site.url}/a").reason == "UNAVAILABLE"


def test_a_length_that_is_too_long_is_noticed(site: Web, fetching: Fetching) -> None:
    def lying(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b"short")
        handler.close_connection = True

    site.answers["/a"] = lying
    assert fetching.refused(f"{site.url}/a").reason == "UNAVAILABLE"


@pytest.mark.parametrize("encoding", ["gzip", "br", "zstd", "gzip, identity"])
def test_an_encoded_body_is_refused_as_it_could_grow_without_end(site: Web, fetching: Fetching, encoding: str) -> None:
    site.answers["/a"] = send(b"\x1f\x8b", headers={"Content-Encoding": encoding})
    assert fetching.refused(f"{site.url}/a").reason == "ENCODING_NOT_SUPPORTED"


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (404, "NOT_FOUND"), (410, "NOT_FOUND"), (401, "NOT_PERMITTED"), (403, "NOT_PERMITTED"), (400, "UNAVAILABLE"),
        (416, "UNAVAILABLE"), (429, "UNAVAILABLE"), (500, "UNAVAILABLE"), (503, "UNAVAILABLE"), (204, "UNAVAILABLE"),
        (304, "UNAVAILABLE"), (206, "UNAVAILABLE"),
    ],
)  # fmt: skip
def test_an_error_has_a_stable_reason(site: Web, fetching: Fetching, status: int, reason: str) -> None:
    site.answers["/a"] = send(b"", status)
    failed = fetching.refused(f"{site.url}/a")
    assert failed.reason == reason
    assert reason != "NOT_PERMITTED" or "token_secret" in failed.hint


def test_a_server_that_is_busy_in_the_middle_is_asked_again(site: Web, fetching: Fetching) -> None:
    breaks = breaking(BODY, 300_000)

    def busy(handler: BaseHTTPRequestHandler) -> None:
        (send(b"", 503) if len(site.requests) == 2 else breaks)(handler)

    site.answers["/a"] = busy
    fetching(f"{site.url}/a")
    assert fetching.path.read_bytes() == BODY


@pytest.mark.parametrize(
    "answer",
    [b"SSH-2.0-OpenSSH_9.7\r\n" + b"\0" * 70_000, b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200 + b"\r\n", b""],
)
def test_what_is_no_http_at_all_is_an_error_and_no_crash(site: Web, fetching: Fetching, answer: bytes) -> None:
    def other(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(answer)
        handler.close_connection = True

    site.answers["/a"] = other
    assert fetching.refused(f"{site.url}/a").reason == "UNAVAILABLE"


def test_a_host_where_nobody_listens_is_unavailable(site: Web, fetching: Fetching) -> None:
    fetching.hosts.append("http://127.0.0.1:1")
    assert fetching.refused("http://127.0.0.1:1/a").reason == "UNAVAILABLE"


def test_certificates_are_verified_against_the_name(
    tmp_path: Path, fetching: Fetching, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Authority(tmp_path / "authority")
    right = authority.sign("right", "DNS:files.example")
    with web((right.certificate, right.key)) as site:
        site.answers["/a"] = send(b"{}")
        policy = Policy(
            [f"files.example:{site.port}", f"other.example:{site.port}"],
            ["127.0.0.0/8"],
            lambda host, port: ["127.0.0.1"],
        )

        def reason(name: str) -> str:
            with pytest.raises(FetchError) as error:
                fetching(f"https://{name}:{site.port}/a", policy=policy)
            return error.value.reason

        assert reason("files.example") == "CERTIFICATE_NOT_VALID"  # nobody knows its authority
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
        fetching(f"https://files.example:{site.port}/a", policy=policy)
        assert reason("other.example") == "CERTIFICATE_NOT_VALID"
        assert ssl.create_default_context().verify_mode == ssl.CERT_REQUIRED


def test_no_redirect_leads_from_https_to_http(
    tmp_path: Path, site: Web, fetching: Fetching, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Authority(tmp_path / "authority")
    pair = authority.sign("localhost")
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
    with web((pair.certificate, pair.key)) as secure:
        secure.answers["/a"] = redirect(f"{site.url}/b")
        fetching.hosts.append(f"127.0.0.1:{secure.port}")
        assert fetching.refused(f"{secure.url}/a").reason == "SCHEME_NOT_ALLOWED"
    assert not site.requests
