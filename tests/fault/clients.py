"""Clients around a site: they create, watch, cancel, pause and resume jobs, and note all that they are told."""

import asyncio
import contextlib
import random
import time
import uuid
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
from daemon import ROWS
from fault.recording import Answer, Sighting, Sightings
from fault.site import Site
from google.protobuf.message import Message

from luthier.v1 import datasets_pb2 as ds
from luthier.v1 import datasets_pb2_grpc, fine_tuning_pb2_grpc, models_pb2_grpc
from luthier.v1 import fine_tuning_pb2 as ft
from luthier.v1 import models_pb2 as md
from luthier.v1.event_pb2 import JobEvent
from luthier.v1.export_task_pb2 import ExportTask, GgufExport
from luthier.v1.job_pb2 import Job, JobSpec, JobState
from luthier_client import AsyncClient, WatchOptions, errors

ENDED = frozenset({JobState.JOB_STATE_SUCCEEDED, JobState.JOB_STATE_FAILED, JobState.JOB_STATE_CANCELLED})
_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 200),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", -1),
)
_PASSES = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)
_PAUSE = 0.1


class Clients:
    """`new_spec` makes the spec of a job; `tolerant` clients take an INTERNAL for a reason to ask again; with `exports`
    some of the jobs export what others have made."""

    def __init__(
        self,
        site: Site,
        dice: random.Random,
        new_spec: Callable[[random.Random], JobSpec],
        *,
        tolerant: bool = False,
        exports: bool = False,
    ) -> None:
        self.site = site
        self.jobs: dict[str, Job] = {}
        self.stepped = asyncio.Event()
        self._dice = dice
        self._new_spec = new_spec
        self._tolerant = tolerant
        self._exports = exports
        self._channel = grpc.aio.insecure_channel(site.address, options=_OPTIONS)
        self.fine_tuning: Any = fine_tuning_pb2_grpc.FineTuningStub(self._channel)
        self.models: Any = models_pb2_grpc.ModelsStub(self._channel)
        self.datasets: Any = datasets_pb2_grpc.DatasetsStub(self._channel)
        self._client = AsyncClient(site.address)
        self._watches: list[asyncio.Task[None]] = []
        self._work: list[asyncio.Task[None]] = []
        self._working = True

    # Calls

    async def call(self, method: Any, request: Message, *, seconds: float = 60) -> Any:
        """The answer, or None when the call is refused for good. Asks again as long as that can help."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                return await method(request, timeout=10, wait_for_ready=True)
            except grpc.aio.AioRpcError as error:
                if time.monotonic() > deadline:
                    self._complain(f"{type(request).__name__} got no answer in {seconds:.0f} s: {_words(error)}")
                    return None
                if error.code() in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.NOT_FOUND):
                    return None
                if not self._passes(error):
                    self._complain(f"{type(request).__name__}: {_words(error)}")
                    return None
            await asyncio.sleep(_PAUSE)

    def _passes(self, error: grpc.aio.AioRpcError) -> bool:
        broken = error.code() == grpc.StatusCode.INTERNAL and "RST_STREAM" in str(error.details())
        return error.code() in _PASSES or broken or (self._tolerant and error.code() == grpc.StatusCode.INTERNAL)

    def _complain(self, text: str) -> None:
        self.site.recording.complaints.append(f"life {self.site.life}: {text}")

    def _note(self, response: Any, request_id: str = "") -> Job | None:
        if response is None:
            return None
        job: Job = response.job
        self.site.recording.answers.append(Answer(self.site.life, job, request_id))
        self.jobs[job.id] = job
        return job

    async def upload(self, content: bytes = ROWS) -> None:
        """Uploads the dataset `rows`."""
        parts = [
            ds.UploadDatasetRequest(metadata=ds.DatasetMetadata(name="rows")),
            ds.UploadDatasetRequest(chunk=content),
        ]
        await self.datasets.UploadDataset(iter(parts), timeout=60, wait_for_ready=True)

    async def create(self, spec: JobSpec | None = None) -> Job | None:
        """Creates a job, without a spec also one that exports what an earlier one has made; the same request goes out
        again, sometimes also after it was answered."""
        models = [job.model_id for job in self.jobs.values() if job.model_id] if spec is None and self._exports else []
        request_id = str(uuid.uuid4())
        method: Any = self.fine_tuning.CreateJob
        request: Message
        if models and self._dice.random() < 0.3:
            task = ExportTask(model=self._dice.choice(models), gguf=GgufExport())
            method, request = self.models.ExportModel, md.ExportModelRequest(export=task, request_id=request_id)
        else:
            request = ft.CreateJobRequest(spec=spec or self._new_spec(self._dice), request_id=request_id)
        job = self._note(await self.call(method, request), request_id)
        if job is not None and self._dice.random() < 0.3:
            self._note(await self.call(method, request), request_id)
        return job

    async def get(self, job_id: str) -> Job | None:
        """The job now."""
        return self._note(await self.call(self.fine_tuning.GetJob, ft.GetJobRequest(job_id=job_id)))

    # Watches

    def watch(self, job_id: str, after: int = 0, *, plain: bool = False, leaves: bool = False) -> Sightings:
        """Begins to watch: through luthier_client, or `plain` by the stub, where it may leave and come back."""
        name = "a plain watch" if plain else "luthier_client's watch"
        sightings = Sightings(name, job_id, after)
        self.site.recording.watchers.append(sightings)
        watching = self._watch_plain(sightings, leaves) if plain else self._watch_by_client(sightings)
        self._watches.append(asyncio.create_task(watching))
        return sightings

    def _see(self, sightings: Sightings, event: JobEvent) -> None:
        sightings.seen.append(Sighting(self.site.life, event))
        if event.HasField("step_completed"):
            self.stepped.set()

    async def _watch_by_client(self, sightings: Sightings) -> None:
        options = WatchOptions(longest_pause=0.5)
        while True:
            try:
                handle = await self._client.get_job(sightings.job_id)
                async with contextlib.aclosing(handle.watch(sightings.position, options=options)) as events:
                    async for event in events:
                        self._see(sightings, event)
                sightings.complete = True
                return
            except errors.SequenceGap as error:
                sightings.complaints.append(f"ordered, unique: {error}")
                return
            except (errors.Unavailable, errors.DeadlineExceeded):
                pass
            except errors.LuthierError as error:
                if not self._tolerant:
                    sightings.complaints.append(f"{type(error).__name__}: {error}")
                    return
            await asyncio.sleep(_PAUSE)

    async def _watch_plain(self, sightings: Sightings, leaves: bool) -> None:
        history_id = ""
        while True:
            stays = self._dice.choice((1, 3, 10, 1000)) if leaves else 1 << 30
            request = ft.WatchJobRequest(
                job_id=sightings.job_id, after_sequence=sightings.position, history_id=history_id
            )
            call = self.fine_tuning.WatchJob(request)
            try:
                async for response in call:
                    history_id = response.history_id
                    for event in response.events:
                        self._see(sightings, event)
                    if response.cursor != sightings.position:
                        sightings.complaints.append(f"cursor {response.cursor} at {sightings.position}")
                    stays -= max(1, len(response.events))
                    if stays <= 0:
                        break
                else:
                    sightings.complete = True
                    return
            except grpc.aio.AioRpcError as error:
                if not self._passes(error):
                    sightings.complaints.append(_words(error))
                    return
            finally:
                call.cancel()
            await asyncio.sleep(_PAUSE * self._dice.random())

    # Work

    def start(self, *, open_jobs: int = 3, meddle: bool = True) -> None:
        """Keeps so many jobs on their way, watched by several; with `meddle` some are cancelled, paused, resumed."""
        self._work.append(asyncio.create_task(self._keep(open_jobs)))
        if meddle:
            self._work.append(asyncio.create_task(self._meddle()))

    async def _keep(self, open_jobs: int) -> None:
        while self._working:
            for job in self.open():
                await self.get(job.id)
            if len(self.open()) < open_jobs and (made := await self.create()):
                self.watch(made.id)
                self.watch(made.id, plain=True, leaves=True)
            await asyncio.sleep(0.3)

    async def _meddle(self) -> None:
        while self._working:
            await asyncio.sleep(self._dice.uniform(0.3, 1.5))
            if not (open_jobs := self.open()):
                continue
            job_id = self._dice.choice(open_jobs).id
            kind = self._dice.choice(("Cancel", "Pause", "Pause", "Resume", "Resume", "Resume"))
            request = getattr(ft, f"{kind}JobRequest")(job_id=job_id)
            self._note(await self.call(getattr(self.fine_tuning, f"{kind}Job"), request))

    def open(self) -> list[Job]:
        """Jobs that had not ended when they were last seen."""
        return [job for job in self.jobs.values() if job.state not in ENDED]

    async def step(self, seconds: float = 30) -> None:
        """Returns when some watcher sees a step, or after so long without one."""
        self.stepped.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.stepped.wait(), seconds)

    async def finish(self, seconds: float = 90) -> None:
        """No more work; what is open goes on to its end, which must come, and so must the end of every watch."""
        self._working = False
        await asyncio.gather(*self._work)  # each call to its answer: a request that is given up may still make a job
        listed = await self.call(self.fine_tuning.ListJobs, ft.ListJobsRequest(page_size=1000))
        for job in listed.jobs if listed is not None else ():
            self.site.recording.answers.append(Answer(self.site.life, job))
            self.jobs[job.id] = job
        await self._all_end(seconds)
        for job in self.jobs.values():
            after = self._dice.randrange(job.last_sequence + 1)
            self.watch(job.id, after, plain=True)
        _, late = await asyncio.wait(self._watches, timeout=20) if self._watches else ((), ())
        if late:
            self._complain(f"stuck: {len(late)} watches did not end")
        for ended in self._watches:
            if ended.done() and not ended.cancelled() and (error := ended.exception()):
                self._complain(f"a watch broke: {error!r}")

    async def succeed(self, spec: JobSpec) -> None:
        """A job into which nothing is injected any more: unless it succeeds, the faults left harm, or hid it."""
        job = await self.create(spec)
        if job is not None:
            self.watch(job.id)
            await self._all_end(90)
            job = self.jobs[job.id]
        if job is None or job.state != JobState.JOB_STATE_SUCCEEDED:
            self._complain(f"a job after all faults did not succeed: {job}")

    async def _all_end(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.open() and time.monotonic() < deadline:
            for job in self.open():
                if (now := await self.get(job.id)) is not None and now.state == JobState.JOB_STATE_PAUSED:
                    request = ft.ResumeJobRequest(job_id=job.id)
                    self._note(await self.call(self.fine_tuning.ResumeJob, request))
            await asyncio.sleep(0.1)
        for job in self.open():
            self._complain(f"stuck: {job.id} is {JobState.Name(job.state)} at step {job.progress.step}, no fault left")

    async def close(self) -> None:
        """Ends every call."""
        await _cancel([*self._work, *self._watches])
        await self._client.close()
        await self._channel.close()


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _words(error: grpc.aio.AioRpcError) -> str:
    return f"{error.code().name} {str(error.details())[:200]}"
