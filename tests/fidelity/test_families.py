"""Each family of models takes the way that fits it, and every way gives the numbers of the plain model."""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fidelity.families import FAMILIES, Family
from fidelity.jobs import Recorder, chats, task, tiny_base
from fidelity.tiny import Row, gradients, largest_error, plain_gradients, rows, with_lora
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from luthier.trainer.v1.task_pb2 import BaseModelSource
from luthier_trainer import inspect, lora, plan, rope, sft, speedups
from luthier_trainer import loss as loss_module
from luthier_trainer.batches import Batches
from luthier_trainer.config import LoraSettings
from luthier_trainer.control import NoControl
from luthier_trainer.errors import TrainingError
from luthier_trainer.flatten import MicroBatch, scored_tokens
from luthier_trainer.forward import Forward, shaping_of
from luthier_trainer.loss import Shaping, score, scored_cross_entropy
from luthier_trainer.masters import Masters
from luthier_trainer.model import Trained, prepare
from luthier_trainer.optimizer import AdamSettings, Optimizer
from luthier_trainer.probe import choose_forward
from luthier_trainer.weights import write_weights

CPU = torch.device("cpu")
LENGTHS = (13, 1, 29, 2, 16, 7)
WHOLE, CUT = 1000, 31

pytestmark = pytest.mark.filterwarnings(
    # PEFT 0.21 sets ranks for fused experts by patterns that it then believes unused.
    "ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"
)
EVERY = pytest.mark.parametrize("family", FAMILIES, ids=lambda each: each.name)


def way(family: Family, model: PreTrainedModel) -> Forward:
    """The way through the model, which must be the family's, with a note where it is not the fast one."""
    forward, notes = choose_forward(model, "auto", max(LENGTHS))
    assert (forward.documents, forward.fused_head) == (family.documents, family.fused), notes
    if family.documents:
        assert notes == []
    else:
        assert family.reason in notes[0]
        assert "its batches are padded" in notes[0]
    return forward


def batches(forward: Forward, budget: int) -> list[MicroBatch]:
    """The rows as micro-batches, as a job cuts them."""
    borders = rope.borders(forward.model.config, max(LENGTHS))
    return list(Batches(forward.documents, budget, 0, CPU, borders).of(rows(*LENGTHS)))


def accumulate(forward: Forward, budget: int) -> float:
    """The mean loss over all micro-batches; its gradient is left in the parameters."""
    share = 1 / scored_tokens(rows(*LENGTHS))
    loss = 0.0
    for batch in batches(forward, budget):
        if len(batch.targets):
            part = forward.loss_sum(batch) * share
            part.backward()  # type: ignore[no-untyped-call]
            loss += float(part.detach())
    return loss


def check_loss_and_gradients(family: Family, model: PreTrainedModel, root: nn.Module) -> None:
    """The engine against each row alone through the module itself."""
    expected_loss, expected = plain_gradients(root, rows(*LENGTHS))
    speedups.speed_up(root)
    forward = way(family, model)
    for budget in (WHOLE, CUT):
        assert accumulate(forward, budget) == pytest.approx(expected_loss, rel=family.tolerance)
        assert largest_error(gradients(root), expected) < family.tolerance


def every_row(forward: Forward, batch: MicroBatch) -> list[torch.Tensor]:
    """The logits of every document of the batch."""
    total = batch.input_ids.numel()
    logits = forward.logits(
        MicroBatch(
            batch.input_ids,
            batch.position_ids,
            batch.attention_mask,
            batch.lengths,
            torch.arange(total),
            batch.input_ids.reshape(-1),
        )
    )
    if forward.documents:
        return list(torch.split(logits, list(batch.lengths)))
    padded = logits.reshape(*batch.input_ids.shape, -1)
    return [row[:length] for row, length in zip(padded, batch.lengths, strict=True)]


