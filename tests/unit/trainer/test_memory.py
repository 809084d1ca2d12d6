"""Memory: what training takes is foretold, and what follows from it."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from fidelity.jobs import Recorder, StopAfter, chats, task, tiny_base
from fidelity.tiny import gradients, largest_error, llama, rows, with_lora
from safetensors.torch import load_file

from luthier.trainer.v1.report_pb2 import Finished, Stopped
from luthier.trainer.v1.task_pb2 import BaseModelSource
from luthier.v1 import event_pb2
from luthier_trainer import lora, memory, sft
from luthier_trainer.config import read_settings
from luthier_trainer.control import NoControl
from luthier_trainer.errors import TrainingError
from luthier_trainer.flatten import flattened
from luthier_trainer.forward import DOCUMENTS, Forward, set_attention
from luthier_trainer.memory import held, planning
from luthier_trainer.memory.activations import checkpoint_layers
from luthier_trainer.memory.terms import Terms, frontier
from luthier_trainer.plan import Compute, most_tokens

CPU = Compute(torch.device("cpu"), torch.float32, 1, ())


def plan_of(recorder: Recorder) -> event_pb2.PlanResolved:
    return next(each for each in recorder.reports if isinstance(each, event_pb2.PlanResolved))


def run(folder: Path, limit: int = 0, **others: Any) -> tuple[event_pb2.PlanResolved, Recorder, Finished | Stopped]:
    """A job in `folder` with so much memory; 0 for what there is."""
    folder.mkdir(exist_ok=True)
    base = folder.parent / "base"
    if not base.exists():
        tiny_base(folder.parent, width=64)
    job = task(folder, base, chats(folder / "chats.jsonl", rows=40), **{"max_steps": 4, "batch_size": 32} | others)
    job.memory_limit_bytes = limit
    recorder = Recorder()
    end = sft.train(job, recorder, NoControl())
    return plan_of(recorder), recorder, end


def tensors(folder: Path) -> dict[str, bytes]:
    return {name: each.numpy().tobytes() for name, each in load_file(folder / "adapter_model.safetensors").items()}


@pytest.mark.parametrize("documents", [True, False], ids=["documents", "padded"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_model_that_computes_its_layers_twice_has_the_same_loss_and_gradients_bit_by_bit(
    dropout: float, documents: bool
) -> None:
    trained = with_lora(llama(torch.float32), dropout=dropout)
    model = trained.causal_lm
    lora.speed_up(model)
    if documents:
        set_attention(model, DOCUMENTS)
    model.train()
    forward = Forward(model, documents, fused_head=True)
    batch = flattened(rows(9, 17, 30)) if documents else flattened(rows(30))
    if not documents:
        batch = dataclasses.replace(batch, attention_mask=torch.ones_like(batch.input_ids))
    found = []
    for twice in (False, True):
        checkpoint_layers(model, twice)
        torch.manual_seed(3)
        loss = forward.loss_sum(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        found.append((float(loss.detach()), gradients(model)))
    checkpoint_layers(model, False)
    assert found[0][0] == found[1][0]
    assert largest_error(found[1][1], found[0][1]) == 0.0


def test_a_job_that_computes_layers_twice_learns_the_same_also_when_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain: dict[str, Any] = {"dropout": 0.3, "max_steps": 6, "batch_size": 4}
    run(tmp_path / "plain", **plain)
    monkeypatch.setattr(planning, "_fitted", lambda found, most, ceiling: planning.MemoryPlan(most, True))
    plan, _, _ = run(tmp_path / "twice", **plain)
    assert plan.activation_checkpointing
    assert tensors(tmp_path / "twice" / "model") == tensors(tmp_path / "plain" / "model")

    folder = tmp_path / "stopped"
    folder.mkdir()
    job = task(folder, tmp_path / "base", chats(folder / "chats.jsonl", rows=40), **plain)
    recorder = Recorder()
    stopped = sft.train(job, recorder, StopAfter(recorder, 3))
    assert isinstance(stopped, Stopped)
    monkeypatch.undo()
    job.resume_from = str(folder / "checkpoints" / stopped.checkpoint)
    job.attempt = 2
    again = Recorder()
    sft.train(job, again, NoControl())
    assert plan_of(again).activation_checkpointing
    assert tensors(folder / "model") == tensors(tmp_path / "plain" / "model")


def test_a_job_with_room_reports_what_it_will_take_and_what_there_is(tmp_path: Path) -> None:
    roomy, _, end = run(tmp_path / "roomy")
    assert not roomy.activation_checkpointing
    assert roomy.micro_batch_tokens == most_tokens(CPU)
    assert roomy.predicted_memory_bytes > 0
    assert roomy.memory_limit_bytes > roomy.predicted_memory_bytes
    assert isinstance(end, Finished)
    assert end.metrics["peak_memory_bytes"] > 0


def test_a_job_that_cannot_fit_is_refused_before_its_first_step_with_numbers(tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as refused:
        run(tmp_path / "job", limit=1 << 20)
    assert refused.value.reason == "OUT_OF_MEMORY"
    assert "1 MB" in refused.value.message
    assert "max_length" in refused.value.hint


def test_less_memory_means_smaller_micro_batches_and_a_note_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held, "CODE", 0)  # far more than so small a model takes
    roomy, _, _ = run(tmp_path / "a")
    tight, recorder, _ = run(tmp_path / "b", limit=roomy.predicted_memory_bytes * 3 // 4)
    assert tight.micro_batch_tokens < roomy.micro_batch_tokens
    assert tight.predicted_memory_bytes <= tight.memory_limit_bytes == roomy.predicted_memory_bytes * 3 // 4
    assert any("memory has no room for more" in each for each in tight.notes)
    assert tight.calibrated_memory_bytes > 0
    assert len(list(recorder.steps())) == 4


def test_what_a_frontier_leaves_out_is_never_the_largest() -> None:
    points = [Terms(always=5.0), Terms(token=1.0), Terms(always=4.0, token=0.5), Terms(always=3.0, token=0.4)]
    kept = frontier(points)
    assert set(kept) == set(points[:3])
    for tokens in (1, 5, 100):
        assert max(each.bytes(tokens, 0, 1, 1) for each in kept) == max(each.bytes(tokens, 0, 1, 1) for each in points)


def test_a_model_on_the_meta_device_needs_what_the_loaded_one_needs(tmp_path: Path) -> None:
    job = task(tmp_path, tiny_base(tmp_path), tmp_path / "none", max_steps=1)
    settings = read_settings(job)
    trained = memory.on_meta(job.base_model, settings, CPU)
    assert all(each.is_meta for each in trained.root.parameters())
    once, twice = (memory.need(trained, settings, CPU, checkpointing=each) for each in (False, True))
    assert twice.per_token < once.per_token
    assert once.fixed == twice.fixed > 4 * trained.base_parameters
    plan, _, _ = run(tmp_path / "job", max_steps=1, batch_size=4)
    assert 0 < plan.predicted_memory_bytes <= once.peak(most_tokens(CPU), most_tokens(CPU), 256)


def test_a_trace_is_made_once_for_models_of_one_shape_and_whatever_does_not_read_is_traced_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = task(tmp_path, tiny_base(tmp_path), tmp_path / "none", max_steps=1)
    traced: list[bool] = []
    needs = importlib.import_module("luthier_trainer.memory.need")  # the package gives the function that name
    trace = needs._trace

    def counted(*given: Any) -> Any:
        traced.append(True)
        return trace(*given)

    monkeypatch.setattr(needs, "_trace", counted)

    def found(*, rank: int = 8, documents: bool = True) -> memory.Need:
        job.spec.fine_tune.lora.rank = rank
        settings = read_settings(job)
        trained = memory.on_meta(job.base_model, settings, CPU)
        return memory.need(
            trained, settings, CPU, checkpointing=False, documents=documents, fused_head=True, cache_dir=tmp_path / "c"
        )

    first = found()
    assert (found(), len(traced)) == (first, 1)
    assert found(rank=9) != first
    assert found(documents=False) != first
    assert len(traced) == 3
    for entry in (tmp_path / "c" / "memory").iterdir():
        entry.write_text("[[1, 2")
    assert (found(), len(traced)) == (first, 4)
    assert (found(), len(traced)) == (first, 4)


def test_the_largest_budget_that_fits_is_taken() -> None:
    def need_of(checkpointing: bool) -> memory.Need:
        cost = 10.0 if checkpointing else 100.0
        return memory.Need(1000, 0, 0, (Terms(token=cost),), 1, checkpointing)

    assert memory.fit(need_of, 100, 0, 4096) == memory.Fit(4096, False, 410_600, 0)
    tight = memory.fit(need_of, 100, 101_000, 4096)
    assert (tight.budget_tokens, tight.checkpointing, tight.fits) == (960, False, True)
    twice = memory.fit(need_of, 500, 50_000, 4096)
    assert twice.checkpointing
    assert twice.fits
    refused = memory.fit(need_of, 500, 2_000, 4096)
    assert not refused.fits
    assert refused.predicted_bytes == 6_000


def test_what_is_foretold_does_not_depend_on_threads(tmp_path: Path) -> None:
    """Attention of a wide model is shared out to threads, which a trace would not see."""
    base = tiny_base(tmp_path, width=512)
    settings = read_settings(task(tmp_path, base, chats(tmp_path / "chats.jsonl", rows=4), max_steps=2))
    trained = memory.on_meta(BaseModelSource(location=str(base)), settings, CPU)
    threads = torch.get_num_threads()
    peaks = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            peaks.append(memory.need(trained, settings, CPU, checkpointing=False).peak(2048, 512, 400))
    finally:
        torch.set_num_threads(threads)
    assert peaks[0] == peaks[1] > 0
