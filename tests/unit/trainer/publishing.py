"""An export to copy, and stores that break, for the tests of destinations."""

import hashlib
import json
import random
import socket
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from luthier.v1.export_task_pb2 import ExportDestination
from luthier.v1.model_pb2 import ModelFile
from luthier_trainer.errors import TrainingError
from luthier_trainer.export.publish import publish
from luthier_trainer.stop import StopRequested

PART = 5 << 20  # the least that S3 takes
KEY, SECRET = "AKIAHUNTER1", "hunter2/and+more"


@dataclass
class Export:
    """An export on disk, ready to be copied."""

    folder: Path
    files: list[ModelFile]

    def bytes_of(self, path: str) -> bytes:
        """A file of it."""
        return (self.folder / path).read_bytes()

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size_bytes for file in self.files)


def export(folder: Path, name: str = "export_1", weights: int = 2 * PART + 1000, seed: int = 0) -> Export:
    """An export of a few small files and one large one, other bytes for another seed."""
    folder.mkdir(parents=True)
    contents = {
        "README.md": b"---\nlicense: apache-2.0\n---\n# A model\n",
        "luthier.json": json.dumps({"format": 1, "export": {"id": name}}).encode(),
        "model.safetensors": random.Random(seed).randbytes(weights),
        "nested/deep/empty.txt": b"",
        "tokenizer.json": b'{"version": "1.0"}',
    }
    files = []
    for path, data in contents.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
        files.append(ModelFile(path=path, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))
    return Export(folder, files)


@dataclass
class Attempt:
    """One attempt to copy. told: what was told of progress; stop_after: how many checks pass before a stop."""

    export: Export
    secret: str = ""
    roots: Sequence[Path] = ()
    stop_after: int = 1 << 60
    told: list[tuple[int, int]] = field(default_factory=list)
    checks: int = 0

    def to(self, uri: str, public: bool = False) -> str:
        """Copies the export; returns where the copy is."""
        destination = ExportDestination(uri=uri, public=public, credentials_secret="store" if self.secret else "")
        roots = [str(root) for root in self.roots]
        return publish(
            self.export.folder, self.export.files, destination, self.secret, roots,
            lambda done, total: self.told.append((done, total)), self._check,
        )  # fmt: skip

    def refused(self, uri: str, public: bool = False) -> TrainingError:
        """Why it cannot be copied; its whole story, as a log would have it, holds no part of the secret."""
        with pytest.raises(TrainingError) as raised:
            self.to(uri, public)
        story = "".join(traceback.format_exception(raised.value)) + repr(raised.value.args)
        assert not any(each in story for each in (KEY, SECRET, "Signature", self.secret.strip() or SECRET)), story
        return raised.value

    def _check(self) -> None:
        self.checks += 1
        if self.checks > self.stop_after:
            raise StopRequested


def killed_on_the_way(export: Export, uri: str, secret: str, roots: Sequence[Path], moment: int, setup: str) -> None:
    """Copies in another process, which is killed at one of its checks. setup: statements that it begins with."""
    script = f"""
import sys, time
from pathlib import Path
from luthier.v1.export_task_pb2 import ExportDestination
from luthier.v1.model_pb2 import ModelFile
from luthier_trainer.export.publish import publish
{setup}
checks = 0
def check():
    global checks
    checks += 1
    if checks == {moment}:
        time.sleep(0.3)  # what is on its way gets there
        print("there", flush=True)
        time.sleep(60)
files = [ModelFile.FromString(bytes.fromhex(line)) for line in sys.stdin.read().split()]
destination = ExportDestination(uri={uri!r}, credentials_secret="store" if {bool(secret)} else "")
roots = {[str(root) for root in roots]!r}
publish(Path({str(export.folder)!r}), files, destination, {secret!r}, roots, lambda *_: None, check)
print("ended", flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("\n".join(file.SerializeToString().hex() for file in export.files))
        process.stdin.close()
        said = process.stdout.readline()
        process.kill()
    assert said == "there\n", "it was killed on the way"


@contextmanager
def breaking(port: int) -> Iterator["Breaking"]:
    """A relay to a port of this machine, which breaks connections when it is told to."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        relay = Breaking(listener.getsockname()[1])

        def serve() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=both, args=(client,), daemon=True).start()

        def both(client: socket.socket) -> None:
            with client, socket.create_connection(("127.0.0.1", port)) as server:
                back = threading.Thread(target=relay.carry, args=(server, client, False), daemon=True)
                back.start()
                relay.carry(client, server, True)
                back.join()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield relay
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@dataclass
class Breaking:
    """A relay. limit: bytes from the client after which a connection is cut, so many times; broken: how many were."""

    port: int
    limit: int = 1 << 60
    times: int = 1 << 60
    broken: int = 0

    def carry(self, source: socket.socket, sink: socket.socket, limited: bool) -> None:
        """Carries bytes until an end closes."""
        carried = 0
        try:
            while data := source.recv(1 << 16):
                carried += len(data)
                if limited and carried > self.limit and self.broken < self.times:
                    self.broken += 1
                    break
                sink.sendall(data)
        except OSError:
            pass
        for each in (source, sink):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


@dataclass(frozen=True)
class S3:
    """A real server of S3's API. client: boto3's, beside what is tested."""

    port: int
    client: Any

    def secret(self, port: int = 0, **more: str) -> str:
        """What a secret for it holds; port: of a relay."""
        return json.dumps(
            {
                "AWS_ACCESS_KEY_ID": KEY,
                "AWS_SECRET_ACCESS_KEY": SECRET,
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port or self.port}",
                "AWS_REGION": "us-east-1",
                **more,
            }
        )

    def below(self, prefix: str, bucket: str = "models") -> Mapping[str, bytes]:
        """The objects below a prefix."""
        listed = self.client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/").get("Contents", [])
        return {
            each["Key"].removeprefix(f"{prefix}/"): self.client.get_object(Bucket=bucket, Key=each["Key"])[
                "Body"
            ].read()
            for each in listed
        }

    def uploads(self, bucket: str = "models") -> list[str]:
        """The keys of multipart uploads that nobody ended."""
        return [each["Key"] for each in self.client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])]


_SERVER = """
import sys, warnings
warnings.simplefilter("ignore")
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@contextmanager
def s3_server() -> Iterator[S3]:
    """Moto's S3 server with the bucket `models`, for the time of the block; in a process of its own, since it leaves
    files and sockets open."""
    pytest.importorskip("moto.server")
    import boto3  # type: ignore[import-untyped]

    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", _SERVER], text=True, **pipes) as process:
        assert process.stdin is not None and process.stdout is not None
        port = int(process.stdout.readline())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            client: Any = boto3.client(
                "s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1", aws_access_key_id="id",
                aws_secret_access_key="key",
            )  # fmt: skip
            client.create_bucket(Bucket="models")
        yield S3(port, client)
        client.close()
        process.kill()
