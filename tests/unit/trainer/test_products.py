"""Products with weights are the same through either library."""

import pytest
import torch

from luthier_trainer import products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [1, 64, 200])
@pytest.mark.parametrize("onednn", [True, False])
def test_products_are_torchs_to_rounding(
    monkeypatch: pytest.MonkeyPatch, onednn: bool, rows: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(products, "through_onednn", lambda: onednn)
    draw = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*each, generator=draw).to(dtype) for each in ((rows, 96), (160, 96), (160,)))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float64: 1e-12}[dtype]
    y = products.linear(x, weight, bias)
    dx = products.linear_t(y, weight)
    exact = x.double() @ weight.double().t() + bias.double()
    assert (y.dtype, dx.dtype, y.shape, dx.shape) == (dtype, dtype, (rows, 160), (rows, 96))
    assert float((y.double() - exact).norm() / exact.norm()) < tolerance
    back = y.double() @ weight.double()
    assert float((dx.double() - back).norm() / back.norm()) < tolerance


def test_transposed_and_strided_arguments_are_taken() -> None:
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(96, 200, generator=draw), torch.randn(96, 160, generator=draw)
    expected = x.t().double() @ weight.double()
    for found in (products.linear(x.t(), weight.t()), products.linear_t(x.t(), weight)):
        assert float((found.double() - expected).norm() / expected.norm()) < 1e-5
