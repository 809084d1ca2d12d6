"""What comes out is PEFT's and transformers' own."""

import json
import stat
from pathlib import Path

import pytest
import torch
from fidelity.jobs import Recorder, StopAfter, chats, task, tiny_base
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from luthier.trainer.v1.report_pb2 import Finished
from luthier_trainer import sft
from luthier_trainer.control import NoControl
from luthier_trainer.job import Job

PEFT_ON_TRANSFORMERS = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # PEFT 0.21 on transformers 5.23
)
IDS = torch.arange(5, 45)[None]


def trainers_logits(job: Job) -> torch.Tensor:
    model = job.forward.model.train(False)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits


@PEFT_ON_TRANSFORMERS
@pytest.mark.parametrize("saved", [(), ("lm_head", "embed_tokens")])
def test_peft_loads_the_adapter_and_gives_the_trainers_logits(
    tmp_path: Path, jobs: list[Job], saved: tuple[str, ...]
) -> None:
    base, data = tiny_base(tmp_path), chats(tmp_path / "chats.jsonl")
    end = sft.train(task(tmp_path, base, data, max_steps=6, modules_to_save=saved), Recorder(), NoControl())
    assert isinstance(end, Finished)
    plain = AutoModelForCausalLM.from_pretrained(base)
    untrained = plain(input_ids=IDS).logits.detach()
    loaded = PeftModel.from_pretrained(plain, str(tmp_path / "model")).train(False)
    with torch.no_grad():
        found = loaded(input_ids=IDS).logits
    torch.testing.assert_close(found, trainers_logits(jobs[0]), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, untrained, atol=1e-2)


def test_transformers_loads_the_whole_model_and_gives_the_trainers_logits(tmp_path: Path, jobs: list[Job]) -> None:
    base, data = tiny_base(tmp_path, tied=True), chats(tmp_path / "chats.jsonl")
    sft.train(task(tmp_path, base, data, max_steps=6, full=True), Recorder(), NoControl())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").train(False)
    with torch.no_grad():
        found = loaded(input_ids=IDS).logits
    torch.testing.assert_close(found, trainers_logits(jobs[0]), rtol=1e-5, atol=1e-5)
    assert loaded.config.tie_word_embeddings


@PEFT_ON_TRANSFORMERS
def test_a_checkpoint_loads_like_a_model(tmp_path: Path, jobs: list[Job]) -> None:
    base, data = tiny_base(tmp_path), chats(tmp_path / "chats.jsonl")
    recorder = Recorder()
    stopped = sft.train(task(tmp_path, base, data, max_steps=6), recorder, StopAfter(recorder, 3))
    folder = tmp_path / "checkpoints" / stopped.checkpoint  # type: ignore[union-attr]
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder)).train(False)
    with torch.no_grad():
        found = loaded(input_ids=IDS).logits
    torch.testing.assert_close(found, trainers_logits(jobs[0]), rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(folder).chat_template


@PEFT_ON_TRANSFORMERS
def test_a_continued_adapter_starts_where_it_was(tmp_path: Path, jobs: list[Job]) -> None:
    base, data = tiny_base(tmp_path), chats(tmp_path / "chats.jsonl")
    sft.train(task(tmp_path / "first", base, data, max_steps=6), Recorder(), NoControl())
    before = trainers_logits(jobs[0])
    more = task(tmp_path / "second", base, data, max_steps=0)
    more.base_model.adapter_dir = str(tmp_path / "first" / "model")
    sft.train(more, Recorder(), NoControl())
    torch.testing.assert_close(trainers_logits(jobs[1]), before, rtol=1e-5, atol=1e-5)
    more.spec.fine_tune.hyperparameters.max_steps = 2
    recorder = Recorder()
    sft.train(more, recorder, NoControl())
    assert len(list(recorder.steps())) == 2


def test_the_model_tells_where_it_came_from(tmp_path: Path) -> None:
    base, data = tiny_base(tmp_path), chats(tmp_path / "chats.jsonl")
    end = sft.train(task(tmp_path, base, data, max_steps=2), Recorder(), NoControl())
    assert isinstance(end, Finished)
    model = tmp_path / "model"
    lineage = json.loads((model / "luthier.json").read_text())
    assert lineage["job_id"] == "job_1"
    assert lineage["base_model"]["name"] == "builtin/pocket"
    assert lineage["plan"]["attention"] == "documents-sdpa"
    assert lineage["training_dataset"]["id"] == "ds_1"
    assert lineage["metrics"] == dict(end.metrics)
    assert json.loads((model / "adapter_config.json").read_text())["base_model_name_or_path"] == "builtin/pocket"
    assert str(tmp_path) not in (model / "luthier.json").read_text() + (model / "adapter_config.json").read_text()
    assert end.size_bytes == sum(file.stat().st_size for file in model.iterdir())
    assert {stat.S_IMODE(file.stat().st_mode) for file in model.iterdir()} == {0o644}
    assert [each.name for each in tmp_path.iterdir() if each.name.startswith(".tmp")] == []
