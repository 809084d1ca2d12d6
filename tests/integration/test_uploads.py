"""Uploads that break off go on, are deduplicated by content, and never leave a dataset that is not what was sent."""

import hashlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from daemon import ROWS, Daemon, puppet, reason, until

from luthier.v1 import datasets_pb2 as ds
from luthier.v1.dataset_pb2 import DatasetFormat, DatasetReading, FileFormat
from luthier.v1.dataset_report_pb2 import FindingLevel

Start = Callable[..., Daemon]
CHUNK = 64 * 1024
MANY = b"".join(b'{"prompt": "number %d", "completion": "is %d"}\n' % (n, n) for n in range(60_000))


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    served = Daemon(tmp_path_factory.mktemp("uploads"), puppet(steps=3)).start()
    yield served
    assert "Traceback" not in served.log()
    served.close()


def announced(content: bytes, name: str = "rows", offset: int = 0, **more: Any) -> ds.DatasetMetadata:
    sha256 = hashlib.sha256(content).hexdigest()
    return ds.DatasetMetadata(name=name, sha256=sha256, size_bytes=len(content), offset=offset, **more)


def parts(metadata: ds.DatasetMetadata, content: bytes) -> Iterator[ds.UploadDatasetRequest]:
    yield ds.UploadDatasetRequest(metadata=metadata)
    for start in range(metadata.offset, len(content), CHUNK):
        yield ds.UploadDatasetRequest(chunk=content[start : start + CHUNK])


def received(daemon: Daemon, content: bytes) -> int:
    request = ds.GetUploadRequest(sha256=hashlib.sha256(content).hexdigest())
    return int(daemon.datasets.GetUpload(request).received_bytes)


def break_off(daemon: Daemon, content: bytes, after: int) -> None:
    """Sends `after` bytes, and leaves."""
    enough = threading.Event()

    def some() -> Iterator[ds.UploadDatasetRequest]:
        yield ds.UploadDatasetRequest(metadata=announced(content))
        for start in range(0, after, CHUNK):
            yield ds.UploadDatasetRequest(chunk=content[start : min(start + CHUNK, after)])
        enough.wait(20)

    call = daemon.datasets.UploadDataset.future(some())
    until(lambda: received(daemon, content) >= after - 1024 * 1024, what="the bytes")
    call.cancel()
    enough.set()


def incoming(daemon: Daemon) -> list[Path]:
    return list((daemon.data_dir / "blobs" / "incoming").iterdir())


def test_an_upload_that_broke_off_goes_on_where_it_was_and_has_the_right_hash(daemon: Daemon) -> None:
    content = MANY + b"\n"
    break_off(daemon, content, 2 * 1024 * 1024)
    here = until(lambda: received(daemon, content))
    assert 0 < here < len(content)
    response = daemon.datasets.UploadDataset(parts(announced(content, offset=here), content))
    assert response.created
    assert response.dataset.sha256 == hashlib.sha256(content).hexdigest()
    assert (daemon.data_dir / "blobs" / response.dataset.sha256).read_bytes() == content
    assert not incoming(daemon)


def test_an_upload_goes_on_after_the_server_was_killed(daemons: Start) -> None:
    daemon = daemons()
    break_off(daemon, MANY, 2 * 1024 * 1024)
    daemon.kill()
    daemon.start()
    here = received(daemon, MANY)
    assert here >= 1024 * 1024
    response = daemon.datasets.UploadDataset(parts(announced(MANY, offset=here), MANY))
    assert (daemon.data_dir / "blobs" / response.dataset.sha256).read_bytes() == MANY


def test_an_upload_takes_over_from_one_whose_client_is_silent(daemon: Daemon) -> None:
    content = b"\n\n" + MANY
    stop = threading.Event()

    def silent() -> Iterator[ds.UploadDatasetRequest]:
        yield ds.UploadDatasetRequest(metadata=announced(content))
        yield from (ds.UploadDatasetRequest(chunk=content[n * CHUNK : (n + 1) * CHUNK]) for n in range(32))
        stop.wait(30)

    first = daemon.datasets.UploadDataset.future(silent())
    here = until(lambda: received(daemon, content))
    response = daemon.datasets.UploadDataset(parts(announced(content, offset=here), content))
    assert (daemon.data_dir / "blobs" / response.dataset.sha256).read_bytes() == content
    stop.set()
    with pytest.raises((grpc.RpcError, grpc.FutureCancelledError)):
        first.result()


def test_bytes_that_are_here_need_not_be_sent_again(daemon: Daemon) -> None:
    before = daemon.upload(ROWS, "known")
    assert received(daemon, ROWS) == len(ROWS)
    metadata = announced(ROWS, "other-name", offset=len(ROWS))
    response = daemon.datasets.UploadDataset(iter([ds.UploadDatasetRequest(metadata=metadata)]))
    assert response.created
    assert (response.dataset.sha256, response.dataset.rows) == (before.sha256, 40)
    again = daemon.datasets.UploadDataset(iter([ds.UploadDatasetRequest(metadata=metadata)]))
    assert not again.created
    assert again.dataset.id == response.dataset.id


