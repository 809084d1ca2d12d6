"""Rates by group, the last layers, and NEFTune's noise."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fidelity.jobs import Recorder, chats, task, tiny_base
from fidelity.tiny import cast, llama, rows, with_lora
from torch import nn

from luthier.trainer.v1.task_pb2 import BaseModelSource
from luthier.v1 import job_pb2
from luthier_trainer import plan, sft
from luthier_trainer.batches import Batches
from luthier_trainer.control import NoControl
from luthier_trainer.errors import TrainingError
from luthier_trainer.masters import Masters
from luthier_trainer.model import prepare
from luthier_trainer.neftune import Neftune
from luthier_trainer.optimizer import AdamSettings, Optimizer


def test_second_factors_learn_at_their_own_rate_as_in_a_plain_adamw_with_groups() -> None:
    root = with_lora(llama(torch.float32), saved=("lm_head",), use_dora=True).root
    trained = {name: each for name, each in root.named_parameters() if each.requires_grad}
    reference = {name: nn.Parameter(each.detach().clone()) for name, each in trained.items()}

    def group(second: bool, decayed: bool, rate: float) -> dict[str, Any]:
        names = [name for name, each in reference.items() if ("lora_B" in name, each.ndim >= 2) == (second, decayed)]
        assert names
        return {"params": [reference[name] for name in names], "lr": rate, "weight_decay": 0.1 if decayed else 0.0}

    groups = [group(False, True, 0.01), group(True, True, 0.16), group(False, False, 0.01)]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-6)
    masters = Masters(root, torch.float32)
    settings = AdamSettings(0.9, 0.95, 1e-6, 0.1, 0.5, second_factor_rate=16.0)
    optimizer = Optimizer(masters, settings)
    for step in range(5):
        torch.manual_seed(step)
        for name, gradient in masters.named(masters.gradients):
            gradient.normal_()
            reference[name].grad = gradient.clone()
        expected = nn.utils.clip_grad_norm_(reference.values(), 0.5)
        torch.testing.assert_close(optimizer.step(0.01), expected, rtol=1e-5, atol=0)
        adam.step()
        if step == 2:  # a resume changes nothing
            state = optimizer.state()
            optimizer = Optimizer(masters, settings)
            optimizer.load(state)
    for name, each in trained.items():
        torch.testing.assert_close(each, reference[name], rtol=1e-5, atol=1e-6)


def test_a_model_without_so_many_layers_is_refused() -> None:
    with pytest.raises(TrainingError, match="train_last_layers is 3, and the model has 2 decoder layers") as caught:
        prepare(llama(), BaseModelSource(), None, name="tiny", seed=0, resume_from=None, last_layers=3)
    assert caught.value.reason == "MODULE_NOT_FOUND"


LENGTHS = (16, 4, 9)


def noised(neftune: Neftune, model: nn.Module, lengths: tuple[int, ...], first: int, seed: int) -> list[torch.Tensor]:
    """What is added to the embeddings of each example of a flattened batch."""
    embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    ids = torch.ones(1, sum(lengths), dtype=torch.int64)
    plain = embeddings(ids)
    with neftune.noise(lengths, first=first, seed=seed):
        found = embeddings(ids)
    assert torch.equal(embeddings(ids), plain)
    return list(torch.split((found - plain)[0].detach(), list(lengths)))


def test_noise_is_uniform_and_bounded_by_each_examples_own_length() -> None:
    model = llama()
    neftune = Neftune(model, 5.0)
    for length, each in zip(LENGTHS, noised(neftune, model, LENGTHS, 0, 1), strict=True):
        bound = 5.0 / math.sqrt(length * 32)
        assert float(each.abs().max()) <= bound * (1 + 1e-6)
        assert float(each.abs().max()) > 0.9 * bound
        assert float(each.std()) == pytest.approx(bound / math.sqrt(3), rel=0.15)
        assert abs(float(each.mean())) < 0.2 * bound


def test_noise_depends_on_the_step_and_the_examples_place_alone() -> None:
    model = llama()
    neftune = Neftune(model, 5.0)
    together = noised(neftune, model, LENGTHS, 0, 1)
    torch.manual_seed(99)
    apart = [noised(neftune, model, (length,), number, 1)[0] for number, length in enumerate(LENGTHS)]
    assert all(torch.equal(one, other) for one, other in zip(together, apart, strict=True))
    assert not torch.equal(together[0], noised(neftune, model, LENGTHS, 0, 2)[0])
    assert not torch.equal(together[0][:4], together[1])


def test_padding_gets_no_noise() -> None:
    model = llama()
    neftune = Neftune(model, 5.0)
    (batch,) = Batches(documents=False, budget=1000, pad_id=0, device=torch.device("cpu")).of(rows(3, 7))
    embeddings: nn.Module = model.get_input_embeddings()
    plain = embeddings(batch.input_ids)
    with neftune.noise(batch.lengths, first=0, seed=1):
        moved = (embeddings(batch.input_ids) != plain).any(-1)
    assert torch.equal(moved, batch.attention_mask.bool() if batch.attention_mask is not None else moved)


def test_noise_has_the_models_precision() -> None:
    model = cast(llama(), torch.bfloat16)
    neftune = Neftune(model, 5.0)
    with neftune.noise((3,), first=0, seed=1):
        assert model.get_input_embeddings()(torch.ones(1, 3, dtype=torch.int64)).dtype == torch.bfloat16


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_noise_and_smoothing_are_the_same_for_any_cut_into_micro_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attention: str
) -> None:
    base, data = tiny_base(tmp_path), chats(tmp_path / "chats.jsonl")
    losses: dict[int, list[float]] = {}
    for budget in (30, 4096):
        monkeypatch.setattr(plan, "_CPU_TOKENS", budget)
        recorder = Recorder()
        numbers: dict[str, Any] = {
            "neftune_alpha": 20.0,
            "label_smoothing": 0.1,
            "attn_implementation": attention,
            "max_steps": 4,
        }
        sft.train(task(tmp_path / str(budget), base, data, **numbers), recorder, NoControl())
        losses[budget] = [each.loss for each in recorder.steps()]
    assert losses[30] == pytest.approx(losses[4096], rel=1e-4)


def test_evaluations_get_neither_noise_nor_smoothing(tmp_path: Path) -> None:
    base, data = tiny_base(tmp_path), chats(tmp_path / "chats.jsonl")
    found: list[float] = []
    first: list[float] = []
    noisy: dict[str, Any] = {"neftune_alpha": 20.0, "label_smoothing": 0.3}
    for name, numbers in (("plain", {}), ("noisy", noisy)):
        recorder = Recorder()
        evaluation = job_pb2.Evaluation(every_steps=1)
        sft.train(
            task(tmp_path / name, base, data, max_steps=1, evaluation=evaluation, **numbers), recorder, NoControl()
        )
        found.append(next(recorder.evaluations()).loss)
        first.append(next(recorder.steps()).loss)
    assert found[0] == found[1]
    assert abs(first[0] - first[1]) > 1e-3
