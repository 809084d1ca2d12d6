"""The gated product of a decoder's MLP, act(gate) * up, keeping the gate and up projections alone.

autograd keeps act(gate) and the product too. Here both are computed again in the backward pass, which costs one
activation and one product more, and halves what an MLP keeps.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from luthier_trainer.blocks import blocks
from luthier_trainer.lora import factors_of, low_rank_gradients
from luthier_trainer.products import linear, linear_t
from luthier_trainer.proof import equals, random_like, takes_one_tensor, traits


@dataclass(frozen=True)
class _Activation:
    """value: act(x); gradient: act'(x) times the first argument, x being the second. Both are the kernels that autograd
    would call: one pass each, whose results are rounded once."""

    value: Callable[[torch.Tensor], torch.Tensor]
    gradient: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


_ACTIVATIONS = (
    _Activation(F.silu, torch.ops.aten.silu_backward.default),
    _Activation(partial(F.gelu, approximate="tanh"), partial(torch.ops.aten.gelu_backward, approximate="tanh")),
    _Activation(F.gelu, torch.ops.aten.gelu_backward.default),
)

_SMALL = {"gate_proj": (20, 16), "up_proj": (20, 16), "down_proj": (16, 20)}
"""The projections of a gated MLP, and the shapes of those it is proven with."""


def _product(gate: torch.Tensor, up: torch.Tensor, activation: _Activation) -> torch.Tensor:
    """[n, I], rounded as the plain modules round."""
    gate, up = _rows(gate), _rows(up)
    result = torch.empty_like(gate)
    for block in blocks(gate):
        torch.mul(activation.value(gate[block]), up[block], out=result[block])
    return result


def _backward(
    d_product: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: _Activation, product: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate and up, rounded as autograd rounds them. Where there is a `product`, act(gate) * up is
    written to it, and the gradient of gate over `d_product`."""
    d_up = torch.empty_like(up)
    d_gate = torch.empty_like(gate) if product is None else d_product
    for block in blocks(gate):
        value, gradient = activation.value(gate[block]), d_product[block]
        torch.mul(gradient, value, out=d_up[block])
        if product is not None:
            torch.mul(value, up[block], out=product[block])
        d_gate[block] = activation.gradient(torch.mul(gradient, up[block], out=value), gate[block])
    return d_gate, d_up


class _Gated(torch.autograd.Function):
    """act(gate) * up."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: _Activation) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _product(gate, up, activation).view(gate.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        d_gate, d_up = _backward(_rows(gradients[0]), _rows(gate), _rows(up), ctx.activation, None)
        return d_gate.view(gate.shape), d_up.view(up.shape), None


class _GatedDown(torch.autograd.Function):
    """(act(gate) * up) W' + bias + s (act(gate) * up) A' B': through a frozen linear module with a LoRA adapter. The
    product is computed a second time for the adapter's gradient, not kept."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: torch.Tensor,
        up: torch.Tensor,
        activation: _Activation,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        product = _product(gate, up, activation)
        result = linear(product, weight, bias)
        low = linear(product, a)
        result.addmm_(low, b.t(), alpha=scaling)
        ctx.save_for_backward(gate, up, low, weight, a, b)
        ctx.activation, ctx.scaling = activation, scaling
        return result.view(*gate.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up, low, weight, a, b = ctx.saved_tensors
        d_result = _rows(gradients[0])
        d_low, d_b = low_rank_gradients(d_result, low, b, ctx.scaling)
        d_product = linear_t(d_result, weight).addmm_(d_low, a)
        product = torch.empty_like(d_product)
        d_gate, d_up = _backward(d_product, _rows(gate), _rows(up), ctx.activation, product)
        d_a = d_low.t() @ product
        return d_gate.view(gate.shape), d_up.view(up.shape), None, None, None, d_a, d_b, None


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


@dataclass(frozen=True)
class _Mlp:
    """A module that computes down(act(gate(x)) * up(x))."""

    activation: _Activation

    def __call__(self, module: Any, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = module.gate_proj(x), module.up_proj(x), module.down_proj
        adapted = factors_of(down, gate.dtype)
        result: torch.Tensor
        if adapted is None:
            result = down(_Gated.apply(gate, up, self.activation))  # type: ignore[no-untyped-call]
        else:
            result = _GatedDown.apply(gate, up, self.activation, *adapted)  # type: ignore[no-untyped-call]
        return result


def _mlp(module: nn.Module, dtype: torch.dtype, device: torch.device) -> _Mlp | None:
    """The faster computation that this module provably does, by its own code on small projections in place of its own;
    None when it does another."""

    def small(x: torch.Tensor) -> nn.Module:
        stand_in = copy.copy(module)
        stand_in._modules = dict(module._modules)
        for seed, (name, (width, features)) in enumerate(_SMALL.items()):
            projection = nn.Linear(features, width, bias=False, device="meta")
            weight = random_like((width, features), torch.bfloat16, x.device, seed)
            projection.weight = nn.Parameter(weight.to(x.dtype))
            stand_in._modules[name] = projection
        return stand_in

    def original(x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = type(module).forward(small(x), x)
        return result

    for mlp in map(_Mlp, _ACTIVATIONS):

        def faster(x: torch.Tensor, mlp: _Mlp = mlp) -> torch.Tensor:
            return mlp(small(x), x)

        inputs = [random_like((1, 24, 16), each, device, seed=9) for each in (torch.float64, dtype)]
        if all(equals(original, faster, (x,)) for x in inputs):
            return mlp
    return None


def _may_be_gated(module: nn.Module) -> bool:
    return takes_one_tensor(module) and set(_SMALL) <= set(module._modules) and not module._parameters


def speed_up(model: nn.Module) -> int:
    """Gives every MLP of the model that is proven to compute this the faster way. Returns how many; to be called after
    `lora.speed_up`."""
    proven: dict[tuple[Any, ...], _Mlp | None] = {}
    count = 0
    for module in model.modules():
        if not _may_be_gated(module):
            continue
        weight = next(module.parameters())
        dtype = weight.dtype if weight.dtype.is_floating_point else torch.bfloat16
        kind = (*traits(module), repr(getattr(module, "act_fn", None)), dtype, weight.device)
        if kind not in proven:
            proven[kind] = _mlp(module, dtype, weight.device)
        mlp = proven[kind]
        if mlp is not None:
            module.forward = partial(mlp, module)
            count += 1
    return count
