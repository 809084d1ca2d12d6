"""The fetch worker in a process of its own, and a web server to fetch from, for the tests of imports."""

import json
import os
import ssl
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from luthier.trainer.v1 import data_pb2

Answer = Callable[[BaseHTTPRequestHandler], None]


@dataclass
class Web:
    """A web server on a port of its own. answers: what is done for a path; requests: the paths and headers it got."""

    port: int
    answers: dict[str, Answer] = field(default_factory=dict)
    requests: list[tuple[str, Mapping[str, str]]] = field(default_factory=list)
    default: Answer | None = None
    scheme: str = "http"

    @property
    def url(self) -> str:
        """Where it is, without a path."""
        return f"{self.scheme}://127.0.0.1:{self.port}"

    def asked(self, path: str) -> list[Mapping[str, str]]:
        """The headers of each request for a path."""
        return [headers for each, headers in self.requests if each == path]


@contextmanager
def web(certificate: tuple[Path, Path] | None = None, methods: tuple[str, ...] = ()) -> Iterator[Web]:
    """A web server for the time of the block; by TLS when it is given a certificate and its key. methods: beside GET,
    HEAD and POST."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 20

        def do_GET(self) -> None:
            site.requests.append((self.path, dict(self.headers)))
            answer = site.answers.get(self.path.partition("?")[0], site.default)
            if answer is None:
                send(b"", 404)(self)
            else:
                answer(self)

        do_HEAD = do_POST = do_GET

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    for method in methods:
        setattr(Handler, f"do_{method}", Handler.do_GET)

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # clients of these tests leave as they like

    with Server(("127.0.0.1", 0), Handler) as server:
        site = Web(server.server_port)
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
            site.scheme = "https"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield site
        finally:
            server.shutdown()
            thread.join()


def send(body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    """Answers with a body."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        given = {"Content-Length": str(len(body)), **(headers or {})}
        for name, value in given.items():
            if value:
                handler.send_header(name, value)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body)

    return answer


def redirect(location: str, status: int = 302) -> Answer:
    """Answers with a redirect."""
    return send(b"", status, {"Location": location})


def breaking(body: bytes, after: int, etag: str = '"v1"', times: int = 1, ranges: bool = True) -> Answer:
    """Sends a file and breaks off `after` bytes of each of the first responses; resumes where asked to."""
    left = [times]

    def answer(handler: BaseHTTPRequestHandler) -> None:
        start = 0
        wanted = handler.headers.get("Range")
        if ranges and wanted and handler.headers.get("If-Range") == etag:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(body) - start))
        if etag:
            handler.send_header("ETag", etag)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        handler.end_headers()
        if left[0]:
            left[0] -= 1
            handler.wfile.write(body[start : start + after])
            handler.close_connection = True
        else:
            handler.wfile.write(body[start:])

    return answer


@dataclass(frozen=True)
class Outcome:
    """What the worker said, and what it left."""

    reports: list[data_pb2.FetchReport]
    code: int
    stderr: str
    path: Path

    @property
    def source(self) -> str:
        """Where the file came from; the test fails when it did not come."""
        assert self.reports[-1].WhichOneof("part") == "fetched", f"{self.reports}\n{self.stderr}"
        return self.reports[-1].fetched.source

    @property
    def failed(self) -> data_pb2.FetchFailed:
        """Why it did not come; the test fails when it did."""
        assert self.reports[-1].WhichOneof("part") == "failed", f"{self.reports}\n{self.stderr}"
        return self.reports[-1].failed

    @property
    def content(self) -> bytes:
        """The file."""
        return self.path.read_bytes()


def command(folder: Path, request: Mapping[str, Any]) -> list[str]:
    """The worker's command line for a request, with its files in a folder."""
    (folder / "request.json").write_text(json.dumps({"max_bytes": 1 << 30, **request}))
    return [sys.executable, "-m", "luthier_trainer.data.fetch", str(folder / "request.json"), str(folder / "fetched")]


def fetch(
    folder: Path, request: Mapping[str, Any], token: str = "", environment: Mapping[str, str] | None = None
) -> Outcome:
    """Runs the worker to its end."""
    variables = {**os.environ, **(environment or {})} | ({"LUTHIER_FETCH_TOKEN": token} if token else {})
    ended = subprocess.run(command(folder, request), capture_output=True, env=variables, timeout=100)
    return Outcome(list(reports(ended.stdout)), ended.returncode, ended.stderr.decode(), folder / "fetched")


def reports(data: bytes) -> Iterator[data_pb2.FetchReport]:
    """The messages of the worker's output."""
    while data:
        (length,) = struct.unpack_from("<I", data)
        yield data_pb2.FetchReport.FromString(data[4 : 4 + length])
        data = data[4 + length :]
