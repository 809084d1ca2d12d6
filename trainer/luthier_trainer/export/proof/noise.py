"""Noise on a model's weights, as large as rounding them to a type would be."""

import torch
from transformers import PreTrainedModel

_AT_ONCE = 1 << 22
_SEED = 20240726


@torch.no_grad()
def shake(model: PreTrainedModel, size: float) -> None:
    """Adds to every matrix, in place, normal noise of `size` times the root mean square of each of its rows; the same
    noise each time."""
    draw = torch.Generator().manual_seed(_SEED)
    for weight in model.parameters():
        if weight.ndim < 2:
            continue
        flat = weight.data.view(-1, weight.shape[-1])
        at_once = max(_AT_ONCE // flat.shape[1], 1)
        for start in range(0, len(flat), at_once):
            part = flat[start : start + at_once]
            scale = part.pow(2).mean(1, keepdim=True).sqrt() * size
            part += torch.randn(part.shape, generator=draw, dtype=part.dtype) * scale