def alone(model: nn.Module, example: Row) -> torch.Tensor:
    """The logits of a row alone, by the module as it is."""
    logits: torch.Tensor = model(input_ids=torch.from_numpy(example.input_ids)[None], use_cache=False).logits[0]
    return logits


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest element."""
    return float((found - expected).abs().max() / expected.abs().max())


@EVERY
@torch.no_grad()
def test_a_document_has_the_logits_it_has_alone(family: Family) -> None:
    model = family.model()
    expected = {tuple(each.input_ids): alone(model, each) for each in rows(*LENGTHS)}
    forward = way(family, model)
    seen = 0
    for batch in batches(forward, WHOLE):
        ids = batch.input_ids[0] if forward.documents else batch.input_ids
        documents = torch.split(ids, list(batch.lengths)) if forward.documents else list(ids)
        for document, length, found in zip(documents, batch.lengths, every_row(forward, batch), strict=True):
            assert error(found, expected[tuple(document[:length].tolist())]) < family.tolerance
            seen += 1
    assert seen == len(LENGTHS)


@EVERY
def test_an_adapter_on_all_linears_gets_the_plain_gradients_for_any_token_budget(family: Family) -> None:
    model = family.model()
    trained = with_lora(model)
    assert trained.target_modules == sorted(family.targets)
    check_loss_and_gradients(family, model, trained.root)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@EVERY
def test_a_step_of_full_fine_tuning_is_the_plain_step(family: Family, tied: bool) -> None:
    model = family.model(tie_word_embeddings=tied).requires_grad_(True)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied  # type: ignore[no-untyped-call]
    plain = copy.deepcopy(model)
    expected_loss, expected = plain_gradients(plain, rows(*LENGTHS))
    named = dict(plain.named_parameters())
    for name, gradient in expected.items():
        named[name].grad = gradient
    matrices = [each for each in named.values() if each.ndim >= 2]
    vectors = [each for each in named.values() if each.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=0.01, eps=0.01).step()

    masters = Masters(model, torch.float64)
    optimizer = Optimizer(masters, AdamSettings(0.9, 0.999, 0.01, 0.1, 0.0))
    forward = way(family, model)
    assert accumulate(forward, CUT) == pytest.approx(expected_loss, rel=family.tolerance)
    assert largest_error(dict(masters.named(masters.gradients)), expected) < family.tolerance
    optimizer.step(0.01)
    found = {name: each.detach() for name, each in model.named_parameters()}
    assert largest_error(found, {name: each.detach() for name, each in named.items()}) < family.tolerance


@EVERY
@torch.no_grad()
def test_the_saved_adapter_has_the_trainers_logits_in_peft_and_when_it_is_continued(
    family: Family, tmp_path: Path
) -> None:
    model = family.model(torch.float32)
    trained = with_lora(model)
    (example,) = rows(29, seed=1)
    expected = alone(model, example)
    assert error(alone(family.model(torch.float32), example), expected) > 1e-2
    save(trained, Masters(trained.root, torch.float32), tmp_path)
    loaded = PeftModel.from_pretrained(family.model(torch.float32), str(tmp_path))
    assert error(alone(loaded, example), expected) < 1e-5
    source = BaseModelSource(adapter_dir=str(tmp_path))
    again = prepare(family.model(torch.float32), source, LORA, name="tiny", seed=1, resume_from=None)
    assert error(alone(again.causal_lm, example), expected) < 1e-5
    assert again.trained_parameters == trained.trained_parameters
    assert again.target_modules == trained.target_modules


@EVERY
@torch.no_grad()
def test_the_saved_model_has_the_trainers_logits_in_transformers(family: Family, tmp_path: Path) -> None:
    model = family.model(torch.float32).requires_grad_(True)
    (example,) = rows(29, seed=1)
    masters = Masters(model, torch.float32)
    masters.values.mul_(1.01)
    expected = alone(model, example)
    save(Trained(model, None, 0, ""), masters, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert error(alone(loaded, example), expected) < 1e-5


def test_the_layers_of_gpt_2_take_the_fused_product_and_are_saved_as_what_they_are(tmp_path: Path) -> None:
    model = family_named("gpt-2").model(torch.float32)
    trained = with_lora(model)
    assert lora.speed_up(model) == 8
    save(trained, Masters(trained.root, torch.float32), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is True


def test_documents_on_either_side_of_a_longropes_border_never_share_a_batch() -> None:
    config = family_named("phi-3-long").configuration()
    assert rope.borders(config, 17) == (16,)
    assert rope.borders(config, 16) == ()
    assert rope.borders(family_named("llama-3").configuration(), 1000) == ()
    assert rope.borders(family_named("gemma-3").configuration(), 1000) == ()
    for documents in (True, False):
        cut = [each.lengths for each in Batches(documents, WHOLE, 0, CPU, (16,)).of(rows(13, 17, 16, 29, 2))]
        assert [sorted(each) for each in cut] == [[2, 13, 16], [17, 29]]


def test_a_job_with_a_longrope_has_the_same_losses_for_any_token_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, data = tiny_base(tmp_path), chats(tmp_path / "chats.jsonl", 8)
    model = family_named("phi-3-long").model(torch.float32, vocab_size=4096, original_max_position_embeddings=20)
    model.save_pretrained(base)
    losses = []
    for budget in (4096, 16):
        monkeypatch.setattr(plan, "_CPU_TOKENS", budget)
        recorder = Recorder()
        sft.train(task(tmp_path / str(budget), base, data, batch_size=8, max_steps=2), recorder, NoControl())
        losses.append([each.loss for each in recorder.steps()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("shaping", [Shaping(cap=2.0), Shaping(0.3), Shaping(0.5, 1.5)])
def test_shaped_logits_have_the_gradients_of_the_whole(monkeypatch: pytest.MonkeyPatch, shaping: Shaping) -> None:
    monkeypatch.setattr(loss_module, "_CHUNK_ELEMENTS", {"cpu": 40})
    monkeypatch.setattr(loss_module, "_MIN_CHUNK_ROWS", 3)
    torch.manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((10, 6), (13, 6), (13,))
    )
    targets = torch.randint(0, 13, (10,))
    logits = F.linear(hidden, weight, bias) * shaping.scale
    if shaping.cap is not None:
        logits = torch.tanh(logits / shaping.cap) * shaping.cap
    expected = F.cross_entropy(logits, targets, reduction="sum") * 0.3
    found = scored_cross_entropy(hidden, weight, bias, targets, shaping) * 0.3
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    trained = (hidden, weight, bias)
    for ours, theirs in zip(torch.autograd.grad(found, trained), torch.autograd.grad(expected, trained), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    total, correct = score(hidden, weight, bias, targets, shaping)
    assert float(total) == pytest.approx(float(expected.detach()) / 0.3, rel=1e-12)
    assert int(correct) == int((logits.argmax(-1) == targets).sum())


def test_a_cap_that_rounding_would_hide_is_still_part_of_the_loss() -> None:
    capped = family_named("gemma-2").model(torch.bfloat16, final_logit_softcapping=200.0)
    forward, _ = choose_forward(capped, "auto", max(LENGTHS))
    assert forward.fused_head
    assert shaping_of(capped) == Shaping(cap=200.0)


def test_a_head_that_does_what_no_configuration_tells_goes_through_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    model = family_named("granite").model()
    root = with_lora(model).root
    expected_loss, expected = plain_gradients(root, rows(*LENGTHS))
    monkeypatch.setattr("luthier_trainer.probe.shaping_of", lambda model: Shaping())
    forward, notes = choose_forward(model, "auto", max(LENGTHS))
    assert not forward.fused_head
    assert "its head is not a plain linear layer" in notes[0]
    assert accumulate(forward, CUT) == pytest.approx(expected_loss, rel=1e-10)
    assert largest_error(gradients(root), expected) < 1e-10


def test_the_routers_auxiliary_loss_is_left_out_and_said_to_be() -> None:
    family = family_named("mixtral")
    model = family.model(output_router_logits=True)
    root = with_lora(model).root
    expected_loss, expected = plain_gradients(root, rows(*LENGTHS))
    forward, notes = choose_forward(model, "auto", max(LENGTHS))
    assert "auxiliary loss is left out" in notes[0]
    assert accumulate(forward, CUT) == pytest.approx(expected_loss, rel=1e-10)
    assert largest_error(gradients(root), expected) < 1e-10


def test_experts_with_dropout_are_refused_with_advice() -> None:
    with pytest.raises(TrainingError) as caught:
        with_lora(family_named("mixtral").model(), dropout=0.1)
    assert caught.value.reason == "ADAPTER_UNSUPPORTED"
    assert "lora_dropout" in caught.value.message
    assert "dropout to 0" in caught.value.hint


LORA = LoraSettings(4, 8.0, 0.0, ("all-linear",), ())


def family_named(name: str) -> Family:
    """The family."""
    return next(each for each in FAMILIES if each.name == name)


def save(trained: Trained, masters: Masters, folder: Path) -> None:
    """Writes the weights as a job does."""
    write_weights(trained, masters, AutoTokenizer.from_pretrained(inspect.BUILTIN / "tiny"), folder)
