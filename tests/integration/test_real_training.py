"""Real trainers on a real (tiny) model through a real luthierd: what comes out can be used, gone on from, resumed."""

import hashlib
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from daemon import Daemon, dense, kinds, small, until

from luthier.v1 import fine_tuning_pb2 as ft
from luthier.v1 import models_pb2 as md
from luthier.v1.job_pb2 import Checkpoints, Dtype, Evaluation, Full, Hyperparameters, Job, JobSpec, JobState, Lora
from luthier_client import Client

ROWS = b"".join(
    json.dumps({"prompt": f"What follows {n}?", "completion": f"After {n} comes {n + 1}."}).encode() + b"\n"
    for n in range(120)
)


def serve(data_dir: Path, *flags: str) -> Daemon:
    daemon = Daemon(data_dir, ["--threads", "1", *flags]).start()
    daemon.upload(ROWS)
    return daemon


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    root = tmp_path_factory.mktemp("models")
    tiny = Path(__file__).parents[2] / "trainer" / "luthier_trainer" / "builtin" / "tiny"
    shutil.copytree(tiny, root / "my-model")
    daemon = serve(tmp_path_factory.mktemp("real"), "--model-root", str(root))
    yield daemon
    daemon.close()


def numbers(steps: int, **more: Any) -> Hyperparameters:
    fields = {"max_steps": steps, "batch_size": 8, "learning_rate": 1e-3, "dtype": Dtype.DTYPE_FLOAT32} | more
    return Hyperparameters(**fields)


def spec(steps: int = 6, **task: Any) -> JobSpec:
    return small(**({"hyperparameters": numbers(steps), "lora": Lora(rank=8)} | task))


def download(daemon: Daemon, name: str, directory: Path) -> Path:
    with Client(daemon.address) as client:
        client.download_model(name, directory)
    return directory


def succeeded(daemon: Daemon, job: Job) -> Job:
    ended = daemon.wait(job.id)
    assert ended.state == JobState.JOB_STATE_SUCCEEDED, ended.error
    return ended


def adapter_sha256(directory: Path) -> str:
    return hashlib.sha256((directory / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_a_finished_job_is_an_adapter_that_peft_loads_and_a_record_of_how_it_was_made(
    daemon: Daemon, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    task: dict[str, Any] = {
        "validation_fraction": 0.1,
        "evaluation": Evaluation(every_steps=3, sample_prompts=["What follows 7?"], sample_max_tokens=8),
    }
    job = daemon.create(spec(**task))
    events = list(daemon.watch(job.id))
    ended = succeeded(daemon, job)
    assert dense(events)
    assert [e.evaluation_completed.step for e in events if e.HasField("evaluation_completed")] == [0, 3, 6]
    assert [e.samples_generated.step for e in events if e.HasField("samples_generated")] == [0, 6]
    plan = next(e.plan_resolved for e in events if e.HasField("plan_resolved"))
    assert (plan.training_rows, plan.validation_rows, plan.total_steps, plan.dtype) == (108, 12, 6, "float32")
    steps = [e.step_completed for e in events if e.HasField("step_completed")]
    assert steps[-1].loss < steps[0].loss

    directory = download(daemon, ended.model_id, tmp_path / "model")
    made = json.loads((directory / "luthier.json").read_text())
    text = json.dumps(made)
    for fact in (job.id, "builtin/tiny", daemon.upload(ROWS).sha256, "transformers"):
        assert fact in text
    tiny = Path(__file__).parents[2] / "trainer" / "luthier_trainer" / "builtin" / "tiny"
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), directory)
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What follows 7?"}], add_generation_prompt=True, return_tensors="pt"
    )
    answer = model.generate(**ids, max_new_tokens=8, do_sample=False)
    text = tokenizer.decode(answer[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    sample = [e.samples_generated for e in events if e.HasField("samples_generated")][-1].samples[0]
    assert text.strip() == sample.completion.strip()


def test_training_goes_on_from_a_model_of_luthiers_from_a_directory_and_from_a_full_model(daemon: Daemon) -> None:
    first = succeeded(daemon, daemon.create(spec(8)))
    second = succeeded(daemon, daemon.create(spec(4, base_model=first.model_id)))
    began = [e.step_completed.loss for e in daemon.watch(first.id) if e.HasField("step_completed")]
    went_on = [e.step_completed.loss for e in daemon.watch(second.id) if e.HasField("step_completed")]
    assert went_on[0] < began[0] - 0.2
    root = next(flag for flag in daemon.flags if "models" in flag)
    task = {"base_model": f"{root}/my-model", "hyperparameters": numbers(3, learning_rate=1e-4)}
    whole = succeeded(daemon, daemon.create(small(full=Full(), **task)))
    succeeded(daemon, daemon.create(spec(3, base_model=whole.model_id)))


def test_a_named_model_and_its_registered_checkpoint_are_whole_and_can_be_gone_on_from(
    daemon: Daemon, tmp_path: Path
) -> None:
    job = succeeded(
        daemon, daemon.create(spec(4, model_name="counter", checkpoints=Checkpoints(every_steps=2, keep=5)))
    )
    named = daemon.models.GetModel(md.GetModelRequest(model_id="counter@1")).model
    assert (named.id, named.base_licence) == (job.model_id, "apache-2.0")
    early = f"{job.id}:step-2"
    version = daemon.models.RegisterModel(md.RegisterModelRequest(model_id=early, name="counter")).version
    registered = daemon.models.GetModel(md.GetModelRequest(model_id=version.model_id)).model
    assert (version.version, registered.step, registered.base_licence) == (2, 2, "apache-2.0")
    assert registered.metrics["train_loss"] > 0
    checkpoint = daemon.data_dir / "jobs" / job.id / "checkpoints" / "000002-a1"
    made = daemon.data_dir / "models" / registered.id
    assert {each.name for each in checkpoint.iterdir()} - {each.name for each in made.iterdir()} == {
        "optimizer.safetensors",
        "state.json",
        "manifest.json",
    }
    assert (made / "adapter_model.safetensors").samefile(checkpoint / "adapter_model.safetensors")
    daemon.fine_tuning.DeleteJob(ft.DeleteJobRequest(job_id=job.id))
    directory = download(daemon, "counter", tmp_path / "model")
    assert sum(each.stat().st_size for each in directory.iterdir()) == registered.size_bytes
    onward = ft.CreateJobRequest(spec=spec(2, base_model="counter@2"), validate_only=True)
    assert daemon.fine_tuning.CreateJob(onward).job.resolved_spec.fine_tune.base_model == registered.id
    card = daemon.models.GetModelCard(md.GetModelCardRequest(model_id="counter@1")).markdown
    for fact in (
        'license: "apache-2.0"',
        "library_name: peft",
        "`builtin/tiny`",
        named.id,
        "rank 8",
        "transformers",
    ):
        assert fact in card, fact
    (program,) = re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)
    for said, meant in (('"DIRECTORY"', repr(str(directory))), ("=128", "=4")):
        assert said in program
        program = program.replace(said, meant)
    exec(program, {})


def test_a_cancelled_training_leaves_a_checkpoint_that_peft_loads(daemon: Daemon, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    job = daemon.create(spec(5000))
    daemon.wait_for_step(job.id, 3)
    started = time.monotonic()
    daemon.fine_tuning.CancelJob(ft.CancelJobRequest(job_id=job.id))
    assert daemon.wait(job.id).state == JobState.JOB_STATE_CANCELLED
    assert time.monotonic() - started < 5
    saved = [e.checkpoint_saved for e in daemon.watch(job.id) if e.HasField("checkpoint_saved")][-1]
    directory = download(daemon, saved.name, tmp_path / "checkpoint")
    tiny = Path(__file__).parents[2] / "trainer" / "luthier_trainer" / "builtin" / "tiny"
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), directory)


