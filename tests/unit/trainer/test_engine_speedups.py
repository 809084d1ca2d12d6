"""Modules that are made faster compute what they computed, at least as exactly, and keep less."""

import copy
from typing import Any

import pytest
import torch
from fidelity.tiny import llama, with_lora
from torch import nn
from transformers import LlamaConfig
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.cohere2.modeling_cohere2 import apply_rotary_pos_emb as interleaved
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from luthier_trainer import gated, lora, norms, rotary, speedups

WIDTH = 64


def results(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output and every gradient."""
    leaf = x.clone().requires_grad_()
    output = model(leaf)
    trained = [each for each in model.parameters() if each.requires_grad]
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).bfloat16().to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, [leaf, *trained], upstream)]


def errors(found: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    return [float((a.double() - b.double()).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, GemmaRMSNorm])
def test_a_faster_norm_is_no_less_exact_than_the_models_own(kind: Any, dtype: torch.dtype) -> None:
    plain = nn.Sequential(kind(WIDTH))
    plain.get_parameter("0.weight").data.copy_(numbers(WIDTH))
    x = numbers(2, 300, WIDTH)
    exact = results(copy.deepcopy(plain).double(), x.double())
    plain.to(dtype)
    faster = copy.deepcopy(plain)
    assert norms.speed_up(faster) == 1
    found, own = errors(results(faster, x.to(dtype)), exact), errors(results(plain, x.to(dtype)), exact)
    assert all(a <= max(1.1 * b, 2e-6) for a, b in zip(found, own, strict=True)), (found, own)


def test_what_is_another_norm_keeps_its_own() -> None:
    class CenteredRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))

    assert norms.speed_up(nn.Sequential(CenteredRMSNorm(WIDTH), CohereLayerNorm(WIDTH), nn.LayerNorm(WIDTH))) == 0  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh", "gelu"])
def test_a_faster_gated_mlp_computes_the_models_own(activation: str) -> None:
    plain = nn.Sequential(LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=48, hidden_act=activation))).double()  # type: ignore[no-untyped-call]
    faster = copy.deepcopy(plain)
    assert gated.speed_up(faster) == 1
    x = numbers(1, 50, 32).double()
    assert max(errors(results(faster, x), results(plain, x))) < 1e-12


def test_an_mlp_that_does_something_else_keeps_its_own() -> None:
    class Odd(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = super().forward(x) + x  # type: ignore[no-untyped-call]
            return result

    config = LlamaConfig(hidden_size=32, intermediate_size=48)
    assert gated.speed_up(nn.Sequential(Odd(config))) == 0  # type: ignore[no-untyped-call]
    config.hidden_act = "relu"
    assert gated.speed_up(nn.Sequential(LlamaMLP(config))) == 0  # type: ignore[no-untyped-call]


def test_a_rotation_of_another_kind_is_found_out() -> None:
    assert not rotary._is_proven(interleaved, rotary._faster(interleaved), torch.float32, torch.device("cpu"))


def test_a_faster_model_leaves_other_models_as_they_are_and_keeps_less() -> None:
    kept: dict[str, int] = {}

    def keeps(name: str, root: nn.Module) -> None:
        seen: dict[int, int] = {}
        weights = {each.untyped_storage().data_ptr() for each in root.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = root(input_ids=torch.arange(90)[None], use_cache=False).logits
        kept[name] = sum(seen.values())
        output.sum().backward()

    plain, faster = with_lora(llama(torch.float32)), with_lora(llama(torch.float32))
    lora.speed_up(plain.root)
    keeps("before", plain.root)
    speedups.speed_up(faster.root)
    keeps("faster", faster.root)
    keeps("after", plain.root)
    assert kept["after"] == kept["before"]
    assert kept["faster"] < 0.8 * kept["before"]
    for own, other in zip(plain.root.parameters(), faster.root.parameters(), strict=True):
        if own.grad is not None and other.grad is not None:
            torch.testing.assert_close(other.grad * 2, own.grad, rtol=1e-3, atol=1e-3)


class QuietRMSNorm(LlamaRMSNorm):
    """A norm that does not tell its epsilon."""

    def extra_repr(self) -> str:
        return ""


def test_norms_of_one_type_with_other_epsilons_compute_their_own() -> None:
    plain = nn.Sequential(QuietRMSNorm(WIDTH, 1e-6), QuietRMSNorm(WIDTH, 0.1))
    faster = copy.deepcopy(plain)
    assert norms.speed_up(faster) == 2
    x = numbers(2, 30, WIDTH).float() * 0.1
    torch.testing.assert_close(faster(x), plain(x))
