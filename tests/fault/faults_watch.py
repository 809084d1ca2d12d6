"""Watchers that do not read, and very many of them; and requests that are no requests."""

import asyncio
import functools
import hashlib
import json
import random
import signal
import sys
from typing import Any

import grpc
import grpc.aio
from daemon import small
from fault.recording import Sightings
from fault.scenario import Result, Stage, run
from fault.site import until

from luthier.v1 import datasets_pb2 as ds
from luthier.v1 import fine_tuning_pb2 as ft
from luthier.v1 import models_pb2 as md
from luthier.v1.job_pb2 import Hyperparameters

STALLED = 100
_PADDING = 40_000


async def stalled(seed: int, count: int, real: bool) -> Result:
    """A hundred watchers in a process that stands still: nobody else is held up, the server lets them go after its
    limit, and when the process goes on they resume and have seen all of the log."""

    async def inject(stage: Stage) -> int:
        for _ in range(stage.count):
            await _stall(stage)
        return STALLED * stage.count

    flags = ("--slow-consumer-seconds=2", "--puppet", f'{{"step_seconds": 0.05, "padding_bytes": {_PADDING}}}')
    return await run("stalled-watchers", seed, count, inject, flags=flags, busy=False)


async def _stall(stage: Stage) -> None:
    site, clients = stage.site, stage.clients
    job = await clients.create(small(hyperparameters=Hyperparameters(max_steps=100)))
    assert job is not None
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "fault.stalled", site.address, job.id, str(STALLED)), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        if await asyncio.wait_for(process.stdout.readline(), 60) != b"ready\n":
            site.recording.complaints.append("the stalled watchers did not begin")
            return
        reader = clients.watch(job.id, plain=True)
        longest = await _longest_silence(reader, 90)
        if not reader.complete or longest > 3:
            site.recording.complaints.append(f"a watcher that reads waited {longest:.1f} s beside those that do not")
        await asyncio.sleep(4)  # longer than the limit after which the server lets go
        process.send_signal(signal.SIGCONT)
        answer = json.loads(await asyncio.wait_for(process.stdout.readline(), 120))
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
        await process.wait()
    stage.notes["streams let go"] += answer["aborted"]
    digest = hashlib.sha256()
    for each in reader.seen:
        digest.update(each.event.SerializeToString(deterministic=True))
    if answer["logs"] != [[digest.hexdigest(), len(reader.seen), STALLED]]:
        site.recording.complaints.append(f"reliable: the stalled watchers saw {answer['logs']}")
    if answer["other"] or not answer["aborted"]:
        site.recording.complaints.append(f"the stalled watchers ended with {answer}")


async def _longest_silence(reader: Sightings, seconds: float) -> float:
    """Waits for a watch's end; returns the longest time in which nothing came."""
    loop = asyncio.get_running_loop()
    began = last = loop.time()
    longest, seen = 0.0, 0
    while not reader.complete and loop.time() - began < seconds:
        await asyncio.sleep(0.02)
        if len(reader.seen) > seen:
            longest, last, seen = max(longest, loop.time() - last), loop.time(), len(reader.seen)
    return longest


async def many(seed: int, count: int, real: bool) -> Result:
    """`count` watchers of one job of about a hundred events; the server is killed half-way."""

    async def inject(stage: Stage) -> int:
        site, clients = stage.site, stage.clients
        job = await clients.create(small(hyperparameters=Hyperparameters(max_steps=90)))
        assert job is not None
        watches = [clients.watch(job.id, plain=True) for _ in range(stage.count)]
        half_way = functools.partial(_past, watches, 45, stage.count / 2)
        if not await until(half_way, 120):
            site.recording.complaints.append("half of the watchers were not half-way in two minutes")
        await site.kill()
        await site.start()
        stage.notes["watchers"] += stage.count
        return 1

    return await run("many-watchers", seed, count, inject, busy=False)


def _past(watches: list[Sightings], sequence: int, many: float) -> bool:
    return sum(watch.position > sequence for watch in watches) >= many


