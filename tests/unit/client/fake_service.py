"""The contract's services in memory, for tests of the client: a real grpc.aio server in a process of its own.

What a job does is written in its labels, so a test says it with CreateJob and no back door:

    steps=N pace=SECONDS        optimizer steps, and the time between two events (0: all events are there at once)
    outcome=failed              ends FAILED with LOSS_NOT_FINITE
    retry_at=K                  the first attempt is lost after step K; the second goes on from step K - 2
    queued=SECONDS              how long it waits in the queue
    break=CODE:REASON:K         every stream ends with this status after K events, until the log is through
    hole=K                      sequence K is never sent
    silent=K                    every stream ends OK after K events, as a careless handler would

A job's log is a function of its stored row (spec, creation, cancel), kept in `--state`: a server that is killed and
started again goes on with the same log and the same history, as the real one does. Every request of CreateJob and
WatchJob is written to `STATE/calls.jsonl`.
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
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2

from luthier.v1 import datasets_pb2 as ds
from luthier.v1 import datasets_pb2_grpc, fine_tuning_pb2_grpc, models_pb2_grpc
from luthier.v1 import event_pb2 as ev
from luthier.v1 import fine_tuning_pb2 as ft
from luthier.v1 import job_pb2 as jb
from luthier.v1 import models_pb2 as md
from luthier.v1.dataset_pb2 import DATASET_FORMAT_MESSAGES, Dataset
from luthier.v1.model_pb2 import Model, ModelFile

VERSION = "9.8.7"
FILES = {"adapter_config.json": b'{"r": 16}\n', "adapter_model.safetensors": bytes(range(256)) * 3000, "empty.txt": b""}


def _status(code: grpc.StatusCode, message: str, *details: Any) -> tuple[grpc.StatusCode, str, tuple[Any, ...]]:
    packed = []
    for detail in details:
        each = AnyMessage()
        each.Pack(detail)
        packed.append(each)
    status = status_pb2.Status(code=code.value[0], message=message, details=packed)
    return code, message, (("grpc-status-details-bin", status.SerializeToString()),)


def _info(reason: str, **metadata: str) -> Any:
    return error_details_pb2.ErrorInfo(reason=reason, domain="luthier", metadata=metadata)


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


def log_of(job_id: str, row: dict[str, Any]) -> list[tuple[float, ev.JobEvent]]:
    """The whole log as (seconds after creation, event), each dense in its sequence."""
    labels = row["spec"].get("labels", {})
    pace, steps = float(labels.get("pace", 0)), int(labels.get("steps", 3))
    due, attempt, sequence = 0.0, 0, 0
    entries: list[tuple[float, ev.JobEvent]] = []

    def add(**payload: Any) -> None:
        nonlocal due, sequence
        sequence += 1
        event = ev.JobEvent(job_id=job_id, sequence=sequence, attempt=attempt, **payload)
        event.event_time.FromNanoseconds(int((row["created"] + due) * 1e9))
        entries.append((due, event))
        due += pace

    state = jb.JOB_STATE_UNSPECIFIED

    def become(new: jb.JobState.ValueType, reason: str, **more: Any) -> None:
        nonlocal state
        add(state_changed=ev.StateChanged(from_state=state, state=new, reason=reason, **more))
        state = new

    def step(number: int) -> None:
        loss = 2.5 / number**0.5
        row = ev.StepCompleted(step=number, total_steps=steps, epoch=3 * number / steps, loss=loss + attempt / 1000)
        row.learning_rate, row.grad_norm, row.tokens_per_second = 2e-4 * (1 - number / steps), 1.0, 3000.0 + number
        row.trained_tokens = row.computed_tokens = 1000 * number
        add(step_completed=row)

    def evaluate(number: int, loss: float) -> None:
        row = ev.EvaluationCompleted(step=number, loss=loss, perplexity=2.7**loss, token_accuracy=0.5, rows=10)
        add(evaluation_completed=row)
        sample = ev.Sample(prompt="What is a lute?", completion="A" + "h" * number + " \x1b[31mstring")
        add(samples_generated=ev.SamplesGenerated(step=number, samples=[sample]))

    def start(number: int, from_step: int, reason: str) -> None:
        nonlocal attempt
        attempt = number
        add(
            attempt_started=ev.AttemptStarted(
                attempt=number, resumed_from_step=from_step, discarded_from_step=from_step, reason=reason
            )
        )

    become(jb.JOB_STATE_VALIDATING, "SUBMITTED")
    become(jb.JOB_STATE_QUEUED, "VALID")
    due += float(labels.get("queued", 0))
    become(jb.JOB_STATE_PREPARING, "SLOT_FREE")
    start(1, 0, "FIRST")
    add(phase_progressed=ev.PhaseProgressed(phase=ev.PHASE_TOKENIZING, completed=50, total=100, unit="rows"))
    plan = ev.PlanResolved(device="cpu", dtype="float32", attention="documents-sdpa", total_steps=steps)
    add(plan_resolved=plan)
    become(jb.JOB_STATE_RUNNING, "STARTED")
    evaluate(0, 2.5)
    retry_at = int(labels.get("retry_at", 0))
    for number in range(1, (retry_at or steps) + 1):
        step(number)
    if retry_at:
        become(jb.JOB_STATE_QUEUED, "WORKER_LOST")
        become(jb.JOB_STATE_PREPARING, "SLOT_FREE")
        start(2, retry_at - 2, "WORKER_LOST")
        become(jb.JOB_STATE_RUNNING, "STARTED")
        for number in range(retry_at - 1, steps + 1):
            step(number)
    add(log_emitted=ev.LogEmitted(level=ev.LOG_LEVEL_WARNING, message="a row was cut \x1b]0;owned\x07"))
    add(checkpoint_saved=ev.CheckpointSaved(step=steps, name=f"{job_id}:step-{steps}", size_bytes=4096))
    if labels.get("outcome") == "failed":
        error = jb.JobError(
            reason="LOSS_NOT_FINITE", message="The loss became infinite.", hint="Lower the learning rate."
        )
        error.log_lines.extend(["step 3", "loss inf"])
        become(jb.JOB_STATE_FAILED, "LOSS_NOT_FINITE", error=error)
    else:
        evaluate(steps, 0.9)
        become(jb.JOB_STATE_SUCCEEDED, "FINISHED", model_id=job_id.replace("job_", "model_"))
    cancelled = row.get("cancelled")
    if cancelled is not None:
        entries = [entry for entry in entries if entry[0] <= cancelled]
        last = next(e.state_changed.state for _, e in reversed(entries) if e.HasField("state_changed"))
        sequence, due, state, pace = len(entries), cancelled, last, 0.0
        become(jb.JOB_STATE_CANCELLING, "CANCEL_REQUESTED")
        become(jb.JOB_STATE_CANCELLED, "CANCEL_REQUESTED")
    return entries


class Services(
    fine_tuning_pb2_grpc.FineTuningServicer, datasets_pb2_grpc.DatasetsServicer, models_pb2_grpc.ModelsServicer
):
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
                if event.state_changed.HasField("error"):
                    job.error.CopyFrom(event.state_changed.error)
            if event.HasField("step_completed"):
                job.progress.step, job.progress.total_steps = (
                    event.step_completed.step,
                    event.step_completed.total_steps,
                )
                job.progress.loss = event.step_completed.loss
        job.queue_position = 2 if job.state == jb.JOB_STATE_QUEUED else 0
        return job

    async def known(self, job_id: str, context: Any) -> None:
        if job_id not in self.state.rows:
            resource = error_details_pb2.ResourceInfo(resource_type="luthier.v1.Job", resource_name=job_id)
            await context.abort(
                *_status(grpc.StatusCode.NOT_FOUND, f"no job {job_id}", _info("JOB_NOT_FOUND"), resource)
            )

    async def CreateJob(self, request: Any, context: Any) -> Any:
        self.state.note(method="CreateJob", request_id=request.request_id, validate_only=request.validate_only)
        labels = dict(request.spec.labels)
        refusals = self.refusals.setdefault(request.request_id, int(labels.get("refuse", 0)))
        if refusals:
            self.refusals[request.request_id] -= 1
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromMilliseconds(20)
            await context.abort(*_status(grpc.StatusCode.UNAVAILABLE, "draining", _info("SERVER_DRAINING"), retry))
        if request.spec.fine_tune.base_model == "bad":
            bad = error_details_pb2.BadRequest()
            bad.field_violations.add(field="spec.fine_tune.base_model", description="no such model")
            bad.field_violations.add(field="spec.fine_tune.hyperparameters.epochs", description="must be >= 0")
            await context.abort(*_status(grpc.StatusCode.INVALID_ARGUMENT, "2 violations", _info("SPEC_INVALID"), bad))
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
        await context.abort(
            *_status(grpc.StatusCode[name], f"told {name}", _info(f"WHY_{name}", fact="42"), bad, retry)
        )

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
            unmet = error_details_pb2.PreconditionFailure()
            unmet.violations.add(type="STATE", subject=request.job_id, description="it has ended")
            await context.abort(
                *_status(grpc.StatusCode.FAILED_PRECONDITION, "it has ended", _info("JOB_ENDED"), unmet)
            )
        row.setdefault("cancelled", time.time() - row["created"])
        self.state.save()
        return ft.CancelJobResponse(job=self.job(request.job_id))

    async def WatchJob(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.state.note(method="WatchJob", after=request.after_sequence, history_id=request.history_id)
        await self.known(request.job_id, context)
        if request.history_id not in ("", "history-1"):
            await context.abort(*_status(grpc.StatusCode.FAILED_PRECONDITION, "foreign", _info("HISTORY_MISMATCH")))
        labels = self.state.rows[request.job_id]["spec"].get("labels", {})
        code, reason, limit = labels.get("break", "::0").split(":")
        silent, hole = int(labels.get("silent", 0)), int(labels.get("hole", 0))
        cursor, sent = request.after_sequence, 0
        if cursor > len(self.visible(request.job_id)):
            await context.abort(*_status(grpc.StatusCode.OUT_OF_RANGE, "past", _info("POSITION_PAST_HEAD")))
        yield ft.WatchJobResponse(cursor=cursor, history_id="history-1")
        while True:
            events = self.visible(request.job_id)[cursor:]
            for event in events:
                if silent and sent == silent:
                    return
                if code and sent == int(limit):
                    if reason == "KILL":
                        await context.abort(grpc.StatusCode[code], "Socket closed")
                    await context.abort(*_status(grpc.StatusCode[code], "again", _info(reason)))
                cursor = event.sequence
                sent += 1
                if event.sequence != hole:
                    yield ft.WatchJobResponse(events=[event], cursor=cursor, history_id="history-1")
            if self.job(request.job_id).state in (8, 9, 10) and cursor == len(self.visible(request.job_id)):
                return
            await asyncio.sleep(0.01)

    async def UploadDataset(self, requests: Any, context: Any) -> Any:
        metadata, content = None, b""
        async for request in requests:
            if request.HasField("metadata"):
                metadata = request.metadata
            content += request.chunk
        assert metadata is not None
        sha256 = hashlib.sha256(content).hexdigest()
        assert (metadata.sha256, metadata.size_bytes) == (sha256, len(content))
        lines = content.splitlines()
        broken = [number for number, line in enumerate(lines, 1) if not line.startswith(b"{")]
        if broken:
            bad = error_details_pb2.BadRequest()
            for number in broken[:25]:
                bad.field_violations.add(field=f"line {number}", description="is not a JSON object")
            info = _info("DATASET_INVALID", findings=str(len(broken)), lines=",".join(map(str, broken[:100])))
            await context.abort(
                *_status(grpc.StatusCode.INVALID_ARGUMENT, f"{len(broken)} findings in {metadata.name}", info, bad)
            )
        versions = [each for each in self.state.datasets.values() if each.name == metadata.name]
        for each in versions:
            if each.sha256 == sha256:
                return ds.UploadDatasetResponse(dataset=each, created=False)
        dataset = Dataset(
            id=f"ds_01{sha256[:24].upper()}", name=metadata.name, version=len(versions) + 1, sha256=sha256,
            size_bytes=len(content), rows=len(lines), format=DATASET_FORMAT_MESSAGES,
        )  # fmt: skip
        dataset.create_time.GetCurrentTime()
        self.state.datasets[dataset.id] = dataset
        return ds.UploadDatasetResponse(dataset=dataset, created=True)

    async def dataset(self, name: str, context: Any) -> Dataset:
        for each in reversed(self.state.datasets.values()):
            if name in (each.id, each.name, f"{each.name}@{each.version}"):
                return each
        await context.abort(*_status(grpc.StatusCode.NOT_FOUND, f"no dataset {name}", _info("DATASET_NOT_FOUND")))
        raise AssertionError

    async def GetDataset(self, request: Any, context: Any) -> Any:
        return ds.GetDatasetResponse(dataset=await self.dataset(request.dataset, context))

    async def ListDatasets(self, request: Any, context: Any) -> Any:
        every = list(reversed(self.state.datasets.values()))
        return ds.ListDatasetsResponse(datasets=[each for each in every if request.name in ("", each.name)])

    async def DeleteDataset(self, request: Any, context: Any) -> Any:
        dataset = await self.dataset(request.dataset, context)
        return ds.DeleteDatasetResponse(dataset=self.state.datasets.pop(dataset.id))

    def models(self) -> list[Model]:
        jobs = [self.job(job_id) for job_id in sorted(self.state.rows, reverse=True)]
        return [
            Model(id=job.model_id, name="tiny-cards", job_id=job.id, base_model="builtin/tiny", adaptation="lora",
                  step=job.progress.step, size_bytes=sum(map(len, FILES.values())), metrics={"eval_loss": 0.9})
            for job in jobs if job.model_id
        ]  # fmt: skip

    async def GetModel(self, request: Any, context: Any) -> Any:
        for model in self.models():
            if model.id == request.model_id:
                return md.GetModelResponse(model=model)
        await context.abort(*_status(grpc.StatusCode.NOT_FOUND, "no such model", _info("MODEL_NOT_FOUND")))

    async def ListModels(self, request: Any, context: Any) -> Any:
        return md.ListModelsResponse(models=[each for each in self.models() if each.id.startswith(request.id_prefix)])

    async def DownloadModel(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Any id brings the files; `escape`, `damaged` and `short` bring what a client must refuse."""
        files = [
            ModelFile(path=path, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
            for path, data in FILES.items()
        ]
        if request.model_id == "escape":
            files[0].path = "../escaped"
        yield md.DownloadModelResponse(manifest=md.DownloadManifest(files=files))
        for file in files:
            data = FILES.get(file.path, b"gotcha")
            if request.model_id == "damaged":
                data = bytes(len(data))
            if request.model_id == "short":
                data = data[:-1]
            for start in range(0, len(data), 65536):
                chunk = md.FileChunk(path=file.path, offset=start, data=data[start : start + 65536])
                yield md.DownloadModelResponse(chunk=chunk)


async def _health(_: bytes, context: Any) -> bytes:
    await context.send_initial_metadata((("luthier-version", VERSION),))
    return b"\x08\x01"


async def serve(listen: str, root: Path) -> None:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    services = Services(State(root))
    fine_tuning_pb2_grpc.add_FineTuningServicer_to_server(services, server)
    datasets_pb2_grpc.add_DatasetsServicer_to_server(services, server)
    models_pb2_grpc.add_ModelsServicer_to_server(services, server)
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
    arguments = parser.parse_args()
    asyncio.run(serve(arguments.listen, arguments.state))
