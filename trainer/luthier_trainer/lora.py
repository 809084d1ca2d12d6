"""The adapters: PEFT's modules and files, with a faster product inside."""

import types
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from transformers.pytorch_utils import Conv1D

from luthier_trainer.products import linear, linear_t


def low_rank_gradients(
    d_result: torch.Tensor, low: torch.Tensor, b: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of low [n, r] and of B [out, r], where s low B' was added to the result [n, out]."""
    d_low = linear_t(d_result, b)
    d_low *= scaling
    d_b = d_result.t() @ low
    d_b *= scaling
    return d_low, d_b


class Factors(NamedTuple):
    """What a plain LoRA layer on a frozen weight computes with: W [out, in], its bias [out], A [r, in], B [out, r]."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    a: torch.Tensor
    b: torch.Tensor
    scaling: float


def factors_of(module: nn.Module, dtype: torch.dtype) -> Factors | None:
    """What the module computes with, where it was given the faster product and now computes in this precision; None
    when its own forward is to be called."""
    forward = vars(module).get("forward")
    return _factors(module, dtype) if getattr(forward, "__func__", None) is _product else None


def _factors(module: Any, dtype: torch.dtype) -> Factors | None:
    adapter = module.active_adapters[0]
    base = module.base_layer
    a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    if module.disable_adapters or module.merged or base.weight.dtype != dtype or a.dtype != dtype:
        return None
    weight = base.weight.t() if type(base) is Conv1D else base.weight
    return Factors(weight, base.bias, a, b, module.scaling[adapter])


class _LoraProduct(torch.autograd.Function):
    """x W' + b + s (x A') B', the adapter added in the same pass as the product; W [out, in] and b are frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        result = linear(rows, weight, bias)
        low = linear(rows, a)
        result.addmm_(low, b.t(), alpha=scaling)
        ctx.save_for_backward(rows, low, weight, a, b)
        ctx.scaling = scaling
        ctx.shape = x.shape
        return result.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, low, weight, a, b = ctx.saved_tensors
        d_result = gradients[0].reshape(-1, weight.shape[0])
        d_low, d_b = low_rank_gradients(d_result, low, b, ctx.scaling)
        d_a = d_low.t() @ rows
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = linear_t(d_result, weight).addmm_(d_low, a).view(ctx.shape)
        return d_x, None, None, d_a, d_b, None


def _product(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Stands in for `forward` of PEFT's LoRA layer while it trains a single plain adapter on a frozen Linear or
    Conv1D, GPT-2's Linear with a weight of [in, out]."""
    factors = None if args or kwargs else _factors(self, x.dtype)
    if factors is None:
        plain: torch.Tensor = type(self).forward(self, x, *args, **kwargs)
        return plain
    result: torch.Tensor = _LoraProduct.apply(x, *factors)  # type: ignore[no-untyped-call]
    return result


def _is_plain(module: nn.Module) -> bool:
    """Whether the module is a LoRA layer whose forward `_product` computes."""
    if type(module) is not LoraLinear or len(module.lora_A) != 1 or module.lora_variant:
        return False
    (adapter,) = module.lora_A.keys()
    base = module.base_layer
    return (
        module.active_adapters == [adapter]
        and type(base) in (nn.Linear, Conv1D)
        and not base.weight.requires_grad
        and not (base.bias is not None and base.bias.requires_grad)
        and isinstance(module.lora_dropout[adapter], nn.Identity)
        and module.lora_B[adapter].bias is None
        and not any((each._forward_hooks or each._forward_pre_hooks) for each in module.modules())
    )


def speed_up(model: nn.Module) -> int:
    """Gives every plain LoRA layer of the model the fused product; the others keep PEFT's. Returns how many got it."""
    plain = [module for module in model.modules() if _is_plain(module)]
    for module in plain:
        module.forward = types.MethodType(_product, module)
    return len(plain)
