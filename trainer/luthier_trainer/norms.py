"""Root-mean-square norms with few passes over memory and little kept: the input and one number a row.

transformers' modules write every intermediate result out, most of them in 32 bits, and keep three for the backward
pass. Here rows are worked on in blocks that stay in a core's cache, in 32 bits, and rounded once.
"""

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from luthier_trainer.blocks import blocks
from luthier_trainer.proof import equals, random_like, takes_one_tensor, traits

_EPSILONS = ("variance_epsilon", "eps", "epsilon")
_PROBED_ROWS = 24


class _RmsNorm(torch.autograd.Function):
    """x / rms(x) * (offset + weight) along the last dimension, rms(x) = sqrt(mean(x^2) + epsilon)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float, offset: float) -> torch.Tensor:
        width = x.shape[-1]
        rows = x.reshape(-1, width)
        wide = torch.promote_types(x.dtype, torch.float32)
        factor = weight.to(wide) + offset if offset else weight.to(wide)
        result = torch.empty_like(rows)
        inverse = torch.empty(len(rows), 1, dtype=wide, device=x.device)
        for block in blocks(rows):
            part, scale = rows[block].to(wide), inverse[block]
            torch.linalg.vector_norm(part, dim=-1, keepdim=True, out=scale)
            scale.square_().div_(width).add_(epsilon).rsqrt_()
            result[block] = (part * scale).mul_(factor)
        ctx.save_for_backward(x, weight, inverse)
        ctx.offset = offset
        return result.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        width, wide = x.shape[-1], inverse.dtype
        rows, d_rows = x.reshape(-1, width), gradients[0].reshape(-1, width)
        factor = weight.to(wide) + ctx.offset if ctx.offset else weight.to(wide)
        d_x = torch.empty_like(rows)
        d_weight = torch.zeros_like(factor) if ctx.needs_input_grad[1] else None
        for block in blocks(rows):
            scale = inverse[block]
            unit = rows[block] * scale
            gradient = d_rows[block].to(wide)
            if d_weight is not None:
                d_weight += (gradient * unit).sum(0)
            gradient = gradient * factor
            along = (gradient * unit).mean(-1, keepdim=True)
            d_x[block] = gradient.addcmul_(unit, along, value=-1).mul_(scale)
        return d_x.view(x.shape), None if d_weight is None else d_weight.to(weight.dtype), None, None


@dataclass(frozen=True)
class _Formula:
    """What a norm computes. `offset` is 1 where the weight is kept as its difference from 1 (Gemma)."""

    epsilon: float
    offset: float

    def __call__(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if x.is_cuda and not self.offset and weight.dtype == x.dtype:
            return F.rms_norm(x, x.shape[-1:], weight, self.epsilon)  # one kernel each way there
        result: torch.Tensor = _RmsNorm.apply(x, weight, self.epsilon, self.offset)  # type: ignore[no-untyped-call]
        return result


def _normed(formula: _Formula, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    return formula(x, weight)


def _is_rms_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return (
        "RMSNorm" in type(module).__name__
        and takes_one_tensor(module)
        and list(module._parameters) == ["weight"]
        and not module._modules
        and not module._buffers
        and weight is not None
        and weight.ndim == 1
    )


def _formula(module: nn.Module) -> _Formula | None:
    """The formula that this norm provably computes, None when it is another."""
    weight = module._parameters["weight"]
    assert weight is not None
    epsilon = next((value for name in _EPSILONS if isinstance(value := getattr(module, name, None), float)), None)
    if epsilon is None:
        return None

    def original(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        stand_in = copy.copy(module)
        stand_in._parameters = {"weight": weight}  # type: ignore[dict-item]
        result: torch.Tensor = type(module).forward(stand_in, x)
        return result

    width = len(weight)
    x = random_like((1, _PROBED_ROWS, width), weight.dtype, weight.device, seed=1) * 0.3
    x[:, ::2] *= 0.01  # rows in which the epsilon matters
    random_weight = random_like((width,), weight.dtype, weight.device, seed=2)
    return next(
        (
            each
            for each in (_Formula(epsilon, 0.0), _Formula(epsilon, 1.0))
            if equals(original, each, (x, random_weight))
        ),
        None,
    )


def speed_up(model: nn.Module) -> int:
    """Gives every norm of the model that is proven to be a root-mean-square norm the faster one. Returns how many."""
    proven: dict[tuple[Any, ...], _Formula | None] = {}
    count = 0
    for module in model.modules():
        if not _is_rms_norm(module):
            continue
        kind = (*traits(module), module.weight.shape, module.weight.dtype)
        if kind not in proven:
            proven[kind] = _formula(module)
        formula = proven[kind]
        if formula is None:
            continue
        module.forward = partial(_normed, formula, module)
        count += 1
    return count
