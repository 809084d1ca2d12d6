"""Adapters on frozen weights in 4 and 8 bits, beside PEFT's own on the same weights. Needs bitsandbytes."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fidelity.jobs import Recorder, StopAfter, chats, task, tiny_base
from fidelity.test_adapter import IDS, PEFT_ON_TRANSFORMERS, trainers_logits
from fidelity.test_resume import weights
from fidelity.tiny import Row, plain_loss
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from luthier.trainer.v1.report_pb2 import Stopped
from luthier.v1 import job_pb2
from luthier_trainer import sft
from luthier_trainer.config import read_settings
from luthier_trainer.control import NoControl
from luthier_trainer.errors import TrainingError
from luthier_trainer.job import Job
from luthier_trainer.quantization import keep_differentiable, quantization_config
from luthier_trainer.schedule import learning_rate

NF4, INT8 = job_pb2.LORA_QUANTIZATION_NF4, job_pb2.LORA_QUANTIZATION_INT8
KINDS = pytest.mark.parametrize("kind", [NF4, INT8], ids=["nf4", "int8"])
INSTALLED = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
WARNINGS = pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")


def quantized_base(base: Path, kind: job_pb2.LoraQuantization.ValueType) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        base,
        dtype=torch.float32,
        device_map={"": "cpu"},
        quantization_config=quantization_config(kind, torch.float32, ()),
    )


@INSTALLED
@WARNINGS
@PEFT_ON_TRANSFORMERS
@KINDS
def test_losses_follow_those_of_pefts_own_on_the_same_quantized_base(
    tmp_path: Path, jobs: list[Job], kind: job_pb2.LoraQuantization.ValueType
) -> None:
    base, data = tiny_base(tmp_path, width=64), chats(tmp_path / "chats.jsonl")
    asked = task(tmp_path, base, data, max_steps=6, lora=job_pb2.Lora(quantization=kind))
    recorder = Recorder()
    sft.train(asked, recorder, NoControl())
    (job,) = jobs
    (name,) = [each for each in job.notes if each.startswith("the frozen linear weights are held in")]
    assert name.endswith("nf4" if kind == NF4 else "int8")
    assert job.trained.base_parameters == AutoModelForCausalLM.from_pretrained(base).num_parameters()
    torch.manual_seed(7)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    peft = get_peft_model(quantized_base(base, kind), config)
    trained = [each for each in peft.parameters() if each.requires_grad]
    adam = torch.optim.AdamW(trained, lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    settings = read_settings(asked)
    for step, reported in enumerate(recorder.steps()):
        stored = [each for index in job.order.batch(step) for each in job.rows.examples(int(index))]
        examples = [Row(each.input_ids.astype(np.int64), each.trained) for each in stored]
        loss = plain_loss(peft, examples)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for group in adam.param_groups:
            group["lr"] = learning_rate(
                settings.peak_rate, settings.scheduler, step, warmup=job.warmup, total_steps=job.total_steps
            )
        adam.step()
        adam.zero_grad()
        assert reported.loss == pytest.approx(float(loss.detach()), rel=1e-3)
    assert step == 5


@INSTALLED
@WARNINGS
@PEFT_ON_TRANSFORMERS
@pytest.mark.parametrize(("kind", "dora"), [(NF4, False), (NF4, True), (INT8, False)], ids=["nf4", "nf4-dora", "int8"])
def test_peft_loads_the_adapter_on_the_quantized_base_and_a_stopped_job_goes_on_bit_by_bit(
    tmp_path: Path, jobs: list[Job], kind: job_pb2.LoraQuantization.ValueType, dora: bool
) -> None:
    base, data = tiny_base(tmp_path, width=64), chats(tmp_path / "chats.jsonl")
    job: dict[str, Any] = {
        "max_steps": 4,
        "lora": job_pb2.Lora(quantization=kind, use_dora=dora),
        "modules_to_save": ("lm_head",),
    }
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    sft.train(task(straight, base, data, **job), Recorder(), NoControl())
    first = Recorder()
    stopped = sft.train(task(broken, base, data, **job), first, StopAfter(first, 2))
    assert isinstance(stopped, Stopped)
    resume_from = broken / "checkpoints" / stopped.checkpoint
    sft.train(task(broken, base, data, attempt=2, resume_from=resume_from, **job), Recorder(), NoControl())
    assert weights(broken / "model") == weights(straight / "model")
    loaded = PeftModel.from_pretrained(quantized_base(base, kind), str(straight / "model")).train(False)
    keep_differentiable(loaded)  # else bitsandbytes computes in bfloat16 on some CPUs
    with torch.no_grad():
        found = loaded(input_ids=IDS).logits
    torch.testing.assert_close(found, trainers_logits(jobs[0]), rtol=1e-4, atol=1e-4)


@KINDS
def test_quantization_without_bitsandbytes_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: job_pb2.LoraQuantization.ValueType
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else found(name, *rest)
    )
    base, data = tiny_base(tmp_path, width=64), chats(tmp_path / "chats.jsonl")
    with pytest.raises(TrainingError, match="bitsandbytes, which is not installed") as caught:
        sft.train(task(tmp_path, base, data, lora=job_pb2.Lora(quantization=kind), epochs=1.0), Recorder(), NoControl())
    assert caught.value.reason == "QUANTIZATION_UNAVAILABLE"
