"""Cross-entropy of scored rows through a linear head, without the full logits ever existing.

The head runs on chunks of rows; the gradient of each chunk is computed in the forward pass, while its logits are there,
so that only [chunk, vocabulary] is ever held. After the idea of Liger Kernel's and torchtune's chunked losses.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from luthier_trainer.products import linear, linear_t

_CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**27}
"""Logits held at once. On CPU 16 MiB of fp32 stays near the cache; on CUDA 512 MiB keeps the products large."""

_MIN_CHUNK_ROWS = 64


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Scored rows whose logits exist at a time."""
    return max(_CHUNK_ELEMENTS.get(device.type, 2**25) // vocabulary, _MIN_CHUNK_ROWS)


@dataclass(frozen=True)
class Shaping:
    """What a model does to the product of its head: logits = cap tanh(scale z / cap), or scale z where `cap` is None.

    Gemma 2 caps, Granite and Cohere scale. The default does nothing.
    """

    scale: float = 1.0
    cap: float | None = None

    def shape(self, product: torch.Tensor) -> torch.Tensor:
        """The logits of a head's product; in place, so only for a tensor of one's own."""
        if self.scale != 1.0:
            product *= self.scale
        return product if self.cap is None else product.div_(self.cap).tanh_().mul_(self.cap)

    def slope(self, logits: torch.Tensor) -> torch.Tensor | float:
        """d logits / d product, at these logits: scale (1 - (logits / cap)^2)."""
        if self.cap is None:
            return self.scale
        return (logits / self.cap).square_().neg_().add_(1.0).mul_(self.scale)


PLAIN = Shaping()


def wide_logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, shaping: Shaping = PLAIN
) -> torch.Tensor:
    """Logits in at least 32 bits, [n, V]. For use without a gradient."""
    product = linear(hidden, weight, bias)
    return shaping.shape(product.to(torch.promote_types(product.dtype, torch.float32)))


class _ScoredCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        shaping: Shaping,
        smoothing: float,
    ) -> torch.Tensor:
        spread = smoothing / weight.shape[0]
        rows = chunk_rows(weight.shape[0], hidden.device)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight = torch.zeros_like(weight, dtype=wide) if wants_weight else None
        d_bias = torch.zeros_like(weight[:, 0], dtype=wide) if wants_bias else None
        total = hidden.new_zeros((), dtype=wide)
        for start in range(0, hidden.shape[0], rows):
            part, target = hidden[start : start + rows], targets[start : start + rows, None]
            logits = wide_logits(part, weight, bias, shaping)
            slope = None if shaping == PLAIN else shaping.slope(logits)
            log_probability = torch.log_softmax(logits, -1)
            total -= log_probability.gather(1, target).sum() * (1.0 - smoothing)
            if smoothing:
                total -= log_probability.sum() * spread
            gradient = log_probability.exp_()
            if smoothing:
                gradient -= spread
            gradient.scatter_add_(1, target, gradient.new_full((1, 1), smoothing - 1.0).expand_as(target))
            if slope is not None:
                gradient *= slope
            if d_bias is not None:
                d_bias += gradient.sum(0)
            narrow = gradient.to(weight.dtype)
            if d_hidden is not None:
                d_hidden[start : start + rows] = linear_t(narrow, weight)
            if d_weight is not None:
                d_weight += narrow.t() @ part
        ctx.gradients = (d_hidden, d_weight, d_bias)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (scale,) = gradients
        d_hidden, d_weight, d_bias = ctx.gradients
        weight_dtype, bias_dtype = ctx.dtypes
        del ctx.gradients
        return (
            None if d_hidden is None else d_hidden.mul_(scale),
            None if d_weight is None else d_weight.mul_(scale).to(weight_dtype),
            None if d_bias is None else d_bias.mul_(scale).to(bias_dtype),
            None,
            None,
            None,
        )


def scored_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    shaping: Shaping = PLAIN,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """Sum of the cross-entropies (natural logarithm) of `hidden` [n, H] through the head `weight` [V, H], `bias` [V]
    and `shaping`, at `targets` [n]; a share `smoothing` of each target's probability is spread evenly over the
    vocabulary, as torch's `label_smoothing` does. Differentiable once in hidden, weight and bias."""
    result: torch.Tensor = _ScoredCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, shaping, smoothing
    )
    return result


@torch.no_grad()
def score(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    shaping: Shaping = PLAIN,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of cross-entropies, how many targets the head puts first), without a gradient."""
    total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
    rows = chunk_rows(weight.shape[0], hidden.device)
    for start in range(0, hidden.shape[0], rows):
        part, target = hidden[start : start + rows], targets[start : start + rows]
        logits = wide_logits(part, weight, bias, shaping)
        total += F.cross_entropy(logits, target, reduction="sum")
        correct += (logits.argmax(-1) == target).sum()
    return total, correct
