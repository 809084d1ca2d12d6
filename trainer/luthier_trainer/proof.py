"""Whether a faster function computes what a model's own does: outputs and gradients, on random numbers."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

_ROUNDING = {torch.float64: 1e-10, torch.float32: 2e-6, torch.bfloat16: 1e-4, torch.float16: 1e-5}
"""Relative errors that are allowed to a function even where the original makes none."""

_MORE = 1.1
"""How much larger the faster function's rounding error may be than the original's: errors of random numbers vary."""

Compute = Callable[..., torch.Tensor]


def equals(original: Compute, faster: Compute, inputs: Sequence[torch.Tensor]) -> bool:
    """Whether `faster` is at least as exact as `original` on these inputs, all of them differentiated.

    What is exact is the original's result on the same numbers in 64 bits. An error is the norm of the difference over
    the norm, of the output and of each input's gradient by itself. A function that raises is none to use.
    """
    try:
        exact = _results(original, [each.double() for each in inputs])
        plain = _results(original, inputs)
        found = _results(faster, inputs)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, NotImplementedError):
        return False
    allowed = _ROUNDING.get(inputs[0].dtype, 0.0)
    for truth, own, other in zip(exact, plain, found, strict=True):
        if own.shape != other.shape or own.dtype != other.dtype:
            return False
        if not _error(other, truth) <= max(_MORE * _error(own, truth), allowed):
            return False
    return True


def takes_one_tensor(module: nn.Module) -> bool:
    """Whether the module's forward is its type's own and has one argument."""
    return "forward" not in vars(module) and len(inspect.signature(type(module).forward).parameters) == 2


def traits(module: nn.Module) -> tuple[Any, ...]:
    """What modules that compute alike have in common: their type and its plain settings (an epsilon, a sparsity)."""
    plain = {name: each for name, each in vars(module).items() if isinstance(each, bool | int | float | str)}
    plain.pop("training", None)
    return type(module), tuple(sorted(plain.items()))


def random_like(shape: Sequence[int], dtype: torch.dtype, device: torch.device, seed: int) -> torch.Tensor:
    """Normal numbers that depend on the seed alone, whatever the process draws; on a CPU for a model without any."""
    numbers = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))
    return numbers.to(device="cpu" if device.type == "meta" else device, dtype=dtype)


@torch.enable_grad()
def _results(compute: Compute, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The output, and each input's gradient for one and the same random gradient of the output."""
    leaves = [each.detach().clone().requires_grad_() for each in inputs]
    output = compute(*leaves)
    upstream = random_like(output.shape, torch.bfloat16, output.device, seed=1)  # what every precision holds alike
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream.to(output.dtype))]


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30))
