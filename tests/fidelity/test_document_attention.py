"""Attention per document on a CPU, in torch's kernel and in blocks of products, is plain attention."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from fidelity.tiny import gradients, largest_error, llama, plain_gradients, rows, with_lora

from luthier_trainer import document_attention, lora, plan
from luthier_trainer.document_attention import attend
from luthier_trainer.flatten import flattened, scored_tokens
from luthier_trainer.forward import DOCUMENTS_IN_BLOCKS, Forward
from luthier_trainer.plan import Compute, attention_name, choose_blocks
from luthier_trainer.probe import choose_forward
from luthier_trainer.state import ResumedPlan

LENGTHS = (230, 1, 800, 64, 391, 2, 129)
WIDTH = 64
WAYS = pytest.mark.parametrize(
    ("in_blocks", "window", "key_heads"),
    [(True, None, 8), (True, None, 2), (True, 150, 4), (True, 7, 8), (False, None, 8), (False, None, 2)],
)


def _draws(key_heads: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(queries, keys, values), and the gradient of the output; rounded to `dtype`."""
    draw = torch.Generator().manual_seed(0)
    tokens = sum(LENGTHS)
    drawn = [torch.randn(1, tokens, heads, WIDTH, generator=draw).to(dtype) for heads in (8, key_heads, key_heads, 8)]
    return [each.transpose(1, 2) for each in drawn[:3]], drawn[3].transpose(1, 2)


def _with_gradients(output: torch.Tensor, inputs: Sequence[torch.Tensor], gradient: torch.Tensor) -> list[torch.Tensor]:
    return [output.detach(), *torch.autograd.grad(output, inputs, gradient)]


def _attended(
    inputs: Sequence[torch.Tensor], gradient: torch.Tensor, window: int | None, in_blocks: bool
) -> list[torch.Tensor]:
    q, k, v = (each.detach().requires_grad_() for each in inputs)
    return _with_gradients(attend(q, k, v, LENGTHS, 0.125, window, in_blocks=in_blocks), (q, k, v), gradient)


def _plain(inputs: Sequence[torch.Tensor], gradient: torch.Tensor, window: int | None) -> list[torch.Tensor]:
    """torch's attention, document by document."""
    q, k, v = (each.detach().requires_grad_() for each in inputs)
    borders = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    outputs = []
    for first, last in pairwise(borders):
        queries, *others = (each[:, :, first:last] for each in (q, k, v))
        keys, values = (each.repeat_interleave(8 // each.shape[1], 1) for each in others)
        seen = torch.ones(last - first, last - first, dtype=torch.bool).tril()
        mask = None if window is None else seen.triu(1 - window)
        outputs.append(
            F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=mask is None, scale=0.125)
        )
    return _with_gradients(torch.cat(outputs, 2), (q, k, v), gradient)


def _errors(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]


@WAYS
def test_in_64_bits_output_and_gradients_are_those_of_plain_attention(
    in_blocks: bool, window: int | None, key_heads: int
) -> None:
    inputs, gradient = _draws(key_heads, torch.float64)
    errors = _errors(_attended(inputs, gradient, window, in_blocks), _plain(inputs, gradient, window))
    assert max(errors) < 1e-10


@WAYS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_hardly_more_than_that_of_torchs_attention(
    in_blocks: bool, window: int | None, key_heads: int, dtype: torch.dtype
) -> None:
    inputs, gradient = _draws(key_heads, dtype)
    exact = _plain([each.double() for each in inputs], gradient.double(), window)
    errors = _errors(_attended(inputs, gradient, window, in_blocks), exact)
    torchs = _errors(_plain(inputs, gradient, window), exact)
    assert all(error < 1.5 * other for error, other in zip(errors, torchs, strict=True))


@pytest.mark.parametrize("in_blocks", [True, False])
def test_a_rerun_is_equal_bit_by_bit_and_evaluation_computes_what_training_does(in_blocks: bool) -> None:
    inputs, gradient = _draws(2, torch.bfloat16)
    first, second = (_attended(inputs, gradient, None, in_blocks) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with torch.no_grad():
        q, k, v = inputs
        assert torch.equal(attend(q, k, v, LENGTHS, 0.125, None, in_blocks=in_blocks), first[0])


def test_blocks_never_see_a_later_token_or_another_document() -> None:
    (q, k, v), _ = _draws(8, torch.float32)
    before = attend(q, k, v, LENGTHS, 0.125, None, in_blocks=True)
    for each in (q, k, v):
        each[:, :, 200:232] += 5.0  # the end of the first document, all of the second, the start of the third
    after = attend(q, k, v, LENGTHS, 0.125, None, in_blocks=True)
    assert torch.equal(after[:, :, :200], before[:, :, :200])
    assert not torch.equal(after[:, :, 200:1031], before[:, :, 200:1031])
    assert torch.equal(after[:, :, 1031:], before[:, :, 1031:])


@pytest.fixture
def _everything_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_attention, "_IN_BLOCKS", range(3, 100))
    monkeypatch.setattr(document_attention, "_SMALLEST_ROW", 1)
    monkeypatch.setattr(document_attention, "_WORTH_THREADS", 0)


def _compute(dtype: torch.dtype) -> Compute:
    return Compute(torch.device("cpu"), dtype, torch.get_num_threads(), ())


@pytest.mark.usefixtures("_everything_in_blocks")
def test_a_models_gradients_in_blocks_are_those_of_every_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "blocks_gain", lambda config, dtype: 1.0)
    model = llama()
    trained = with_lora(model)
    expected_loss, expected = plain_gradients(trained.root, rows(13, 1, 29, 2, 7))
    lora.speed_up(model)
    forward, _ = choose_forward(model, "auto", 29)
    (note,) = choose_blocks(forward, _compute(torch.float64), None)
    assert model.config._attn_implementation == DOCUMENTS_IN_BLOCKS
    assert "1.0 times the speed" in note
    batch = flattened(rows(13, 1, 29, 2, 7))
    loss = forward.loss_sum(batch) / scored_tokens(rows(13, 1, 29, 2, 7))
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == pytest.approx(expected_loss, rel=1e-10)
    assert largest_error(gradients(trained.root), expected) < 1e-10


@pytest.mark.parametrize(
    ("gain", "name"), [(1.3, "documents-blocks"), (0.5, "documents-sdpa"), (None, "documents-sdpa")]
)
def test_a_machine_that_is_slower_in_blocks_does_without(
    monkeypatch: pytest.MonkeyPatch, gain: float | None, name: str
) -> None:
    monkeypatch.setattr(plan, "blocks_gain", lambda config, dtype: gain)
    forward, _ = choose_forward(llama(), "auto", 29)
    notes = choose_blocks(forward, _compute(torch.float32), None)
    assert attention_name(forward, _compute(torch.float32)) == name
    assert len(notes) == (gain is not None)


@pytest.mark.parametrize("name", ["documents-blocks", "documents-sdpa"])
def test_a_resumed_job_keeps_its_way(name: str) -> None:
    forward: Forward = choose_forward(llama(), "auto", 29)[0]
    resumed = ResumedPlan("cpu", "float32", name, 4096, 1)
    assert choose_blocks(forward, _compute(torch.float32), resumed) == []
    assert attention_name(forward, _compute(torch.float32)) == name
