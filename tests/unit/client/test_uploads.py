"""Uploads that break off, go on, and are not sent twice; on both stacks."""

import asyncio
import hashlib
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from unit.client.fake_server import FakeServer

from luthier_client import AsyncClient, Client, errors
from luthier_client.persistence import Persistence
from luthier_client.upload import CHUNK, broke_off, open_upload

ROW = b'{"prompt": "a", "completion": "b"}\n'


def content_of(chunks: float, first: bytes = ROW) -> bytes:
    """Rows of about so many chunks."""
    return first + ROW * int(CHUNK * chunks / len(ROW))


def upload(stack: str, endpoint: str, *arguments: Any, **named: Any) -> Any:
    """What `upload` of one of the two clients returns."""

    async def run() -> Any:
        async with AsyncClient(endpoint) as client:
            return await client.upload(*arguments, **named)

    if stack == "async":
        return asyncio.run(run())
    with Client(endpoint) as client:
        return client.upload(*arguments, **named)


STACKS = pytest.mark.parametrize("stack", ["sync", "async"])


@STACKS
def test_an_upload_that_breaks_off_goes_on_where_it_was(own_server: FakeServer, tmp_path: Path, stack: str) -> None:
    content = content_of(7.5)
    file = tmp_path / "cards.jsonl"
    file.write_bytes(content)
    seen: list[tuple[int, int]] = []
    response = upload(stack, own_server.endpoint, file, name="break-2-cards", on_progress=lambda *at: seen.append(at))
    assert response.created and response.dataset.sha256 == hashlib.sha256(content).hexdigest()
    offsets = [int(call["request"].get("offset", 0)) for call in own_server.calls("UploadDataset")]
    assert offsets == [0, 2 * CHUNK, 4 * CHUNK]
    assert own_server.calls("Chunks")[-1]["chunks"] == 4
    # The bar starts where the upload goes on.
    assert seen[0] == (0, len(content)) and seen[-1] == (len(content), len(content))
    assert (2 * CHUNK, len(content)) in seen and (4 * CHUNK, len(content)) in seen


@STACKS
def test_an_upload_outlives_a_killed_server_and_goes_on(own_server: FakeServer, tmp_path: Path, stack: str) -> None:
    content = content_of(60)
    file = tmp_path / "slow.jsonl"
    file.write_bytes(content)
    done: list[Any] = []
    thread = threading.Thread(target=lambda: done.append(upload(stack, own_server.endpoint, file, name="slow-cards")))
    thread.start()
    part = own_server.root / "parts" / hashlib.sha256(content).hexdigest()
    deadline = time.monotonic() + 20
    while not (part.exists() and part.stat().st_size > len(content) / 4):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    own_server.kill()
    there = part.stat().st_size
    time.sleep(0.7)
    own_server.start()
    thread.join(timeout=30)
    assert done[0].dataset.sha256 == hashlib.sha256(content).hexdigest()
    uploads = [int(call["request"].get("offset", 0)) for call in own_server.calls("UploadDataset")]
    assert uploads == [0, there] and there >= len(content) / 4


@STACKS
def test_a_new_client_goes_on_with_what_another_one_left(own_server: FakeServer, stack: str) -> None:
    content = content_of(4)
    parts = own_server.root / "parts"
    (parts / hashlib.sha256(content).hexdigest()).write_bytes(content[:100])
    assert upload(stack, own_server.endpoint, content, name="cards").created
    assert own_server.calls("UploadDataset")[0]["request"]["offset"] == "100"


@STACKS
def test_bytes_that_the_server_has_are_not_sent(own_server: FakeServer, stack: str) -> None:
    content = content_of(3)
    assert upload(stack, own_server.endpoint, content, name="one").created
    again = upload(stack, own_server.endpoint, content, name="one")
    other = upload(stack, own_server.endpoint, content, name="two")
    assert (again.created, other.created) == (False, True)
    assert [call["chunks"] for call in own_server.calls("Chunks")] == [4, 0, 0]


@STACKS
def test_an_older_server_gets_the_whole_file(own_server: FakeServer, stack: str) -> None:
    (own_server.root / "old").touch()
    content = content_of(3.5)
    response = upload(stack, own_server.endpoint, content, name="break-1-cards")
    assert response.dataset.size_bytes == len(content)
    assert [call["request"].get("offset") for call in own_server.calls("UploadDataset")] == [None, None]


def test_a_server_that_was_never_met_is_given_up_soon(tmp_path: Path) -> None:
    started = time.monotonic()
    with Client("127.0.0.1:1") as client, pytest.raises(errors.Unavailable) as caught:
        client.upload_dataset(b"{}", name="cards")
    assert caught.value.reason == "UNREACHABLE" and time.monotonic() - started < 10


