"""Tiny random models and examples, and the plain way to compute what the engine computes cleverly."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from luthier.trainer.v1.task_pb2 import BaseModelSource
from luthier_trainer.config import LoraSettings
from luthier_trainer.model import Trained, prepare

VOCABULARY = 97


@dataclass(frozen=True)
class Row:
    """A tokenised row."""

    input_ids: npt.NDArray[np.int64]
    trained: npt.NDArray[np.bool_]


def rows(*lengths: int, seed: int = 0) -> list[Row]:
    """Random rows of these lengths; about half of each row's tokens are targets, and at least its last."""
    draw = np.random.default_rng(seed)
    made = []
    for length in lengths:
        trained = draw.random(length) < 0.5
        trained[-1] = True
        made.append(Row(draw.integers(0, VOCABULARY, length), trained))
    return made


def cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model in another precision."""
    nn.Module.to(model, dtype)
    return model


def llama(dtype: torch.dtype = torch.float64, *, tied: bool = False, kv_heads: int = 2) -> PreTrainedModel:
    """Two layers, grouped-query attention."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        pad_token_id=0,
    )
    model: PreTrainedModel = LlamaForCausalLM(config)
    return cast(model, dtype)


def gemma2(dtype: torch.dtype = torch.float64, *, window: int = 8) -> PreTrainedModel:
    """Soft-capped logits, soft-capped attention, and a sliding window in every other layer."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=window,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        initializer_range=0.2,
    )
    model: PreTrainedModel = Gemma2ForCausalLM(config)
    return cast(model, dtype)


def with_lora(
    model: PreTrainedModel,
    targets: Sequence[str] = ("all-linear",),
    saved: Sequence[str] = (),
    dropout: float = 0.0,
    **kind: Any,
) -> Trained:
    """The model with an adapter whose second factor is not zero, so that every gradient is at work. `kind`: further
    fields of LoraSettings."""
    settings = LoraSettings(4, 8.0, dropout, tuple(targets), tuple(saved), **kind)
    trained = prepare(model, BaseModelSource(), settings, name="tiny", seed=1, resume_from=None)
    torch.manual_seed(2)
    for name, each in trained.root.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(each, std=0.2)
    dtype = model.dtype
    trained.root.to(dtype)
    return trained


def plain_loss(model: nn.Module, examples: Sequence[Row]) -> torch.Tensor:
    """The mean loss per scored token, each row alone through the module itself, as anyone would write it."""
    total = torch.zeros((), dtype=next(model.parameters()).dtype)
    scored = 0
    for row in examples:
        ids = torch.from_numpy(row.input_ids)
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        targets = torch.where(torch.from_numpy(row.trained), ids, -100)[1:]
        total = total + F.cross_entropy(logits[:-1], targets, reduction="sum", ignore_index=-100)
        scored += int(row.trained[1:].sum())
    return total / scored


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gradients of what is trained, taken away from the model."""
    found = {}
    for name, each in model.named_parameters():
        if each.requires_grad:
            assert each.grad is not None, f"{name} got no gradient"
            found[name] = each.grad.clone()
            each.grad = None
    return found


def plain_gradients(model: nn.Module, examples: Sequence[Row]) -> tuple[float, dict[str, torch.Tensor]]:
    """(loss, gradients) of `plain_loss`."""
    loss = plain_loss(model, examples)
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach()), gradients(model)


def largest_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest difference of any element, relative to the largest element of its tensor."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name] - each).abs().max() / each.abs().max().clamp_min(1e-30)) for name, each in expected.items()
    )
