"""A Hugging Face Hub for tests that takes models: the part of its HTTP API that `huggingface_hub` calls to write them.

Large files go to a store of their own by addresses that are signed, one PUT or several parts; small ones come with the
commit. Everything is in memory, on 127.0.0.1.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = 100_000  # bytes from which a file is a large one
SIGNATURE = "X-Amz-Signature=signedsecret"


@dataclass
class Model:
    """A repository of a model. commits: the files of each commit by path, the last one being `main`."""

    private: bool
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{".gitattributes": b""}])

    @property
    def files(self) -> dict[str, bytes]:
        """The files of `main`."""
        return self.commits[-1]


@dataclass
class UploadHub:
    """The hub. token: what callers need; owners: who may be written to; objects: large files by SHA-256; part_bytes:
    how large the parts of a large file are, 0 for one PUT; sent: bytes that were sent to the store; breaks: so many
    PUTs to the store are cut in the middle; busy: the answer to commits, when it is no commit;
    damage: small files are kept with another byte; card_problem: why no card is taken; requests: `METHOD PATH`
    and the headers of each request."""

    token: str
    url: str = ""
    owners: tuple[str, ...] = ("someone",)
    models: dict[str, Model] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, bytes] = field(default_factory=dict)
    part_bytes: int = 0
    sent: int = 0
    breaks: int = 0
    busy: int = 0
    damage: bool = False
    card_problem: str = ""
    requests: list[tuple[str, Mapping[str, str]]] = field(default_factory=list)


@contextmanager
def upload_hub(token: str) -> Iterator[UploadHub]:
    """A hub for the time of the block."""
    hub = UploadHub(token)

    class Handler(_Handler):
        pass

    Handler.hub = hub
    with _Server(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


def git_hash(data: bytes) -> str:
    """The name that git gives to bytes."""
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients leave as they like


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 20
    disable_nagle_algorithm = True
    hub: UploadHub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((f"{self.command} {path}", dict(self.headers)))
        if path.startswith("/store/"):
            self._store(path.removeprefix("/store/"))
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path.startswith("/lfs/complete/"):  # an address that is signed, too
            self._complete(json.loads(body))
        elif self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self._json({"error": "Invalid credentials"}, 401)
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            problems = [{"message": self.hub.card_problem}] if self.hub.card_problem else []
            self._json({"errors": problems, "warnings": []}, 400 if problems else 200)
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        elif path.startswith("/lfs/verify/"):
            wanted = json.loads(body)
            self._json({}, 200 if len(self.hub.objects.get(wanted["oid"], b"")) == wanted["size"] else 404)
        elif path.startswith("/api/models/"):
            owner, name, what, *rest = [*path.removeprefix("/api/models/").split("/"), "", ""]
            self._model(f"{owner}/{name}", what, rest[0], body)
        else:
            self._json({"error": "Entry not found"}, 404)

    do_POST = do_PUT = do_GET

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def _create(self, wanted: Mapping[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] not in self.hub.owners:
            self._json({"error": "You don't have the rights to create a model under this namespace"}, 403)
            return
        status = 409 if name in self.hub.models else 200
        self.hub.models.setdefault(name, Model(private=wanted.get("visibility") == "private"))
        self._json({"url": f"{self.hub.url}/{name}"}, status)

    def _model(self, name: str, what: str, revision: str, body: bytes) -> None:
        model = self.hub.models.get(name)
        if model is None:
            self._json({}, 404, {"X-Error-Code": "RepoNotFound"})
        elif what == "preupload":
            self._json({"files": [self._mode(model, each) for each in json.loads(body)["files"]]})
        elif what == "commit":
            self._commit(name, model, [json.loads(line) for line in body.splitlines()])
        elif what == "paths-info":
            files = model.files if revision == "main" else model.commits[int(revision, 16)]
            wanted = parse_qs(body.decode())["paths"]
            self._json([_entry(path, files[path]) for path in wanted if path in files])
        else:
            self._json({"id": name, "_id": "1", "sha": _oid(len(model.commits) - 1), "private": model.private})

    def _mode(self, model: Model, wanted: Mapping[str, Any]) -> Mapping[str, Any]:
        there = model.files.get(wanted["path"])
        large = wanted["size"] >= LARGE
        oid = None
        if there is not None:
            oid = hashlib.sha256(there).hexdigest() if len(there) >= LARGE else git_hash(there)
        mode = "lfs" if large else "regular"
        return {"path": wanted["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def _batch(self, wanted: Mapping[str, Any]) -> None:
        objects = []
        for each in wanted["objects"]:
            oid, size = each["oid"], each["size"]
            answer = {"oid": oid, "size": size}
            if oid not in self.hub.objects:
                upload: dict[str, Any] = {"href": f"{self.hub.url}/store/{oid}?{SIGNATURE}"}
                if self.hub.part_bytes:
                    count = -(-size // self.hub.part_bytes)
                    addresses = {str(n): f"{self.hub.url}/store/{oid}/{n}?{SIGNATURE}" for n in range(1, count + 1)}
                    header = {"chunk_size": str(self.hub.part_bytes), **addresses}
                    upload = {"href": f"{self.hub.url}/lfs/complete/{oid}?{SIGNATURE}", "header": header}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs/verify/{oid}"}}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def _store(self, path: str) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        if self.hub.breaks:
            self.hub.breaks -= 1
            self.rfile.read(size // 2)
            self.close_connection = True
            self.connection.close()
            return
        data = self.rfile.read(size)
        if len(data) < size:
            return  # the sender is gone
        self.hub.sent += len(data)
        if "/" in path:
            self.hub.parts[path] = data
        elif hashlib.sha256(data).hexdigest() == path:
            self.hub.objects[path] = data
        self._json({}, headers={"ETag": f'"{hashlib.sha256(data).hexdigest()}"'})

    def _complete(self, wanted: Mapping[str, Any]) -> None:
        data = b"".join(self.hub.parts[f"{wanted['oid']}/{part['partNumber']}"] for part in wanted["parts"])
        whole = hashlib.sha256(data).hexdigest() == wanted["oid"]
        if whole:
            self.hub.objects[wanted["oid"]] = data
        self._json({}, 200 if whole else 400)

    def _commit(self, name: str, model: Model, lines: list[Mapping[str, Any]]) -> None:
        if self.hub.busy:
            self._json({"error": "busy"}, self.hub.busy)
            return
        files = dict(model.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                data = base64.b64decode(value["content"])
                files[value["path"]] = data[:-1] + b"?" if self.hub.damage else data
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        model.commits.append(files)
        oid = _oid(len(model.commits) - 1)
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid})

    def _json(self, value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _oid(number: int) -> str:
    return f"{number:040x}"


def _entry(path: str, data: bytes) -> Mapping[str, Any]:
    entry: dict[str, Any] = {"type": "file", "oid": git_hash(data), "size": len(data), "path": path}
    if len(data) >= LARGE:
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry
