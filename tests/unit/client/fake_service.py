"""The contract's services in memory, for tests of the client: a real grpc.aio server in a process of its own.

What a job does is written in its labels, so a test says it with CreateJob and no back door:

    steps=N pace=SECONDS        optimizer steps, and the time between two events (0: all events are there at once)
    outcome=failed              ends FAILED with LOSS_NOT_FINITE
    retry_at=K                  the first attempt is lost after step K; the second goes on from step K - 2
    retry_wait=SECONDS          how long it waits before that, with its retry_time
    unequal=1                   the check of whatever goes on finds another loss
    queued=SECONDS              how long it waits in the queue
    break=CODE:REASON:K         every stream ends with this status after K events, until the log is through
    hole=K                      sequence K is never sent
    checked=1                   its datasets are checked for its base model first
    silent=K                    every stream ends OK after K events, as a careless handler would

A job's log is a function of its stored row (spec, creation, rests, cancel), kept in `--state`: a server that is killed
and started again goes on with the same log and the same history, as the real one does. Every request of CreateJob and
WatchJob is written to `STATE/calls.jsonl`. With `--token` each call but health needs it, and whether it came is written
there too.
"""

import argparse
import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from google.protobuf import json_format
from google.rpc import error_details_pb2
from unit.client.fake_datasets import FakeDatasets
from unit.client.fake_guard import Guard, info, status
from unit.client.fake_log import log_of
from unit.client.fake_models import FakeModels

from luthier.v1 import datasets_pb2_grpc, fine_tuning_pb2_grpc, models_pb2_grpc
from luthier.v1 import event_pb2 as ev
from luthier.v1 import fine_tuning_pb2 as ft
from luthier.v1 import job_pb2 as jb
from luthier.v1.dataset_pb2 import Dataset
from luthier.v1.estimate_pb2 import JobEstimate

VERSION = "9.8.7"


class State:
    """The rows, on disk so that they outlive the process."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.rows: dict[str, dict[str, Any]] = {}
        self.datasets: dict[str, Dataset] = {}
        path = root / "rows.json"
        if path.exists():
            self.rows = json.loads(path.read_text())

    def save(self) -> None:
        (self.root / "rows.json").write_text(json.dumps(self.rows))

    def note(self, **call: Any) -> None:
        with open(self.root / "calls.jsonl", "a") as file:
            file.write(json.dumps(call) + "\n")


def spec_of(row: dict[str, Any]) -> jb.JobSpec:
    return json_format.ParseDict(row["spec"], jb.JobSpec())


class Services(fine_tuning_pb2_grpc.FineTuningServicer):
    def __init__(self, state: State) -> None:
        self.state = state
        self.refusals: dict[str, int] = {}

    def visible(self, job_id: str) -> list[ev.JobEvent]:
        row = self.state.rows[job_id]
        age = time.time() - row["created"]
        return [event for due, event in log_of(job_id, row) if due <= age]

    def job(self, job_id: str) -> jb.Job:
        row = self.state.rows[job_id]
        events = self.visible(job_id)
        job = jb.Job(id=job_id, spec=spec_of(row), history_id="history-1", last_sequence=len(events))
        job.create_time.FromNanoseconds(int(row["created"] * 1e9))
        for event in events:
            job.attempt = event.attempt
            if event.HasField("state_changed"):
                job.state = event.state_changed.state
                job.model_id = event.state_changed.model_id
                job.export_id = event.state_changed.export_id
                if event.state_changed.HasField("error"):
                    job.error.CopyFrom(event.state_changed.error)
            if event.HasField("step_completed"):
                job.progress.step, job.progress.total_steps = (
                    event.step_completed.step,
                    event.step_completed.total_steps,
                )
                job.progress.loss = event.step_completed.loss
        job.queue_position = 2 if job.state == jb.JOB_STATE_QUEUED else 0
        if events[-1].state_changed.reason == "WORKER_LOST":
            wait = float(row["spec"].get("labels", {}).get("retry_wait", 0))
            job.retry_time.FromNanoseconds(events[-1].event_time.ToNanoseconds() + int(wait * 1e9))
        return job

    async def known(self, job_id: str, context: Any) -> None:
        if job_id not in self.state.rows:
            resource = error_details_pb2.ResourceInfo(resource_type="luthier.v1.Job", resource_name=job_id)
            await context.abort(*status(grpc.StatusCode.NOT_FOUND, f"no job {job_id}", info("JOB_NOT_FOUND"), resource))

    async def CreateJob(self, request: Any, context: Any) -> Any:
        self.state.note(method="CreateJob", request_id=request.request_id, validate_only=request.validate_only)
        labels = dict(request.spec.labels)
        refusals = self.refusals.setdefault(request.request_id, int(labels.get("refuse", 0)))
        if refusals:
            self.refusals[request.request_id] -= 1
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromMilliseconds(20)
            await context.abort(*status(grpc.StatusCode.UNAVAILABLE, "draining", info("SERVER_DRAINING"), retry))
        if request.spec.fine_tune.base_model == "bad":
            bad = error_details_pb2.BadRequest()
            bad.field_violations.add(field="spec.fine_tune.base_model", description="no such model")
            bad.field_violations.add(field="spec.fine_tune.hyperparameters.epochs", description="must be >= 0")
            await context.abort(*status(grpc.StatusCode.INVALID_ARGUMENT, "2 violations", info("SPEC_INVALID"), bad))
        digest = hashlib.sha256(request.request_id.encode()).hexdigest()[:16].upper()
        job_id = f"job_01{len(self.state.rows):08d}{digest}"
        row = {"spec": json_format.MessageToDict(request.spec), "created": time.time()}
        known = {each["request_id"]: key for key, each in self.state.rows.items()}
        if request.validate_only:
            return ft.CreateJobResponse(job=jb.Job(spec=request.spec, resolved_spec=request.spec))
        if request.request_id in known:
            return ft.CreateJobResponse(job=self.job(known[request.request_id]))
        self.state.rows[job_id] = {**row, "request_id": request.request_id}
        self.state.save()
        return ft.CreateJobResponse(job=self.job(job_id))

    async def EstimateJob(self, request: Any, context: Any) -> Any:
        estimate = JobEstimate(training_rows=10, total_steps=3, training_tokens=600, fits=True, notes=["of a fake"])
        return ft.EstimateJobResponse(resolved_spec=request.spec, estimate=estimate)

    async def GetJob(self, request: Any, context: Any) -> Any:
        if request.job_id.startswith("error-"):
            await self.fail(request.job_id, context)
        await self.known(request.job_id, context)
        return ft.GetJobResponse(job=self.job(request.job_id))

    async def fail(self, job_id: str, context: Any) -> None:
        """`error-CODE`: that code with every kind of detail; `error-plain-CODE`: without any."""
        name = job_id.removeprefix("error-")
        if name.startswith("plain-"):
            await context.abort(grpc.StatusCode[name.removeprefix("plain-")], "plain words")
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(1500)
        bad = error_details_pb2.BadRequest()
        bad.field_violations.add(field="a.b", description="is wrong")
        await context.abort(*status(grpc.StatusCode[name], f"told {name}", info(f"WHY_{name}", fact="42"), bad, retry))

    async def ListJobs(self, request: Any, context: Any) -> Any:
        jobs = [self.job(job_id) for job_id in sorted(self.state.rows, reverse=True)]
        wanted = dict(request.labels)
        jobs = [
            job
            for job in jobs
            if job.id.startswith(request.id_prefix)
            and (not request.states or job.state in request.states)
            and wanted.items() <= dict(job.spec.labels).items()
        ]
        size, start = request.page_size or 50, int(request.page_token or 0)
        after = start + size
        token = str(after) if after < len(jobs) else ""
        return ft.ListJobsResponse(jobs=jobs[start:after], next_page_token=token)

    async def CancelJob(self, request: Any, context: Any) -> Any:
        await self.known(request.job_id, context)
        row = self.state.rows[request.job_id]
        if self.job(request.job_id).state in (jb.JOB_STATE_SUCCEEDED, jb.JOB_STATE_FAILED):
            await self.refuse("JOB_ENDED", request.job_id, context)
        row.setdefault("cancelled", time.time() - row["created"])
        self.state.save()
        return ft.CancelJobResponse(job=self.job(request.job_id))

    async def refuse(self, reason: str, job_id: str, context: Any) -> None:
        unmet = error_details_pb2.PreconditionFailure()
        unmet.violations.add(type=reason, subject=job_id, description="not in this state")
        await context.abort(*status(grpc.StatusCode.FAILED_PRECONDITION, "not in this state", info(reason), unmet))

    async def PauseJob(self, request: Any, context: Any) -> Any:
        await self.known(request.job_id, context)
        row, state = self.state.rows[request.job_id], self.job(request.job_id).state
        if state in (8, 9, 10):
            await self.refuse("JOB_ENDED", request.job_id, context)
        if state != jb.JOB_STATE_PAUSED:
            row.setdefault("rests", []).append([time.time() - row["created"], None])
            self.state.save()
        return ft.PauseJobResponse(job=self.job(request.job_id))

    async def ResumeJob(self, request: Any, context: Any) -> Any:
        await self.known(request.job_id, context)
        row, state = self.state.rows[request.job_id], self.job(request.job_id).state
        if state in (8, 9, 10):
            await self.refuse("JOB_ENDED", request.job_id, context)
        if state == jb.JOB_STATE_PAUSED:
            row["rests"][-1][1] = time.time() - row["created"]
            self.state.save()
        return ft.ResumeJobResponse(job=self.job(request.job_id))

    async def DeleteJob(self, request: Any, context: Any) -> Any:
        await self.known(request.job_id, context)
        job = self.job(request.job_id)
        if job.state not in (jb.JOB_STATE_PAUSED, 8, 9, 10):
            await self.refuse("JOB_NOT_AT_REST", request.job_id, context)
        del self.state.rows[request.job_id]
        self.state.save()
        return ft.DeleteJobResponse(job=job)

    async def ListCheckpoints(self, request: Any, context: Any) -> Any:
        await self.known(request.job_id, context)
        saved = [e for e in self.visible(request.job_id) if e.HasField("checkpoint_saved")]
        response = ft.ListCheckpointsResponse()
        for event in reversed(saved):
            checkpoint = response.checkpoints.add(name=event.checkpoint_saved.name, job_id=request.job_id)
            checkpoint.step, checkpoint.attempt = event.checkpoint_saved.step, event.attempt
            checkpoint.size_bytes = event.checkpoint_saved.size_bytes
            checkpoint.create_time.CopyFrom(event.event_time)
        return response

    async def WatchJob(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.state.note(method="WatchJob", after=request.after_sequence, history_id=request.history_id)
        await self.known(request.job_id, context)
        if request.history_id not in ("", "history-1"):
            await context.abort(*status(grpc.StatusCode.FAILED_PRECONDITION, "foreign", info("HISTORY_MISMATCH")))
        labels = self.state.rows[request.job_id]["spec"].get("labels", {})
        code, reason, limit = labels.get("break", "::0").split(":")
        silent, hole = int(labels.get("silent", 0)), int(labels.get("hole", 0))
        cursor, sent = request.after_sequence, 0
        if cursor > len(self.visible(request.job_id)):
            await context.abort(*status(grpc.StatusCode.OUT_OF_RANGE, "past", info("POSITION_PAST_HEAD")))
        yield ft.WatchJobResponse(cursor=cursor, history_id="history-1")
        while True:
            await self.known(request.job_id, context)
            events = self.visible(request.job_id)[cursor:]
            for event in events:
                if silent and sent == silent:
                    return
                if code and sent == int(limit):
                    if reason == "KILL":
                        await context.abort(grpc.StatusCode[code], "Socket closed")
                    await context.abort(*status(grpc.StatusCode[code], "again", info(reason)))
                cursor = event.sequence
                sent += 1
                if event.sequence != hole:
                    yield ft.WatchJobResponse(events=[event], cursor=cursor, history_id="history-1")
            await self.known(request.job_id, context)
            if self.job(request.job_id).state in (8, 9, 10) and cursor == len(self.visible(request.job_id)):
                return
            await asyncio.sleep(0.01)


async def _health(_: bytes, context: Any) -> bytes:
    await context.send_initial_metadata((("luthier-version", VERSION),))
    return b"\x08\x01"


async def serve(listen: str, root: Path, token: str) -> None:
    state = State(root)
    guards = [Guard(state.note, token)] if token else []
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)], interceptors=guards)
    services = Services(state)
    fine_tuning_pb2_grpc.add_FineTuningServicer_to_server(services, server)
    datasets_pb2_grpc.add_DatasetsServicer_to_server(FakeDatasets(state), server)
    models_pb2_grpc.add_ModelsServicer_to_server(FakeModels(state, services.job), server)
    check: Any = grpc.unary_unary_rpc_method_handler(_health)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": check}),))
    port = server.add_insecure_port(listen)
    await server.start()
    (root / "port").write_text(str(port))
    print(port, flush=True)  # noqa: T201 - the test that started this process waits for the line
    await server.wait_for_termination()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--listen", default="127.0.0.1:0")
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--token", default="")
    arguments = parser.parse_args()
    asyncio.run(serve(arguments.listen, arguments.state, arguments.token))
