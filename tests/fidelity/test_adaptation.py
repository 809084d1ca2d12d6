"""Kinds of adapters, and what is trained without one: as PEFT and torch compute it, and as their papers say."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fidelity.jobs import Recorder, StopAfter, chats, task, tiny_base
from fidelity.test_adapter import IDS, PEFT_ON_TRANSFORMERS, trainers_logits
from fidelity.test_resume import weights
from fidelity.tiny import gemma2, gradients, largest_error, llama, plain_gradients, rows, with_lora
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from luthier.trainer.v1.report_pb2 import Finished, Stopped
from luthier.trainer.v1.task_pb2 import BaseModelSource
from luthier.v1 import job_pb2
from luthier_trainer import lora, plan, sft
from luthier_trainer import loss as loss_module
from luthier_trainer.config import LoraSettings
from luthier_trainer.control import NoControl
from luthier_trainer.flatten import flattened, scored_tokens
from luthier_trainer.job import Job
from luthier_trainer.loss import score, scored_cross_entropy
from luthier_trainer.masters import Masters
from luthier_trainer.model import prepare
from luthier_trainer.probe import choose_forward

LENGTHS = (17, 5, 11)
LINEARS = 14


@pytest.mark.parametrize(
    ("kind", "fused"),
    [
        ({"use_rslora": True}, LINEARS),
        ({"use_dora": True}, 0),
        ({"use_dora": True, "use_rslora": True}, 0),
        ({"init": job_pb2.LORA_INIT_ORTHOGONAL}, LINEARS),
    ],
    ids=["rslora", "dora", "dora-rslora", "orthogonal"],
)
def test_losses_and_gradients_are_those_of_pefts_own_modules(kind: dict[str, Any], fused: int) -> None:
    model, examples = llama(), rows(*LENGTHS)
    root = with_lora(model, **kind).root
    expected_loss, expected = plain_gradients(root, examples)
    assert any("magnitude" in name for name in expected) == bool(kind.get("use_dora"))
    assert lora.speed_up(model) == fused
    forward, _ = choose_forward(model, "auto", max(LENGTHS))
    loss = forward.loss_sum(flattened(examples)) / scored_tokens(examples)
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == pytest.approx(expected_loss, rel=1e-10)
    assert largest_error(gradients(root), expected) < 1e-10


@PEFT_ON_TRANSFORMERS
@pytest.mark.parametrize(
    ("kind", "pefts"),
    [
        ({}, {}),
        ({"use_rslora": True}, {"use_rslora": True}),
        ({"use_dora": True}, {"use_dora": True}),
        ({"init": job_pb2.LORA_INIT_GAUSSIAN}, {"init_lora_weights": "gaussian"}),
        ({"init": job_pb2.LORA_INIT_ORTHOGONAL}, {"init_lora_weights": "orthogonal"}),
    ],
    ids=["kaiming", "rslora", "dora", "gaussian", "orthogonal"],
)
def test_a_new_adapter_starts_as_pefts_own_does_and_changes_no_output(
    kind: dict[str, Any], pefts: dict[str, Any]
) -> None:
    settings = LoraSettings(4, 8.0, 0.0, ("all-linear",), (), **kind)
    base = llama(torch.float32)
    untrained = base(input_ids=IDS).logits.detach()
    ours = prepare(base, BaseModelSource(), settings, name="tiny", seed=3, resume_from=None)
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **pefts)
    plain = llama(torch.float32)
    torch.manual_seed(3)
    theirs = get_peft_model(plain, config)
    expected = {name: each for name, each in theirs.named_parameters() if each.requires_grad}
    found = {name: each for name, each in ours.root.named_parameters() if each.requires_grad}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], each) for name, each in expected.items())
    scale = 8 / math.sqrt(4) if kind.get("use_rslora") else 8 / 4
    layers = [each for each in ours.root.modules() if isinstance(each, LoraLayer)]
    assert [each.scaling["default"] for each in layers] == [scale] * LINEARS
    torch.testing.assert_close(ours.root(input_ids=IDS).logits, untrained, rtol=1e-4, atol=1e-4)


EVERYTHING = job_pb2.Lora(use_rslora=True, use_dora=True, init=job_pb2.LORA_INIT_ORTHOGONAL, lora_plus_ratio=4.0)
GAUSSIAN = job_pb2.Lora(use_rslora=True, init=job_pb2.LORA_INIT_GAUSSIAN, lora_plus_ratio=4.0)
NOISY: dict[str, Any] = {"label_smoothing": 0.1, "neftune_alpha": 5.0}


@PEFT_ON_TRANSFORMERS
@pytest.mark.parametrize("dtype", [job_pb2.DTYPE_FLOAT32, job_pb2.DTYPE_BFLOAT16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", [EVERYTHING, GAUSSIAN], ids=["dora-orthogonal", "gaussian"])
def test_peft_loads_every_kind_of_adapter_and_gives_the_trainers_logits(
    tmp_path: Path, jobs: list[Job], kind: job_pb2.Lora, dtype: job_pb2.Dtype.ValueType
) -> None:
    base, data = tiny_base(tmp_path), chats(tmp_path / "chats.jsonl")
    asked = task(tmp_path, base, data, max_steps=4, lora=kind, dtype=dtype, **NOISY)
    assert isinstance(sft.train(asked, Recorder(), NoControl()), Finished)
    wide = dtype == job_pb2.DTYPE_FLOAT32
    plain = AutoModelForCausalLM.from_pretrained(base)
    loaded = PeftModel.from_pretrained(plain, str(tmp_path / "model")).train(False)
    config = loaded.peft_config["default"]
    assert isinstance(config, LoraConfig)
    assert (config.use_rslora, config.use_dora) == (kind.use_rslora, kind.use_dora)
    with torch.no_grad():
        found = loaded(input_ids=IDS).logits
    expected = trainers_logits(jobs[0]).float()
    error = float((found - expected).norm() / expected.norm())
    assert error < (1e-5 if wide else 2e-2)


@pytest.mark.parametrize("dtype", [job_pb2.DTYPE_FLOAT32, job_pb2.DTYPE_BFLOAT16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "job",
    [
        {"lora": EVERYTHING, "dropout": 0.2, **NOISY},
        {"full": True, "last_layers": 1, "tied": True, **NOISY},
        {"full": True, "last_layers": 1, "tied": False},
    ],
    ids=["adapter", "last-layer-tied", "last-layer"],
)
def test_a_stopped_job_of_any_kind_goes_on_bit_by_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: dict[str, Any], dtype: job_pb2.Dtype.ValueType
) -> None:
    monkeypatch.setattr(plan, "_CPU_TOKENS", 40)
    job = {"dtype": dtype, "max_steps": 5, **job}
    base, data = tiny_base(tmp_path, tied=job.pop("tied", False)), chats(tmp_path / "chats.jsonl")
    whole, first, second = Recorder(), Recorder(), Recorder()
    sft.train(task(tmp_path / "straight", base, data, **job), whole, NoControl())
    folder = tmp_path / "broken"
    stopped = sft.train(task(folder, base, data, **job), first, StopAfter(first, 3, 2))
    assert isinstance(stopped, Stopped)
    resume_from = folder / "checkpoints" / stopped.checkpoint
    sft.train(task(folder, base, data, attempt=2, resume_from=resume_from, **job), second, NoControl())
    losses = [(each.step, each.loss, each.grad_norm) for each in whole.steps()]
    assert [(each.step, each.loss, each.grad_norm) for each in (*first.steps(), *second.steps())] == losses
    assert weights(folder / "model") == weights(tmp_path / "straight" / "model")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [job_pb2.DTYPE_FLOAT32, job_pb2.DTYPE_BFLOAT16], ids=["fp32", "bf16"])
def test_only_the_last_layers_change_and_the_others_are_saved_as_they_were(
    tmp_path: Path, jobs: list[Job], tied: bool, dtype: job_pb2.Dtype.ValueType
) -> None:
    base, data = tiny_base(tmp_path, tied=tied), chats(tmp_path / "chats.jsonl")
    asked = task(tmp_path, base, data, full=True, last_layers=1, max_steps=3, dtype=dtype)
    sft.train(asked, Recorder(), NoControl())
    before, after = weights(base), weights(tmp_path / "model")
    changed = {name for name in before if before[name] != after[name]}
    last = {name for name in before if name.startswith("model.layers.1.")}
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert changed == last | {"model.norm.weight", head}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").train(False)
    with torch.no_grad():
        found = loaded(input_ids=IDS).logits
    expected = trainers_logits(jobs[0]).float()
    assert float((found - expected).norm() / expected.norm()) < (1e-5 if dtype == job_pb2.DTYPE_FLOAT32 else 2e-2)


@pytest.mark.parametrize("tied", [False, True])
def test_the_last_layers_get_the_gradients_of_the_plain_module(tied: bool) -> None:
    model, examples = llama(tied=tied), rows(*LENGTHS)
    prepare(model, BaseModelSource(), None, name="tiny", seed=0, resume_from=None, last_layers=1)
    expected_loss, expected = plain_gradients(model, examples)
    masters = Masters(model, torch.float64, cast_frozen=True)
    forward, _ = choose_forward(model, "auto", max(LENGTHS))
    loss = forward.loss_sum(flattened(examples)) / scored_tokens(examples)
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == pytest.approx(expected_loss, rel=1e-10)
    assert largest_error(dict(masters.named(masters.gradients)), expected) < 1e-10


def smoothed(model: nn.Module, smoothing: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Torch's own smoothed loss of each row alone, and its gradients."""
    total = torch.zeros((), dtype=torch.float64)
    for row in rows(*LENGTHS):
        ids = torch.from_numpy(row.input_ids)
        targets = torch.where(torch.from_numpy(row.trained), ids, -100)[1:]
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        total = total + F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    total.backward()  # type: ignore[no-untyped-call]
    return total.detach(), gradients(model)


