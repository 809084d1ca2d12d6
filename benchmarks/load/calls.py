"""Unary calls at a fixed concurrency: `python -m benchmarks.load.calls ADDRESS METHOD DATASET_OR_JOB CALLS CONCURRENCY`
prints the milliseconds of each call as JSON."""

import asyncio
import json
import sys
import time

import grpc

from benchmarks.daemon import small
from luthier.v1 import fine_tuning_pb2 as ft
from luthier.v1 import fine_tuning_pb2_grpc

_WARM_UP = 5


async def _load(address: str, method: str, subject: str, calls: int, concurrency: int) -> list[float]:
    milliseconds: list[float] = []
    async with grpc.aio.insecure_channel(address) as channel:
        stub = fine_tuning_pb2_grpc.FineTuningStub(channel)
        spec = small(subject) if method == "CreateJob" else None

        async def call() -> None:
            if spec is not None:
                await stub.CreateJob(ft.CreateJobRequest(spec=spec))
            else:
                await stub.GetJob(ft.GetJobRequest(job_id=subject))

        async def caller(count: int) -> None:
            for _ in range(count):
                begin = time.perf_counter()
                await call()
                milliseconds.append((time.perf_counter() - begin) * 1000)

        for _ in range(_WARM_UP):
            await call()
        await asyncio.gather(*(caller(calls // concurrency) for _ in range(concurrency)))
    return milliseconds


if __name__ == "__main__":
    server, name, about, number, parallel = sys.argv[1:]
    print(json.dumps(asyncio.run(_load(server, name, about, int(number), int(parallel)))))
