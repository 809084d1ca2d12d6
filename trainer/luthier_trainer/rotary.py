"""Rotary position embeddings with half the passes over queries and keys.

transformers' attention modules call a function of their own file, `apply_rotary_pos_emb`, which negates, copies, and
multiplies everything twice. A module whose forward calls it gets a copy of that forward in which this one name means
the faster function: nothing is changed for other models, other jobs, or the file itself.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from luthier_trainer.proof import equals, random_like

_NAME = "apply_rotary_pos_emb"


class _Rotated(torch.autograd.Function):
    """x cos + (-x2, x1) sin, where x1 and x2 are the halves of the last dimension."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        return _rotate(x, cos, torch.cat((-sin[..., :half], sin[..., half:]), -1))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        half = cos.shape[-1] // 2
        return _rotate(gradients[0], cos, torch.cat((sin[..., half:], -sin[..., :half]), -1)), None, None


def _rotate(x: torch.Tensor, straight: torch.Tensor, crossed: torch.Tensor) -> torch.Tensor:
    """x * straight + (x2, x1) * crossed."""
    half = x.shape[-1] // 2
    result = torch.empty_like(x)
    result[..., :half] = x[..., half:]
    result[..., half:] = x[..., :half]
    return result.mul_(crossed).addcmul_(x, straight)


def _faster(original: Callable[..., Any]) -> Callable[..., Any]:
    """The faster function, which leaves to the original what it does not do."""

    def apply_rotary_pos_emb(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *others: Any, **named: Any
    ) -> Any:
        if (
            others
            or named
            or cos.requires_grad
            or cos.dtype != q.dtype
            or not q.shape[-1] == k.shape[-1] == cos.shape[-1]
        ):
            return original(q, k, cos, sin, *others, **named)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return _Rotated.apply(q, cos, sin), _Rotated.apply(k, cos, sin)  # type: ignore[no-untyped-call]

    return apply_rotary_pos_emb


def _is_proven(
    original: Callable[..., Any], faster: Callable[..., Any], dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether both rotate alike, in 64 bits and in this precision; frequencies may differ between the halves."""

    def both(function: Callable[..., Any]) -> Callable[..., torch.Tensor]:
        def compute(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            cos, sin = (random_like((1, 24, 8), torch.bfloat16, device, seed).to(q.dtype) for seed in (3, 4))
            rotated: torch.Tensor = torch.cat(function(q, k, cos, sin), 1)
            return rotated

        return compute

    return all(
        equals(
            both(original),
            both(faster),
            (random_like((1, 4, 24, 8), each, device, seed=1), random_like((1, 2, 24, 8), each, device, seed=2)),
        )
        for each in (torch.float64, dtype)
    )


def speed_up(model: nn.Module) -> int:
    """Gives every attention module of the model whose rotation is proven to be this one the faster function. Returns
    how many."""
    copies: dict[tuple[Any, ...], types.FunctionType | None] = {}
    count = 0
    for module in model.modules():
        forward = type(module).forward
        if (
            "forward" in vars(module)
            or not isinstance(forward, types.FunctionType)
            or _NAME not in forward.__code__.co_names
        ):
            continue
        original = forward.__globals__.get(_NAME)
        weight = next(module.parameters(), None)
        if not callable(original) or weight is None:
            continue
        dtype = weight.dtype if weight.dtype.is_floating_point else torch.bfloat16
        kind = (forward, dtype, weight.device)
        if kind not in copies:
            faster = _faster(original)
            proven = _is_proven(original, faster, dtype, weight.device)
            copies[kind] = _with_name(forward, faster) if proven else None
        copied = copies[kind]
        if copied is not None:
            module.forward = types.MethodType(copied, module)
            count += 1
    return count


def _with_name(function: types.FunctionType, meaning: Callable[..., Any]) -> types.FunctionType:
    """The function, in which the name of the rotation means another."""
    copied = types.FunctionType(
        function.__code__,
        {**function.__globals__, _NAME: meaning},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    copied.__doc__ = function.__doc__
    return copied
