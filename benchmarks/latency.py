"""From CreateJob to the first StepCompleted at a client, through the real server and a real trainer on builtin/tiny."""

import time

from benchmarks.aims import Aim, Section
from benchmarks.console import say, step, table
from benchmarks.daemon import Daemon, daemon, until
from benchmarks.numbers import median
from luthier.v1 import fine_tuning_pb2 as ft


def measure(*, quick: bool) -> Section:
    """Warm: the trainer host has imported torch, the dataset is new to it. Cold: nothing but the server runs."""
    say("Latency of a job: CreateJob to the first step, builtin/tiny, a dataset not seen before")
    warm, cold = _warm(2 if quick else 5), _cold(1 if quick else 2)
    rows = [
        (name, f"{median(samples):.2f} s", f"{min(samples):.2f}", f"{max(samples):.2f}", str(len(samples)))
        for name, samples in (("warm trainer host", warm), ("cold, no trainer host", cold))
    ]
    table(("", "median", "least", "most", "jobs"), rows)
    aim = Aim("job_latency_warm", "CreateJob to the first step, warm, median", median(warm), 2.0, "lower", "s")
    return Section({"warm_seconds": warm, "cold_seconds": cold}, (aim,))


def interleaved(jobs: int) -> tuple[list[float], list[float]]:
    """Seconds of so many jobs from a warm trainer host, and of as many from nothing, in turn."""
    warm, cold = [], []
    with daemon("--warm", "on") as server:
        with step("warming the trainer host"):
            until(lambda: _host_is_warm(server), 120, "a warm trainer host")
        for number in range(jobs):
            server.upload(f"warm-{number}", seed=number)
            with step(f"pair {number + 1} of {jobs}"):
                warm.append(round(_first_step(server, f"warm-{number}"), 3))
                cold += _cold(1)
    return warm, cold


def _first_step(server: Daemon, dataset: str) -> float:
    begin = time.perf_counter()
    job = server.create(dataset)
    for response in server.fine_tuning.WatchJob(ft.WatchJobRequest(job_id=job.id), timeout=90):
        if any(event.HasField("step_completed") for event in response.events):
            seconds = time.perf_counter() - begin
            break
    else:
        raise RuntimeError(f"the job made no step: {server.get(job.id).error.message}")
    server.wait(job.id)
    return seconds


def _host_is_warm(server: Daemon) -> bool:
    try:
        return server.host().warm
    except OSError:
        return False


def _warm(jobs: int) -> list[float]:
    with daemon("--warm", "on") as server:
        with step("warming the trainer host"):
            until(lambda: _host_is_warm(server), 120, "a warm trainer host")
        samples = []
        for number in range(jobs):
            server.upload(f"warm-{number}", seed=number)
            with step(f"warm job {number + 1} of {jobs}"):
                samples.append(round(_first_step(server, f"warm-{number}"), 3))
        return samples


def _cold(jobs: int) -> list[float]:
    samples = []
    for number in range(jobs):
        with daemon("--warm", "off") as server, step(f"cold job {number + 1} of {jobs}"):
            server.upload("cold")
            samples.append(round(_first_step(server, "cold"), 3))
    return samples
