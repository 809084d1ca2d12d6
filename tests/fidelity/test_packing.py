"""Packing and micro-batching change nothing."""

from collections.abc import Callable

import pytest
import torch
from fidelity.tiny import gemma2, gradients, largest_error, llama, plain_gradients, rows, with_lora
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from luthier_trainer import speedups
from luthier_trainer.batches import Batches
from luthier_trainer.flatten import flattened, padded, scored_tokens
from luthier_trainer.forward import DOCUMENTS, Forward, set_attention
from luthier_trainer.probe import choose_forward

CPU = torch.device("cpu")
LENGTHS = (13, 1, 29, 2, 7)
MODELS = pytest.mark.parametrize(
    ("make", "dtype", "tolerance"),
    [
        (llama, torch.float64, 1e-10),
        (llama, torch.float32, 1e-5),
        (gemma2, torch.float64, 1e-6),  # the plain module itself takes its softmax in 32 bits
        (gemma2, torch.float32, 1e-5),
    ],
)


def engine_gradients(forward: Forward, model: torch.nn.Module, budget: int) -> tuple[float, dict[str, torch.Tensor]]:
    examples = rows(*LENGTHS)
    share = 1 / scored_tokens(examples)
    loss = 0.0
    for batch in Batches(forward.documents, budget, 0, CPU).of(examples):
        if len(batch.targets):
            part = forward.loss_sum(batch) * share
            part.backward()  # type: ignore[no-untyped-call]
            loss += float(part.detach())
    return loss, gradients(model)


@MODELS
def test_a_flattened_document_has_the_logits_it_has_alone(
    make: Callable[[torch.dtype], PreTrainedModel], dtype: torch.dtype, tolerance: float
) -> None:
    model = make(dtype)
    examples = rows(*LENGTHS)
    with torch.no_grad():
        alone = [
            model(input_ids=torch.from_numpy(each.input_ids)[None], use_cache=False).logits[0] for each in examples
        ]
        set_attention(model, DOCUMENTS)
        batch = flattened(examples)
        everything = torch.arange(batch.tokens)
        every_row = type(batch)(batch.input_ids, batch.position_ids, None, batch.lengths, everything, everything)
        packed = Forward(model, documents=True, fused_head=False).logits(every_row)
    expected = torch.cat(alone)
    assert float((packed - expected).abs().max() / expected.abs().max()) < tolerance


@pytest.mark.parametrize("adapted", [True, False])
@MODELS
def test_packed_gradients_equal_those_of_every_row_alone(
    make: Callable[[torch.dtype], PreTrainedModel], adapted: bool, dtype: torch.dtype, tolerance: float
) -> None:
    model = make(dtype)
    root: torch.nn.Module = with_lora(model).root if adapted else model.requires_grad_(True)
    expected_loss, expected = plain_gradients(root, rows(*LENGTHS))
    speedups.speed_up(root)
    forward, _ = choose_forward(model, "auto", max(LENGTHS))
    assert forward.documents
    loss, found = engine_gradients(forward, root, budget=1000)
    assert loss == pytest.approx(expected_loss, rel=tolerance)
    assert largest_error(found, expected) < tolerance


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_no_token_budget_changes_loss_or_gradient(attention: str) -> None:
    model = llama()
    trained = with_lora(model)
    speedups.speed_up(model)
    forward, _ = choose_forward(model, attention, max(LENGTHS))
    assert forward.documents == (attention == "auto")
    expected_loss, expected = engine_gradients(forward, trained.root, budget=1000)
    for budget in (1, 14, 16, 31, 44):
        loss, found = engine_gradients(forward, trained.root, budget)
        assert loss == pytest.approx(expected_loss, rel=1e-12)
        assert largest_error(found, expected) < 1e-10


def test_a_window_longer_than_no_row_is_probed_and_honoured() -> None:
    model = gemma2(window=8)
    expected_loss, expected = plain_gradients(model.requires_grad_(True), rows(40, 11, seed=3))
    forward, _ = choose_forward(model, "auto", 40)
    assert forward.documents
    loss = forward.loss_sum(flattened(rows(40, 11, seed=3))) / scored_tokens(rows(40, 11, seed=3))
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == pytest.approx(expected_loss, rel=1e-6)
    assert largest_error(gradients(model), expected) < 1e-6


def test_attention_that_leaks_between_documents_is_found_out_and_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    monkeypatch.setattr(
        "luthier_trainer.forward.document_arguments",
        lambda lengths, device: {
            "cu_seq_lens_q": torch.tensor([0, sum(lengths)], dtype=torch.int32),
            "max_length_q": sum(lengths),
        },
    )
    forward, notes = choose_forward(model, "auto", 29)
    assert not forward.documents
    assert "its logits differ" in notes[0]
    assert model.config._attn_implementation == "sdpa"


def test_padded_batches_give_the_gradients_of_every_row_alone() -> None:
    model = llama()
    trained = with_lora(model)
    expected_loss, expected = plain_gradients(trained.root, rows(*LENGTHS))
    forward = Forward(model, documents=False, fused_head=True)
    loss = forward.loss_sum(padded(rows(*LENGTHS), pad_id=0)) / scored_tokens(rows(*LENGTHS))
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == pytest.approx(expected_loss, rel=1e-10)
    assert largest_error(gradients(trained.root), expected) < 1e-10


def test_a_mixture_of_experts_is_packed_right() -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        initializer_range=0.2,
        sliding_window=None,
    )
    model = MixtralForCausalLM(config).requires_grad_(True)  # its grouped product knows no 64 bits
    expected_loss, _ = plain_gradients(model, rows(*LENGTHS))
    forward, _ = choose_forward(model, "auto", max(LENGTHS))
    loss = forward.loss_sum(flattened(rows(*LENGTHS))) / scored_tokens(rows(*LENGTHS))
    assert forward.documents
    assert float(loss.detach()) == pytest.approx(expected_loss, rel=1e-5)
