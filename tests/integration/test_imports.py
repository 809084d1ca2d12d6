"""Datasets are imported from where the operator allows it, and from nowhere else."""

import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from daemon import ROWS, Daemon, puppet, reason

from luthier.v1 import datasets_pb2 as ds

Start = Callable[..., Daemon]


class Files(http.server.BaseHTTPRequestHandler):
    """Serves the rows, for a token where one is asked for."""

    def do_GET(self) -> None:
        if self.path == "/secret.jsonl" and self.headers.get("Authorization") != "Bearer open-sesame":
            self.send_error(401)
            return
        if self.path == "/away.jsonl":
            self.send_response(302)
            self.send_header("Location", "http://169.254.169.254/latest/meta-data/")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(ROWS)))
        self.end_headers()
        self.wfile.write(ROWS)

    def log_message(self, format: str, *args: Any) -> None:
        """Keeps quiet."""


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def fetched(daemon: Daemon, url: str, **fields: Any) -> ds.UploadDatasetResponse:
    responses = list(daemon.datasets.ImportDataset(ds.ImportDatasetRequest(name="fetched", url=url, **fields)))
    assert all(each.HasField("progress") for each in responses[:-1])
    return responses[-1].imported


def refusal(daemon: Daemon, url: str, **fields: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        fetched(daemon, url, **fields)
    return caught.value


@pytest.fixture(scope="module")
def daemon(host: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    root = tmp_path_factory.mktemp("allowed")
    (root / "rows.jsonl").write_bytes(ROWS)
    (root / "out").symlink_to("/etc/passwd")
    flags = [*puppet(), "--import-host", f"http://{host}", "--import-network", "127.0.0.0/8"]
    served = Daemon(
        tmp_path_factory.mktemp("imports"),
        [*flags, "--import-root", str(root)],
        environment={"LUTHIER_SECRET_SOURCE": "open-sesame"},
    )
    served.root = root  # type: ignore[attr-defined]
    yield served.start()
    assert "open-sesame" not in served.log()
    assert "Traceback" not in served.log()
    assert not list((served.data_dir / "blobs" / "incoming").iterdir())
    served.close()


def test_an_import_is_a_dataset_that_knows_its_source(daemon: Daemon, host: str) -> None:
    imported = fetched(daemon, f"http://{host}/rows.jsonl")
    assert imported.created
    assert imported.dataset.rows == 40
    assert imported.dataset.source.startswith(f"http://{host}/rows.jsonl")
    assert daemon.upload(ROWS, "fetched").id == imported.dataset.id


def test_a_secret_opens_a_source_and_is_told_to_nobody(daemon: Daemon, host: str) -> None:
    url = f"http://{host}/secret.jsonl"
    assert reason(refusal(daemon, url)) == "SOURCE_NOT_PERMITTED"
    assert fetched(daemon, url, token_secret="source").dataset.rows == 40
    assert refusal(daemon, url, token_secret="nobody_has_it").code() == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://example.org/rows.jsonl", "HOST_NOT_ALLOWED"),
        ("http://169.254.169.254/latest/meta-data/", None),
        ("s3://bucket/key", "BUCKET_NOT_ALLOWED"),
        ("file:///etc/passwd", None),
        ("ftp://example.org/x", "SCHEME_NOT_ALLOWED"),
    ],
)
def test_what_the_operator_did_not_allow_is_not_fetched(daemon: Daemon, url: str, expected: str | None) -> None:
    error = refusal(daemon, url)
    assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert reason(error).endswith("_NOT_ALLOWED")
    assert expected is None or reason(error) == expected


def test_a_redirect_is_judged_like_a_request(daemon: Daemon, host: str) -> None:
    assert reason(refusal(daemon, f"http://{host}/away.jsonl")).endswith("_NOT_ALLOWED")


def test_a_local_file_comes_from_an_allowed_folder_alone(daemon: Daemon) -> None:
    root: Path = daemon.root  # type: ignore[attr-defined]
    assert fetched(daemon, f"file://{root}/rows.jsonl").dataset.rows == 40
    assert reason(refusal(daemon, f"file://{root}/out")).endswith("_NOT_ALLOWED")
    assert reason(refusal(daemon, f"file://{root}/../../../etc/passwd")).endswith("_NOT_ALLOWED")
