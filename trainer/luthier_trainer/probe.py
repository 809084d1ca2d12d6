"""Probes: what the device is fast at, and what the model really computes."""

import itertools
import time
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from luthier_trainer import document_attention
from luthier_trainer.attention import UnsupportedAttention
from luthier_trainer.flatten import MicroBatch
from luthier_trainer.forward import DOCUMENTS, Forward, plain_head, set_attention, shaping_of
from luthier_trainer.loss import wide_logits

_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""Relative errors of logits that rounding alone explains; attention across documents gives errors of the order of 1."""


def choose_forward(model: PreTrainedModel, attention: str, longest: int) -> tuple[Forward, list[str]]:
    """Decides between attention per document and padded batches, and between the fused head and the model's own
    forward, by comparing logits. Returns the way and notes for people on anything that is not the fast way.

    `attention`: `auto`, `sdpa` or `eager`; `longest`: tokens of the longest row, so that a sliding window that no row
    reaches costs no probe. The model's attention is left as the returned way needs it.
    """
    notes: list[str] = []
    was_training = model.training
    model.train(False)
    documents = False
    if attention == "auto":
        refusal = _refuses_documents(model, longest)
        documents = not refusal
        if refusal:
            notes.append(f"attention per document does not fit this model ({refusal}); its batches are padded")
    fused = _head_is_plain(model, documents)
    if not fused:
        notes.append("the model's own forward computes its logits: its head is not a plain linear layer")
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        notes.append("the routers' auxiliary loss is left out: the loss is the cross-entropy of the trained tokens")
    model.train(was_training)
    return Forward(model, documents, fused), notes


def _random_documents(model: PreTrainedModel, lengths: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(model.config.get_text_config().vocab_size)
    draws = torch.randint(0, vocabulary, (sum(lengths),), generator=generator)
    return torch.split(draws.to(model.device), list(lengths))


_COMPARED = 4
"""Last rows of a document whose logits are compared."""


def _flat(documents: tuple[torch.Tensor, ...]) -> MicroBatch:
    """A flattened batch; the last rows of each document are scored."""
    ids = torch.cat(documents)
    positions = torch.cat([torch.arange(len(each), device=ids.device) for each in documents])
    ends = list(itertools.accumulate(len(each) for each in documents))
    rows = [range(end - min(len(each), _COMPARED), end) for each, end in zip(documents, ends, strict=True)]
    scored = torch.tensor(list(itertools.chain(*rows)), device=ids.device)
    return MicroBatch(
        input_ids=ids[None],
        position_ids=positions[None],
        attention_mask=None,
        lengths=tuple(len(each) for each in documents),
        scored=scored,
        targets=ids[scored],
    )


def _alone(document: torch.Tensor) -> MicroBatch:
    """The document as a padded batch of one row without padding."""
    flat = _flat((document,))
    return replace(flat, attention_mask=torch.ones_like(flat.input_ids))


def _relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-12))


@torch.no_grad()
def _refuses_documents(model: PreTrainedModel, longest: int) -> str:
    """Why attention per document is not right for this model; empty when it is, and the model is left with it."""
    config = model.config.get_text_config()
    unknown = set(getattr(config, "layer_types", None) or []) - _KNOWN_LAYERS
    if unknown:
        return f"layers of type {', '.join(sorted(unknown))}"
    window = getattr(config, "sliding_window", None)
    first = 11 if not window or window > longest else window + 9
    documents = _random_documents(model, (first, 7, 1))
    own = model.config._attn_implementation
    alone = Forward(model, documents=False, fused_head=False)
    expected = torch.cat([alone.logits(_alone(each)) for each in documents])
    try:
        set_attention(model, DOCUMENTS)
        if model.config._attn_implementation != DOCUMENTS:  # transformers only logs that it could not
            return "its attention cannot be switched"
        found = Forward(model, documents=True, fused_head=False).logits(_flat(documents))
    except (UnsupportedAttention, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        set_attention(model, own)
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    error_found = _relative_error(found, expected)
    if error_found < _TOLERANCE[model.dtype]:
        return ""
    set_attention(model, own)
    return f"its logits differ by {error_found:.1e}"


@torch.no_grad()
def _head_is_plain(model: PreTrainedModel, documents: bool) -> bool:
    """Whether the logits are the plain head's of the decoder's last hidden state, in the shape that the configuration
    tells: no adapter, no hook, and nothing that nobody told."""
    head = plain_head(model)
    if head is None:
        return False
    (document,) = _random_documents(model, (13,))
    batch = _flat((document,)) if documents else _alone(document)
    try:
        hidden = Forward(model, documents, fused_head=True).hidden(batch)
    except (AttributeError, TypeError, ValueError):
        return False
    expected = Forward(model, documents, fused_head=False).logits(batch)
    return (
        _relative_error(wide_logits(hidden, head.weight, head.bias, shaping_of(model)), expected)
        < _TOLERANCE[model.dtype] / 10
    )


def bfloat16_gain(features: int, width: int, rows: int = 1024) -> float:
    """How many times faster this CPU multiplies [rows, features] by [features, width] in bfloat16 than in float32."""

    def seconds(dtype: torch.dtype) -> float:
        x, weight = torch.zeros(rows, features, dtype=dtype), torch.zeros(width, features, dtype=dtype)
        best = float("inf")
        for _ in range(6):
            start = time.perf_counter()
            F.linear(x, weight)
            best = min(best, time.perf_counter() - start)
        return best

    return seconds(torch.float32) / seconds(torch.bfloat16)


_PROBED_DOCUMENT = 384
"""Tokens, in the middle of the lengths that are computed in blocks."""


def blocks_gain(config: Any, dtype: torch.dtype) -> float | None:
    """How many times faster this CPU computes attention over a document of middling length in blocks of products than
    in torch's kernel, forward and backward; None for heads that are never computed in blocks."""
    heads = int(config.num_attention_heads)
    key_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    q, k, v = (
        torch.zeros(1, _PROBED_DOCUMENT, each, width, dtype=dtype).transpose(1, 2).requires_grad_()
        for each in (heads, key_heads, key_heads)
    )
    if not document_attention.computes(q, v, _PROBED_DOCUMENT, None, in_blocks=True):
        return None

    def seconds(in_blocks: bool) -> float:
        start = time.perf_counter()
        output = document_attention.attend(q, k, v, (_PROBED_DOCUMENT,), width**-0.5, None, in_blocks=in_blocks)
        torch.autograd.grad(output, (q, k, v), output)
        return time.perf_counter() - start

    kernel, blocks = zip(*[(seconds(False), seconds(True)) for _ in range(4)], strict=True)
    return float(min(kernel) / min(blocks))