def test_a_name_that_loses_one_version_keeps_the_bytes_that_another_name_has(daemon: Daemon) -> None:
    content = ROWS + b"\n\n\n"
    one, two = daemon.upload(content, "one"), daemon.upload(content, "two")
    daemon.datasets.DeleteDataset(ds.DeleteDatasetRequest(dataset=one.id))
    blob = daemon.data_dir / "blobs" / two.sha256
    assert blob.read_bytes() == content
    daemon.datasets.DeleteDataset(ds.DeleteDatasetRequest(dataset=two.id))
    assert not blob.exists()


def test_wrong_bytes_behind_an_offset_are_refused_and_start_anew(daemon: Daemon) -> None:
    content = MANY + b"\n\n\n"
    break_off(daemon, content, 2 * 1024 * 1024)
    here = until(lambda: received(daemon, content))
    wrong = content[:-9] + b"tampered\n"
    with pytest.raises(grpc.RpcError) as caught:
        daemon.datasets.UploadDataset(parts(announced(content, offset=here), wrong))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert received(daemon, content) == 0
    assert daemon.datasets.UploadDataset(parts(announced(content), content)).created


def test_an_offset_beyond_what_is_here_is_told(daemon: Daemon) -> None:
    content = ROWS + b"\n\n"
    with pytest.raises(grpc.RpcError) as caught:
        daemon.datasets.UploadDataset(parts(announced(content, offset=17), content))
    assert (caught.value.code(), reason(caught.value)) == (grpc.StatusCode.ABORTED, "UPLOAD_OFFSET")
    with pytest.raises(grpc.RpcError) as caught:
        only = ds.DatasetMetadata(name="rows", offset=17)
        daemon.datasets.UploadDataset(iter([ds.UploadDatasetRequest(metadata=only)]))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_validating_keeps_nothing_and_tells_everything(daemon: Daemon) -> None:
    names = {each.name for each in daemon.datasets.ListDatasets(ds.ListDatasetsRequest()).datasets}
    bad = b'{"prompt": "a", "completion": "b"}\nnot json\n{"prompt": "c"}\n'
    response = daemon.datasets.UploadDataset(parts(announced(bad, "checked-only", validate_only=True), bad))
    assert response.dataset.id == ""
    errors = [each for each in response.report.findings if each.level == FindingLevel.FINDING_LEVEL_ERROR]
    assert {each.line for each in errors} == {2, 3}
    good = daemon.datasets.UploadDataset(parts(announced(ROWS, "checked-only", validate_only=True), ROWS))
    assert good.report.rows == 40
    after = {each.name for each in daemon.datasets.ListDatasets(ds.ListDatasetsRequest()).datasets}
    assert after == names
    assert not incoming(daemon)


def test_the_reading_belongs_to_the_version(daemon: Daemon) -> None:
    content = b"question,answer,why\none,two,three\nfour,five,six\n"
    columns = {"prompt": "question", "completion": "answer"}
    reading = DatasetReading(columns=columns)
    response = daemon.datasets.UploadDataset(parts(announced(content, "mapped", reading=reading), content))
    assert response.dataset.format == DatasetFormat.DATASET_FORMAT_PROMPT_COMPLETION
    assert response.dataset.reading.file_format == FileFormat.FILE_FORMAT_CSV
    assert dict(response.dataset.reading.columns) == columns
    other = DatasetReading(columns={"prompt": "question", "completion": "why"})
    second = daemon.datasets.UploadDataset(parts(announced(content, "mapped", reading=other), content))
    assert (second.created, second.dataset.version) == (True, 2)
    with pytest.raises(grpc.RpcError) as caught:
        daemon.datasets.UploadDataset(parts(announced(content, "unmapped"), content))
    assert reason(caught.value) == "DATASET_INVALID"
    assert "--column" in str(caught.value.details())


def test_parts_that_nobody_goes_on_with_are_cleared_at_a_start(daemons: Start) -> None:
    daemon = daemons()
    break_off(daemon, MANY, 2 * 1024 * 1024)
    daemon.stop()
    [part] = incoming(daemon)
    old = time.time() - 25 * 3600
    os.utime(part, (old, old))
    (daemon.data_dir / "blobs" / "incoming" / "torn").write_bytes(b"x")
    daemon.start()
    assert not incoming(daemon)


def test_two_uploads_of_one_file_at_once_make_one_version(daemon: Daemon) -> None:
    content = MANY + b"\n\n\n\n"
    outcomes: list[object] = []

    def send() -> None:
        for _ in itertools.repeat(None, 20):
            try:
                outcomes.append(daemon.datasets.UploadDataset(parts(announced(content, "both"), content)).dataset.id)
                return
            except grpc.RpcError as error:
                assert error.code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.ABORTED), error
                time.sleep(0.3)

    threads = [threading.Thread(target=send) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(outcomes)) == 1


def test_an_upload_that_was_not_judged_need_not_be_sent_again(daemons: Start) -> None:
    daemon = daemons(*puppet(), "--trainer-python", "/bin/false")
    with pytest.raises(grpc.RpcError) as caught:
        daemon.datasets.UploadDataset(parts(announced(MANY), MANY))
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert received(daemon, MANY) == len(MANY)
    daemon.stop()
    daemon.flags = puppet()
    daemon.start()
    response = daemon.datasets.UploadDataset(parts(announced(MANY, offset=len(MANY)), MANY))
    assert (daemon.data_dir / "blobs" / response.dataset.sha256).read_bytes() == MANY
