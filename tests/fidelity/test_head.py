"""The head is trained as asked: the loss on scored rows has the gradients of the plain module."""

import pytest
import torch
import torch.nn.functional as F
from fidelity.tiny import gemma2, gradients, largest_error, llama, plain_gradients, rows, with_lora
from torch import nn
from transformers import PreTrainedModel

from luthier_trainer import loss as loss_module
from luthier_trainer.flatten import flattened, scored_tokens
from luthier_trainer.loss import score, scored_cross_entropy
from luthier_trainer.probe import choose_forward

LENGTHS = (17, 5, 11)
GEMMA = 1e-6
"""The plain module itself takes its softmax in 32 bits, whatever the weights are."""


def compare(model: PreTrainedModel, root: nn.Module, *, fused: bool, tolerance: float = 1e-10) -> None:
    """The engine's loss and gradients against the plain module's; `fused` is the way it must have chosen."""
    examples = rows(*LENGTHS)
    expected_loss, expected = plain_gradients(root, examples)
    forward, notes = choose_forward(model, "auto", max(LENGTHS))
    assert forward.documents
    assert forward.fused_head == fused, notes
    loss = forward.loss_sum(flattened(examples)) / scored_tokens(examples)
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == pytest.approx(expected_loss, rel=tolerance)
    assert largest_error(gradients(root), expected) < tolerance
    with torch.no_grad():
        evaluated, _ = forward.score(flattened(examples))
    assert float(evaluated) / scored_tokens(examples) == pytest.approx(expected_loss, rel=tolerance)


def test_a_frozen_head() -> None:
    model = llama()
    compare(model, with_lora(model).root, fused=True)


def test_an_adapter_on_the_head_gets_its_gradient() -> None:
    model = llama()
    root = with_lora(model, ("q_proj", "lm_head")).root
    assert any("lm_head.lora_A" in name for name, each in root.named_parameters() if each.requires_grad)
    compare(model, root, fused=False)


def test_a_saved_head_is_trained_whole() -> None:
    model = llama()
    root = with_lora(model, ("q_proj",), ("lm_head",)).root
    assert any("lm_head" in name for name, each in root.named_parameters() if each.requires_grad)
    compare(model, root, fused=True)


def test_a_saved_head_and_saved_embeddings() -> None:
    model = llama()
    compare(model, with_lora(model, ("q_proj",), ("lm_head", "embed_tokens")).root, fused=True)


def test_tied_embeddings_trained_whole_get_both_gradients() -> None:
    model = llama(tied=True)
    compare(model, model.requires_grad_(True), fused=True)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_tied_embeddings_saved_whole_by_an_adapter() -> None:
    model = llama(tied=True)
    compare(model, with_lora(model, ("q_proj",), ("embed_tokens", "lm_head")).root, fused=True)


def test_soft_capped_logits_keep_the_fused_head() -> None:
    model = gemma2()
    compare(model, with_lora(model).root, fused=True, tolerance=GEMMA)


def test_soft_capped_logits_trained_whole() -> None:
    model = gemma2()
    compare(model, model.requires_grad_(True), fused=True, tolerance=GEMMA)


def test_a_hook_on_the_head_is_not_bypassed() -> None:
    model = llama()
    root = with_lora(model).root
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 0.5)
    compare(model, root, fused=False)


@pytest.mark.parametrize("biased", [True, False])
def test_chunks_have_the_gradients_of_the_whole(monkeypatch: pytest.MonkeyPatch, biased: bool) -> None:
    monkeypatch.setattr(loss_module, "_CHUNK_ELEMENTS", {"cpu": 40})
    monkeypatch.setattr(loss_module, "_MIN_CHUNK_ROWS", 3)
    torch.manual_seed(0)
    hidden, weight = torch.randn(10, 6).double().requires_grad_(), torch.randn(13, 6).double().requires_grad_()
    bias = torch.randn(13).double().requires_grad_() if biased else None
    targets = torch.randint(0, 13, (10,))
    trained = [each for each in (hidden, weight, bias) if each is not None]
    expected = F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="sum") * 0.3
    found = scored_cross_entropy(hidden, weight, bias, targets) * 0.3
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    for ours, theirs in zip(torch.autograd.grad(found, trained), torch.autograd.grad(expected, trained), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    total, correct = score(hidden, weight, bias, targets)
    assert float(total) == pytest.approx(float(expected.detach()) / 0.3, rel=1e-12)
    assert int(correct) == int((F.linear(hidden, weight, bias).argmax(-1) == targets).sum())