@pytest.mark.parametrize(
    ("make", "fused", "tolerance"),
    [(llama, True, 1e-10), (gemma2, True, 1e-6), (gemma2, False, 1e-6)],
    ids=["fused", "capped", "the-models-own"],
)
def test_smoothed_losses_are_torchs_and_evaluations_are_not_smoothed(make: Any, fused: bool, tolerance: float) -> None:
    model: PreTrainedModel = make().requires_grad_(True)
    batch = flattened(rows(*LENGTHS))
    expected_loss, expected = smoothed(model, 0.2)
    plain, _ = smoothed(model, 0.0)
    forward, _ = choose_forward(model, "auto", max(LENGTHS))
    forward = dataclasses.replace(forward, fused_head=fused)
    loss = dataclasses.replace(forward, label_smoothing=0.2).loss_sum(batch)
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == pytest.approx(float(expected_loss), rel=tolerance)
    assert largest_error(gradients(model), expected) < tolerance
    assert float(forward.score(batch)[0]) == pytest.approx(float(plain), rel=tolerance)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_smoothed_chunks_have_the_gradients_of_the_whole(monkeypatch: pytest.MonkeyPatch, smoothing: float) -> None:
    monkeypatch.setattr(loss_module, "_CHUNK_ELEMENTS", {"cpu": 40})
    monkeypatch.setattr(loss_module, "_MIN_CHUNK_ROWS", 3)
    torch.manual_seed(0)
    hidden, weight = torch.randn(10, 6).double().requires_grad_(), torch.randn(13, 6).double().requires_grad_()
    bias, targets = torch.randn(13).double().requires_grad_(), torch.randint(0, 13, (10,))
    trained = (hidden, weight, bias)
    logits = F.linear(hidden, weight, bias)
    expected = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing) * 0.3
    found = scored_cross_entropy(hidden, weight, bias, targets, smoothing=smoothing) * 0.3
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    for ours, theirs in zip(torch.autograd.grad(found, trained), torch.autograd.grad(expected, trained), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    plain = F.cross_entropy(logits, targets, reduction="sum")
    assert float(score(hidden, weight, bias, targets)[0]) == pytest.approx(float(plain.detach()), rel=1e-12)