_METHODS: tuple[tuple[str, Any], ...] = (
    (
        "FineTuning/CreateJob",
        ft.CreateJobRequest(spec=small(), request_id="6b1f0c8e-5b7a-4c86-9b5e-1f7a3f0f6b11", validate_only=True),
    ),
    ("FineTuning/GetJob", ft.GetJobRequest(job_id="job_01ARZ3NDEKTSV4RRFFQ69G5FAV")),
    ("FineTuning/ListJobs", ft.ListJobsRequest(page_size=5, labels={"a": "b"}, id_prefix="job_")),
    ("FineTuning/CancelJob", ft.CancelJobRequest(job_id="job_01ARZ3NDEKTSV4RRFFQ69G5FAV")),
    ("FineTuning/PauseJob", ft.PauseJobRequest(job_id="job_01ARZ3NDEKTSV4RRFFQ69G5FAV")),
    ("FineTuning/ResumeJob", ft.ResumeJobRequest(job_id="job_01ARZ3NDEKTSV4RRFFQ69G5FAV")),
    ("FineTuning/DeleteJob", ft.DeleteJobRequest(job_id="job_01ARZ3NDEKTSV4RRFFQ69G5FAV")),
    ("FineTuning/ListCheckpoints", ft.ListCheckpointsRequest(job_id="job_01ARZ3NDEKTSV4RRFFQ69G5FAV")),
    ("FineTuning/WatchJob", ft.WatchJobRequest(job_id="job_01ARZ3NDEKTSV4RRFFQ69G5FAV", after_sequence=3)),
    ("Datasets/GetDataset", ds.GetDatasetRequest(dataset="rows@7")),
    ("Datasets/ListDatasets", ds.ListDatasetsRequest(name="rows")),
    ("Datasets/DeleteDataset", ds.DeleteDatasetRequest(dataset="ds_01ARZ3NDEKTSV4RRFFQ69G5FAV")),
    ("Datasets/UploadDataset", ds.UploadDatasetRequest(metadata=ds.DatasetMetadata(name="other"))),
    ("Models/GetModel", md.GetModelRequest(model_id="model_01ARZ3NDEKTSV4RRFFQ69G5FAV")),
    ("Models/ListModels", md.ListModelsRequest(id_prefix="model_")),
    ("Models/DownloadModel", md.DownloadModelRequest(model_id="model_01ARZ3NDEKTSV4RRFFQ69G5FAV")),
)
_STREAMING = frozenset({"FineTuning/WatchJob", "Models/DownloadModel"})
_CLEAR = frozenset(
    {
        grpc.StatusCode.OK,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)


async def malformed(seed: int, count: int, real: bool) -> Result:
    """Random bytes, sound requests with a few bytes changed, bad UTF-8, and now and then five megabytes, to every
    method, while jobs run. Each gets a clear status, and the server's log knows of no bug."""

    async def inject(stage: Stage) -> int:
        channel = grpc.aio.insecure_channel(
            stage.site.address,
            options=[("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)],
        )
        queue = iter(range(stage.count))

        async def throw() -> None:
            for number in queue:
                name, sound = _METHODS[number % len(_METHODS)]
                body = _bytes(stage.dice, sound.SerializeToString(), number)
                code = await _status(channel, name, body)
                stage.notes[code.name] += 1
                if code not in _CLEAR:
                    stage.site.recording.complaints.append(f"{name} answers {code.name} to {body[:200].hex()}")

        await asyncio.gather(*(throw() for _ in range(16)))
        await channel.close()
        return stage.count

    return await run("malformed", seed, count, inject, real=real)


def _bytes(dice: random.Random, sound: bytes, number: int) -> bytes:
    if number % 997 == 5:
        return b"\x0a" + dice.randbytes(5 * 2**20)
    kind = dice.randrange(4)
    if kind == 0:
        return dice.randbytes(dice.randrange(300))
    if kind == 1:
        return bytes([0x0A, 0x04]) + b"\xff\xfe\xc3\x28" + sound  # field 1 as a string that is no UTF-8
    body = bytearray(sound)
    for _ in range(dice.randrange(1, 6)):
        where = dice.randrange(len(body))
        if kind == 2:
            body[where] = dice.randrange(256)
        else:
            body[where:where] = dice.randbytes(dice.randrange(1, 20))
    return bytes(body)


async def _status(channel: grpc.aio.Channel, name: str, body: bytes) -> grpc.StatusCode:
    path = f"/luthier.v1.{name}"
    try:
        if name in _STREAMING:
            stream: Any = channel.unary_stream(path, None, None)
            async for _ in stream(body, timeout=30):
                pass
        elif name == "Datasets/UploadDataset":
            upload: Any = channel.stream_unary(path, None, None)
            await upload(iter([body]), timeout=30)
        else:
            unary: Any = channel.unary_unary(path, None, None)
            await unary(body, timeout=30)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK
