"""Products with weights, through the faster of torch's two libraries for 32 bits on a CPU.

torch multiplies float32 through MKL, which does not take its fastest way on AMD's processors: with AVX-512 on a Zen 4,
oneDNN is 1.08 to 1.2 times as fast for 64 rows and more (512 to 8,192 features, either way), and up to 1.45 times for
the thin products of adapters. The processor's maker decides, not a measurement, because sums differ in their last bit
and a rerun must not depend on what else the machine did. Everything else is torch's own product.
"""

import platform
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

_FEWEST_ROWS = 64


@cache
def through_onednn() -> bool:
    """Whether this machine's float32 products go through oneDNN."""
    return _is_amd() and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


def _is_amd() -> bool:
    try:
        return platform.machine() == "x86_64" and "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W' + b: `x` [n, in], `weight` [out, in], `bias` [out]. Without a gradient: for use in a `Function`."""
    if not _suits(x, weight):
        return F.linear(x, weight, bias)
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


def linear_t(dy: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """dy W, the gradient of `linear` in x: `dy` [n, out], `weight` [out, in]. Without a gradient itself. A transposed
    copy of W would not make it faster."""
    return linear(dy, weight.t())


def _suits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and x.shape[0] >= _FEWEST_ROWS
        and through_onednn()
    )
