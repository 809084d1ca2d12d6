"""An upload over loopback by the real client to a real luthierd; also one whose client is killed half-way.

`python -m benchmarks.datasets_upload ADDRESS FILE` is the client in a process of its own. It prints lines of JSON with
the times (of the machine's clock) at which the file was hashed, and the first byte was sent and the last.
"""

import asyncio
import contextlib
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.daemon import Daemon, daemon, process_cpu_seconds, puppet, until
from benchmarks.datasets_memory import Peak
from luthier.v1 import datasets_pb2 as ds

_SECONDS = 600


def upload(path: Path) -> dict[str, Any]:
    """Sends a file until the server begins to check it."""
    size = path.stat().st_size
    with daemon(*puppet(1, 0.1)) as server, _client(server, path) as client:
        with Peak(server=server.process.pid, client=client.pid) as peak:
            begin, idle = time.time(), _cpu(server.process.pid)
            until(lambda: _checks(server) or client.poll() is not None, _SECONDS, "the check")
            checking = time.time()
            spent = {"server": _cpu(server.process.pid) - idle, "client": _cpu(client.pid)}
        client.kill()
        times = _times(client)
    return {
        "bytes": size,
        "hash_mb_per_second": round(size / 1e6 / (times["hashed"] - times["started"]), 1),
        "transfer_mb_per_second": round(size / 1e6 / (checking - times["first"]), 1),
        "whole_mb_per_second": round(size / 1e6 / (checking - times["started"]), 1),
        "whole_seconds": round(checking - begin, 2),
        "seconds": {
            "hashing": round(times["hashed"] - times["started"], 2),
            "sending": round(times["sent"] - times["first"], 2),
            "ending": round(checking - times["sent"], 2),
        },
        "cpu_seconds": {name: round(each, 2) for name, each in spent.items()},
        "server_idle_mb": round(peak.first["server"], 1),
        "server_peak_mb": round(peak.most["server"], 1),
        "client_peak_mb": round(peak.most["client"], 1),
    }


def resumed(path: Path) -> dict[str, Any]:
    """Kills the client when half of the file is there, and has a second one go on. Raises RuntimeError for bytes that
    are not those of the file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()

    def received() -> int:
        return int(server.datasets.GetUpload(ds.GetUploadRequest(sha256=sha256)).received_bytes)

    with daemon(*puppet(1, 0.1)) as server:
        with _client(server, path) as first:
            until(lambda: received() > size // 2 or first.poll() is not None, _SECONDS, "half of the file")
            first.kill()
            first.wait()
        with _client(server, path) as second, Peak(server=server.process.pid, client=second.pid) as peak:
            until(lambda: second.poll() is not None, _SECONDS, "the dataset")
            times = _times(second)
        blob = server.data_dir / "blobs" / sha256
        with open(blob, "rb") as file:
            if times.get("sha256") != sha256 or hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise RuntimeError("the bytes that came are not those that were sent")
    return {
        "bytes": size,
        "sent_again_bytes": size - times["offset"],
        "sent_again_share": round(1 - times["offset"] / size, 3),
        "hash_is_right": True,
        "server_peak_mb": round(peak.most["server"], 1),
        "client_peak_mb": round(peak.most["client"], 1),
    }


@contextlib.contextmanager
def _client(server: Daemon, path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    command = [sys.executable, "-m", "benchmarks.datasets_upload", server.address, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _times(client: "subprocess.Popen[bytes]") -> dict[str, Any]:
    """What a client that ended has printed."""
    found: dict[str, Any] = {}
    for line in client.communicate()[0].splitlines():
        found |= json.loads(line)
    return found


def _checks(server: Daemon) -> bool:
    """Whether a process of the server checks a file."""
    for children in Path(f"/proc/{server.process.pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for pid in children.read_text().split():
                if b"luthier_trainer.data.check" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return True
    return False


def _cpu(pid: int) -> float:
    with contextlib.suppress(OSError):
        return process_cpu_seconds(pid)
    return 0.0


async def _send(address: str, path: Path) -> None:
    from luthier_client.async_client import AsyncClient

    def say(**what: Any) -> None:
        print(json.dumps(what), flush=True)

    begun = False

    def hashed(done: int, size: int) -> None:
        if done == size:
            say(hashed=time.time())

    def sent(done: int, size: int) -> None:
        nonlocal begun
        if not begun:
            begun = True
            say(first=time.time(), offset=done)
        elif done == size:
            say(sent=time.time())

    async with AsyncClient(address) as client:
        say(started=time.time())
        dataset = await client.upload_dataset(path, name="chats", on_progress=sent, on_hashing=hashed)
        say(sha256=dataset.sha256, rows=dataset.rows)


if __name__ == "__main__":
    asyncio.run(_send(sys.argv[1], Path(sys.argv[2])))
