"""A Hugging Face Hub for tests: the part of its HTTP API that `huggingface_hub` and `datasets` call to read datasets.

It serves repositories of datasets from memory, on 127.0.0.1; HF_ENDPOINT leads the libraries to it.
"""

import functools
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Repository:
    """A dataset: its files by path. token: what a caller needs; gated: who has no token gets its card and nothing else;
    cdn: where its files are redirected to (a URL without a path), instead of being served here."""

    files: Mapping[str, bytes]
    token: str = ""
    gated: bool = False
    cdn: str = ""

    @functools.cached_property
    def commit(self) -> str:
        """Its only commit, also called `main`."""
        names = [(path, _sha1(data)) for path, data in sorted(self.files.items())]
        return _sha1(repr(names).encode())


@dataclass
class Hub:
    """The hub. requests: `METHOD PATH` and the headers of each request that came."""

    url: str
    datasets: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, Mapping[str, str]]] = field(default_factory=list)


@contextmanager
def hub(**datasets: Repository) -> Iterator[Hub]:
    """A hub for the time of the block. datasets: by id, with `__` for the slash."""
    stub = Hub("", {name.replace("__", "/"): repository for name, repository in datasets.items()})

    class Handler(_Handler):
        pass

    Handler.stub = stub
    with _Server(("127.0.0.1", 0), Handler) as server:
        stub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield stub
        finally:
            server.shutdown()
            thread.join()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients leave as they like


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 20
    stub: Hub

    def do_GET(self) -> None:
        self.stub.requests.append((f"{self.command} {self.path}", dict(self.headers)))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        for name, repository in self.stub.datasets.items():
            if path == f"/api/datasets/{name}" or path.startswith(f"/api/datasets/{name}/"):
                self._api(name, repository, path.removeprefix(f"/api/datasets/{name}").strip("/"), body)
                return
            if path.startswith(f"/datasets/{name}/resolve/"):
                revision, _, file = path.removeprefix(f"/datasets/{name}/resolve/").partition("/")
                self._resolve(repository, revision, file)
                return
        self._error(401, "RepoNotFound")

    do_HEAD = do_POST = do_GET

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def _may(self, repository: Repository) -> bool:
        return not repository.token or self.headers.get("Authorization") == f"Bearer {repository.token}"

    def _api(self, name: str, repository: Repository, rest: str, body: bytes) -> None:
        if not self._may(repository) and not repository.gated:
            self._error(401, "RepoNotFound")
            return
        what, _, rest = rest.partition("/")
        revision, _, folder = rest.partition("/")
        if revision not in ("", "main", repository.commit):
            self._error(404, "RevisionNotFound")
        elif what in ("", "revision"):
            siblings = [{"rfilename": path} for path in sorted(repository.files)]
            fields = {"private": False, "gated": repository.gated, "downloads": 0, "likes": 0, "tags": []}
            self._json({"_id": "1", "id": name, "sha": repository.commit, "siblings": siblings, **fields})
        elif what == "paths-info":
            wanted = _wanted(body, self.headers.get("Content-Type", ""))
            self._json([_entry(repository, path) for path in wanted if _exists(repository, path)])
        elif what == "tree":
            query = parse_qs(urlsplit(self.path).query)
            recursive = query.get("recursive", [""])[0].lower() == "true"
            self._tree(repository, folder.strip("/"), recursive)
        else:
            self._error(404, "EntryNotFound")

    def _tree(self, repository: Repository, folder: str, recursive: bool) -> None:
        prefix = f"{folder}/" if folder else ""
        found: dict[str, None] = {}
        for path in sorted(repository.files):
            if path.startswith(prefix):
                parts = path.removeprefix(prefix).split("/")
                depths = range(1, len(parts) + 1) if recursive else (1,)
                found |= {prefix + "/".join(parts[:depth]): None for depth in depths}
        if folder and not found:
            self._error(404, "EntryNotFound")
        else:
            self._json([_entry(repository, path) for path in found])

    def _resolve(self, repository: Repository, revision: str, path: str) -> None:
        if not self._may(repository):
            self._error(401, "GatedRepo" if repository.gated else "RepoNotFound")
        elif revision not in ("main", repository.commit):
            self._error(404, "RevisionNotFound")
        elif path not in repository.files:
            self._error(404, "EntryNotFound", {"X-Repo-Commit": repository.commit})
        else:
            data = repository.files[path]
            headers = {
                "X-Repo-Commit": repository.commit,
                "ETag": f'"{_sha1(data)}"',
                "Accept-Ranges": "bytes",
            }
            if repository.cdn:
                linked = {"Location": f"{repository.cdn}/{path}", "X-Linked-Size": str(len(data))}
                self._send(302, b"", {**headers, **linked, "X-Linked-ETag": headers["ETag"]})
            else:
                self._part(data, headers)

    def _part(self, data: bytes, headers: Mapping[str, str]) -> None:
        wanted = self.headers.get("Range")
        if not wanted:
            self._send(200, data, headers)
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last or len(data) - 1), len(data) - 1)
        if start >= len(data):
            self._send(416, b"", headers)
        else:
            self._send(206, data[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{len(data)}"})

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, headers: Mapping[str, str] | None = None) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def _wanted(body: bytes, kind: str) -> list[str]:
    if kind.startswith("application/json"):
        return list(json.loads(body)["paths"])
    return parse_qs(body.decode()).get("paths", [])


def _exists(repository: Repository, path: str) -> bool:
    return path in repository.files or any(each.startswith(f"{path}/") for each in repository.files)


def _entry(repository: Repository, path: str) -> dict[str, object]:
    oid = _sha1(path.encode())
    if path not in repository.files:
        return {"type": "directory", "oid": oid, "size": 0, "path": path}
    return {"type": "file", "oid": oid, "size": len(repository.files[path]), "path": path}
