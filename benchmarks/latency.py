"""From CreateJob to the first StepCompleted at a client, through the real server and a real trainer on builtin/tiny."""

import json
import random
import time

from benchmarks.aims import Aim, Section
from benchmarks.console import say, step, table
from benchmarks.daemon import Daemon, daemon, until
from benchmarks.numbers import median
from luthier.v1 import fine_tuning_pb2 as ft

_MANY = 100_000
_FEW = 100
_TEXT = "the a model of train step row data loss rate token batch epoch cache file line time state check log"


def measure(*, quick: bool) -> Section:
    """Warm: the trainer host has imported torch, the dataset is new to it. Cold: nothing but the server runs. Many
    rows: warm, 100,000 chats that are not tokenised yet, beside 100 such chats, one after the other."""
    say("Latency of a job: CreateJob to the first step, builtin/tiny, a dataset not seen before")
    warm, cold = _warm(2 if quick else 5), _cold(1 if quick else 2)
    few, many = _few_and_many(1 if quick else 3)
    measured = (
        ("warm trainer host", warm),
        ("cold, no trainer host", cold),
        (f"{_FEW} chats, not tokenised yet", few),
        (f"{_MANY:,} chats, not tokenised yet", many),
    )
    rows = [
        (name, f"{median(samples):.2f} s", f"{min(samples):.2f}", f"{max(samples):.2f}", str(len(samples)))
        for name, samples in measured
    ]
    table(("", "median", "least", "most", "jobs"), rows)
    delay = round(median(many) - median(few), 3)
    text = f"what {_MANY:,} rows that are not tokenised delay the first step, medians"
    aims = (
        Aim("job_latency_warm", "CreateJob to the first step, warm, median", median(warm), 1.0, "lower", "s"),
        Aim("job_latency_many_rows", text, delay, 2.0, "lower", "s"),
    )
    numbers = {"warm_seconds": warm, "cold_seconds": cold, "few_rows_seconds": few, "many_rows_seconds": many}
    return Section(numbers, aims)


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


def _first_step(server: Daemon, dataset: str, *, whole: bool = True) -> float:
    """Seconds; then the job goes on to its end, or is cancelled unless the `whole` of it is wanted."""
    begin = time.perf_counter()
    job = server.create(dataset)
    for response in server.fine_tuning.WatchJob(ft.WatchJobRequest(job_id=job.id), timeout=90):
        if any(event.HasField("step_completed") for event in response.events):
            seconds = time.perf_counter() - begin
            break
    else:
        raise RuntimeError(f"the job made no step: {server.get(job.id).error.message}")
    if not whole:
        server.fine_tuning.CancelJob(ft.CancelJobRequest(job_id=job.id))
        until(lambda: server.get(job.id).end_time.seconds, 60, "the end of the job")
        return seconds
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


def _few_and_many(rounds: int) -> tuple[list[float], list[float]]:
    few: list[float] = []
    many: list[float] = []
    with daemon("--warm", "on") as server:
        with step("warming the trainer host"):
            until(lambda: _host_is_warm(server), 120, "a warm trainer host")
        for number in range(rounds):
            for samples, count in ((few, _FEW), (many, _MANY)):
                name = f"chats-{count}-{number}"
                with step(f"uploading {count:,} chats"):
                    server.upload_file(name, _chats(count, number))
                with step(f"job {number + 1} of {rounds} on {count:,} chats"):
                    samples.append(round(_first_step(server, name, whole=False), 3))
    return few, many


def _chats(count: int, seed: int) -> bytes:
    """About 100 tokens each; no two seeds have a row in common."""
    draws = random.Random(seed)

    def words(least: int, most: int) -> str:
        return " ".join(draws.choices(_TEXT.split(" "), k=draws.randint(least, most)))

    turns = ((f"{count} {seed} {number}: {words(10, 50)}?", f"{words(20, 60)}.") for number in range(count))
    lines = (
        json.dumps({"messages": [{"role": "user", "content": asks}, {"role": "assistant", "content": answers}]})
        for asks, answers in turns
    )
    return ("\n".join(lines) + "\n").encode()