def test_a_server_that_stays_away_is_given_up_after_a_while_and_bytes_renew_the_hope() -> None:
    lost = errors.Unavailable("broke", reason="CONNECTION_LOST")
    patient = Persistence(patience=0.2)
    patient.met(0)
    with pytest.raises(errors.Unavailable):
        while True:
            patient.pause_after(lost)
            time.sleep(0.01)
    patient.met(1)
    assert patient.pause_after(lost) > 0
    busy = Persistence(passing=broke_off)
    failed = errors.Unavailable("a worker failed", reason="UNAVAILABLE")
    for _ in range(3):
        busy.met(5)
        assert busy.pause_after(failed) > 0
    with pytest.raises(errors.Unavailable):
        busy.pause_after(failed)
    # Somebody else's upload of the same bytes has moved the offset; a newer one that took over is left alone.
    busy.met(6)
    assert busy.pause_after(errors.Aborted("go on elsewhere", reason="UPLOAD_OFFSET")) > 0
    for final in (
        errors.Aborted("a newer one", reason="UPLOAD_SUPERSEDED"), errors.InvalidDataset("no", reason="DATASET_INVALID")
    ):  # fmt: skip
        with pytest.raises(type(final)):
            busy.pause_after(final)


@STACKS
def test_a_server_that_refuses_in_the_middle_is_understood(own_server: FakeServer, stack: str) -> None:
    content = content_of(12)
    for _ in range(5):
        with pytest.raises(errors.ResourceExhausted) as caught:
            upload(stack, own_server.endpoint, content, name="huge")
        assert caught.value.reason == "TOO_LARGE"
    assert len(own_server.calls("UploadDataset")) == 5


async def test_an_upload_that_is_cancelled_ends_and_closes_its_file(own_server: FakeServer, tmp_path: Path) -> None:
    file = tmp_path / "cards.jsonl"
    file.write_bytes(content_of(200))
    seen: list[int] = []
    begun = asyncio.Event()

    def told(done: int, _: int) -> None:
        seen.append(done)
        if len(seen) == 3:
            begun.set()

    async with AsyncClient(own_server.endpoint) as client:
        task = asyncio.create_task(client.upload(file, name="slow", on_progress=told))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        count = len(seen)
        await asyncio.sleep(0.2)
        assert len(seen) <= count + 2 and seen[-1] < file.stat().st_size
        assert (await client.upload(b"{}", name="other")).created


@STACKS
def test_how_a_file_is_read_travels_with_it(own_server: FakeServer, stack: str) -> None:
    upload(
        stack, own_server.endpoint, content_of(0.1), name="cards", file_format="csv", format="prompt-completion",
        columns={"prompt": "question"},
    )  # fmt: skip
    assert own_server.calls("UploadDataset")[0]["request"]["reading"] == {
        "file_format": "FILE_FORMAT_CSV", "format": "DATASET_FORMAT_PROMPT_COMPLETION",
        "columns": {"prompt": "question"},
    }  # fmt: skip
    with pytest.raises(ValueError, match="messages, prompt_completion"):
        upload(stack, own_server.endpoint, b"{}", name="cards", format="chats")


async def test_validation_brings_the_report_also_of_what_is_wrong_and_keeps_nothing(own_server: FakeServer) -> None:
    with Client(own_server.endpoint) as client:
        report = client.validate_dataset(b'{"a": 1}\noops\n')
        assert [(each.code, each.line) for each in report.findings] == [("NOT_JSON", 2)]
        assert list(client.list_datasets()) == []
    async with AsyncClient(own_server.endpoint) as other:
        assert (await other.validate_dataset(b'{"a": 1}\noops\n')) == report
    assert all(call["request"]["validate_only"] for call in own_server.calls("UploadDataset"))


async def test_hashing_is_told_and_leaves_the_event_loop_alone(endpoint: str, tmp_path: Path) -> None:
    file = tmp_path / "hashed.jsonl"
    file.write_bytes(content_of(20))
    threads: set[str] = set()
    seen: list[tuple[int, int]] = []

    def hashing(done: int, total: int) -> None:
        threads.add(threading.current_thread().name)
        seen.append((done, total))

    async with AsyncClient(endpoint) as client:
        await client.upload_dataset(file, on_hashing=hashing)
    size = file.stat().st_size
    assert threading.current_thread().name not in threads
    assert len(seen) > 3 and seen[-1] == (size, size) and seen == sorted(seen)


def test_a_big_file_is_hashed_and_read_without_being_held(tmp_path: Path) -> None:
    file = tmp_path / "big.jsonl"
    with file.open("wb") as target:
        target.truncate(200 * 1024 * 1024)
    tracemalloc.start()
    opened = open_upload(file, "big")
    total = sum(len(request.chunk) for request in opened.requests())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    opened.close()
    assert total == 200 * 1024 * 1024
    assert peak < 8 * 1024 * 1024


def test_a_try_that_outlives_its_upload_reads_nothing_more(tmp_path: Path) -> None:
    upload = open_upload(content_of(3), "cards")
    requests = upload.requests()
    next(requests)
    next(requests)
    upload.close()
    assert list(requests) == []