def test_a_model_that_the_hub_does_not_give_fails_the_job_with_words(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, ["--threads", "1", "--warm", "off"], environment={"HF_HUB_OFFLINE": "1"}).start()
    try:
        daemon.upload(ROWS)
        job = daemon.wait(daemon.create(spec(base_model="nobody/has-this-model")).id)
        assert (job.state, job.error.reason) == (JobState.JOB_STATE_FAILED, "MODEL_NOT_FOUND")
        assert "nobody/has-this-model" in job.error.message
    finally:
        daemon.close()


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_training_that_lost_its_server_and_its_trainer_ends_with_the_very_adapter_of_one_that_did_not(
    tmp_path: Path, end: str
) -> None:
    flags = ["--stop-trainers"] if end == "stop" else ["--retry-seconds", "0.1"]
    daemon = serve(tmp_path / "data", *flags)
    try:
        steps = spec(60, checkpoints=Checkpoints(every_steps=7), lora=Lora(rank=8, dropout=0.1))
        whole = daemon.create(steps)
        cut = daemon.create(steps)
        succeeded(daemon, whole)
        daemon.wait_for_step(cut.id, 15)
        assert daemon.get(cut.id).state == JobState.JOB_STATE_RUNNING
        if end == "stop":
            daemon.stop()
        else:
            daemon.kill()
            os.killpg(daemon.host().trainers[0].pid, signal.SIGKILL)
        daemon.start()
        events = list(daemon.watch(cut.id))
        assert dense(events)
        assert kinds(events)[-1] == "SUCCEEDED"
        assert max(event.attempt for event in events) == 2
        adapters = [
            adapter_sha256(download(daemon, daemon.get(job.id).model_id, tmp_path / job.id)) for job in (whole, cut)
        ]
        assert adapters[0] == adapters[1]
        losses: list[dict[int, float]] = []
        for job in (whole, cut):
            steps_seen = (e.step_completed for e in daemon.watch(job.id) if e.HasField("step_completed"))
            losses.append({each.step: each.loss for each in steps_seen})
        assert losses[0] == losses[1]
    finally:
        daemon.close()


def test_a_broken_request_during_training_changes_nothing(daemon: Daemon) -> None:
    job = daemon.create(spec(30))
    daemon.wait_for_step(job.id, 2)
    raw: Any = daemon.channel.unary_unary("/luthier.v1.FineTuning/CreateJob", None, None)
    with pytest.raises(grpc.RpcError):
        raw(b"\xff\xff", timeout=5)
    until(lambda: daemon.get(job.id).progress.step > 5, 60)
    succeeded(daemon, job)
