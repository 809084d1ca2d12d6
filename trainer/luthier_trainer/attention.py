"""Attention per document: the documents of a flattened row [1, T] attend to themselves alone.

Registered with transformers under ATTENTION and IN_BLOCKS. The documents' borders travel through the model's forward as
the keyword arguments that transformers defines for flash attention (`cu_seq_lens_q`, ...), so no state is shared
between jobs. There is never a T x T mask: on CPU each document is computed by itself (`document_attention`, and plain
causal SDPA for what that does not compute), on CUDA all of them run through a varlen kernel. What this function does
not implement it refuses with UnsupportedAttention, and the caller falls back to padded batches.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from luthier_trainer import document_attention
from luthier_trainer.flatten import to_device

ATTENTION = "luthier_documents"

IN_BLOCKS = "luthier_documents_in_blocks"
"""As ATTENTION, to rounding, with documents of middling length in blocks of products where that is possible."""

_UNSUPPORTED = ("position_bias", "s_aux", "sinks", "head_mask", "cache", "indices")


_SHORT = 256
"""On CPU, a bfloat16 document of at most so many tokens attends in float32, which is more exact and faster: forward and
backward of 8 heads of 64 take 0.24 ms of one core with AMX for 48 tokens (0.84 in bfloat16) and 3.1 for 200 (3.8); for
400 bfloat16 wins (13.5, 14.6)."""


class UnsupportedAttention(Exception):
    """The model asks for something in attention that documents do not implement."""


def document_arguments(lengths: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    """The keyword arguments of a model's forward that tell attention where documents of these lengths lie."""
    borders = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    torch.cumsum(torch.tensor(lengths, dtype=torch.int32), 0, out=borders[1:])
    borders = to_device(borders, device)
    longest = max(lengths)
    return {
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": longest,
        "max_length_k": longest,
        "document_lengths": lengths,  # ours: what is split on the host must not ask the device where
    }


def attend_documents(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    in_blocks: bool = False,
    document_lengths: tuple[int, ...] | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document.

    `query` [1, heads, T, d]; `key`, `value` [1, key heads, T, d], key heads dividing heads. Returns ([1, T, heads, d],
    None). Raises UnsupportedAttention for what it does not implement.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        raise UnsupportedAttention("the model does not pass the documents' borders to its attention")
    if attention_mask is not None or query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise UnsupportedAttention("the model brings a mask or a cache of its own")
    if others.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise UnsupportedAttention("the model's attention is not causal")
    if refused := [name for name in _UNSUPPORTED if others.get(name) is not None]:
        raise UnsupportedAttention(f"the model's attention takes {refused[0]}")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if query.is_cuda and softcap is None and dropout == 0.0 and query.dtype != torch.float32:
        return _varlen(query, key, value, cu_seq_lens_q, max_length_q, scale, sliding_window), None
    lengths = list(document_lengths) if document_lengths is not None else torch.diff(cu_seq_lens_q).tolist()
    plain = softcap is None and dropout == 0.0
    if plain and document_attention.computes(query, value, max_length_q, sliding_window, in_blocks=in_blocks):
        attended = document_attention.attend(
            query, key, value, tuple(lengths), scale, sliding_window, in_blocks=in_blocks
        )
        return attended.transpose(1, 2), None
    outputs = [
        _attend(q, k, v, scale, dropout, sliding_window, softcap).transpose(1, 2)
        for q, k, v in zip(
            torch.split(query, lengths, 2), torch.split(key, lengths, 2), torch.split(value, lengths, 2), strict=True
        )
    ]
    return torch.cat(outputs, 1), None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """One document: [1, heads, t, d] each."""
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.shape[2] <= _SHORT:
        wide = _attend(query.float(), key.float(), value.float(), scale, dropout, window, softcap)
        return wide.to(query.dtype)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    length = query.shape[2]
    banded = window is not None and length > window
    if softcap is None:
        mask = _band(length, window, query.device) if banded and window is not None else None
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale, is_causal=mask is None
        )
    scores = torch.tanh(query @ key.transpose(2, 3) * (scale / softcap)) * softcap
    band = _band(length, window if banded and window is not None else length, query.device)
    weights = torch.softmax(scores.masked_fill(~band, float("-inf")), -1, dtype=_wide(query.dtype)).to(query.dtype)
    return F.dropout(weights, dropout) @ value


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _band(length: int, window: int, device: torch.device) -> torch.Tensor:
    """[length, length], true where a token may look: itself and the `window - 1` tokens before it."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders: torch.Tensor,
    longest: int,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """All documents in one kernel, in half precision on CUDA. Returns [1, T, heads, d]."""
    q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
    left = -1 if window is None or window >= longest else window - 1
    flash = _flash_attention()
    if flash is not None:
        output: torch.Tensor = flash(
            q, k, v, borders, borders, longest, longest, softmax_scale=scale, causal=True, window_size=(left, 0)
        )
        return output[None]
    from torch.nn.attention.varlen import varlen_attn

    result = varlen_attn(
        q,
        k,
        v,
        borders,
        borders,
        longest,
        longest,
        scale=scale,
        window_size=(left, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    if isinstance(result, tuple):
        result = result[0]
    return result[None]


@cache
def _flash_attention() -> Callable[..., Any] | None:
    """flash-attn's varlen function where that package is installed."""
    try:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]
    except ImportError:
        return None
    function: Callable[..., Any] = flash_attn_varlen_func
    return function


AttentionInterface.register(ATTENTION, attend_documents)
AttentionInterface.register(IN_BLOCKS, partial(attend_documents, in_blocks=True))
