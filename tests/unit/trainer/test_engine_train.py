"""The loop: what it reports, when it evaluates, how it ends."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fidelity.jobs import Recorder, StopAfter, chats, task, tiny_base

from luthier.trainer.v1 import report_pb2, task_pb2
from luthier.trainer.v1.task_pb2 import ControlAction
from luthier.v1 import event_pb2, job_pb2
from luthier_trainer import fine_tune, plan, sft
from luthier_trainer.control import NoControl
from luthier_trainer.errors import TrainingError
from luthier_trainer.forward import Forward
from luthier_trainer.throughput import Throughput


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_base(tmp_path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return chats(tmp_path / "chats.jsonl")


def test_a_job_reports_its_plan_first_and_then_every_step(tmp_path: Path, base: Path, data: Path) -> None:
    recorder = Recorder()
    end = sft.train(task(tmp_path, base, data, epochs=2.5), recorder, NoControl())
    (resolved,) = [each for each in recorder.reports if isinstance(each, event_pb2.PlanResolved)]
    assert (resolved.total_steps, resolved.training_rows, resolved.threads) == (8, 10, 1)
    assert (resolved.device, resolved.dtype, resolved.attention) == ("cpu", "float32", "documents-sdpa")
    assert resolved.trained_parameters == 2 * 4 * (2 * 64 + 2 * 48 + 3 * 80)
    steps = list(recorder.steps())
    assert [each.step for each in steps] == list(range(1, 9))
    assert recorder.reports.index(resolved) < recorder.reports.index(steps[0])
    assert steps[3].epoch == pytest.approx(4 / 3)
    assert steps[0].learning_rate == 0.0
    assert steps[-1].loss < steps[0].loss
    assert all(each.tokens_per_second > 0 and each.grad_norm > 0 for each in steps)
    assert steps[-1].trained_tokens == steps[-1].computed_tokens > 0
    assert isinstance(end, report_pb2.Finished)
    assert end.step == 8
    assert end.metrics["train_loss"] == pytest.approx(sum(each.loss for each in steps) / 8)


def test_the_licence_of_the_base_is_reported_and_noted_beside_the_model(tmp_path: Path, base: Path, data: Path) -> None:
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    end = sft.train(task(tmp_path, base, data, max_steps=1), Recorder(), NoControl())
    assert isinstance(end, report_pb2.Finished)
    assert (end.base_licence, end.base_revision) == ("mit", "")
    assert json.loads((tmp_path / "model" / "luthier.json").read_text())["base_model"]["licence"] == "mit"


def test_a_job_leaves_alone_what_another_one_is_writing_beside_its_model(
    tmp_path: Path, base: Path, data: Path
) -> None:
    elsewhere = tmp_path / ".tmp-model_of_another_job" / "adapter_model.safetensors"
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(b"half")
    sft.train(task(tmp_path, base, data, max_steps=1), Recorder(), NoControl())
    assert elsewhere.read_bytes() == b"half"


def test_max_steps_ends_training_before_the_epochs_do(tmp_path: Path, base: Path, data: Path) -> None:
    recorder = Recorder()
    sft.train(task(tmp_path, base, data, epochs=2.0, max_steps=4), recorder, NoControl())
    assert len(list(recorder.steps())) == 4


def test_log_every_thins_the_steps_but_keeps_the_first_and_the_last(tmp_path: Path, base: Path, data: Path) -> None:
    recorder = Recorder()
    sft.train(task(tmp_path, base, data, max_steps=8, log_every=3), recorder, NoControl())
    assert [each.step for each in recorder.steps()] == [1, 3, 6, 8]


def test_a_loss_that_is_not_finite_ends_the_job_with_the_step(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TrainingError) as caught:
        sft.train(
            task(
                tmp_path,
                base,
                data,
                max_steps=30,
                learning_rate=10.0,
                full=True,
                max_grad_norm=0.0,
                warmup_ratio=0.0,
                adam_epsilon=1e-30,
            ),
            Recorder(),
            _Poison(monkeypatch, after=3),
        )
    assert caught.value.reason == "LOSS_NOT_FINITE"
    assert "step 4" in caught.value.message
    assert not (tmp_path / "model").exists()


class _Poison:
    """A control that never asks for anything, and makes the loss infinite after so many steps of one micro-batch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
        own, calls = Forward.loss_sum, [0]

        def loss_sum(self: Forward, batch: object) -> torch.Tensor:
            calls[0] += 1
            return own(self, batch) * (math.inf if calls[0] > after else 1.0)  # type: ignore[arg-type]

        monkeypatch.setattr(Forward, "loss_sum", loss_sum)

    def requested(self) -> ControlAction.ValueType:
        return task_pb2.CONTROL_ACTION_UNSPECIFIED


def test_running_out_of_memory_halves_the_micro_batches_and_changes_nothing(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, squeezed = Recorder(), Recorder()
    sft.train(task(tmp_path / "a", base, data, max_steps=3), straight, NoControl())
    own = Forward.loss_sum

    def loss_sum(self: Forward, batch: object) -> torch.Tensor:
        if len(batch.lengths) > 2:  # type: ignore[attr-defined]
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(self, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(plan, "_CPU_TOKENS", 256)
    monkeypatch.setattr(sft, "_SMALLEST_BUDGET", 16)
    monkeypatch.setattr(Forward, "loss_sum", loss_sum)
    sft.train(task(tmp_path / "b", base, data, max_steps=3), squeezed, NoControl())
    assert any("32 tokens" in each.message for each in squeezed.reports if isinstance(each, event_pb2.LogEmitted))
    for one, other in zip(straight.steps(), squeezed.steps(), strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.trained_tokens == other.trained_tokens


def test_held_out_rows_are_evaluated_at_step_0_each_epoch_and_the_end(tmp_path: Path, base: Path, data: Path) -> None:
    request = task(tmp_path, base, data, epochs=2.4)
    request.spec.fine_tune.validation_fraction = 0.2
    recorder = Recorder()
    end = sft.train(request, recorder, NoControl())
    evaluations = list(recorder.evaluations())
    assert [each.step for each in evaluations] == [0, 2, 4, 5]
    assert all(each.rows == 2 for each in evaluations)
    assert all(each.perplexity == pytest.approx(math.exp(each.loss)) for each in evaluations)
    assert isinstance(end, report_pb2.Finished)
    assert end.metrics["eval_loss"] == evaluations[-1].loss
    assert end.metrics["base_eval_loss"] == evaluations[0].loss


def test_sample_prompts_are_answered_before_and_after_and_training_goes_on_the_same(
    tmp_path: Path, base: Path, data: Path
) -> None:
    plain, sampled = Recorder(), Recorder()
    sft.train(task(tmp_path / "a", base, data, max_steps=3, dropout=0.2), plain, NoControl())
    request = task(tmp_path / "b", base, data, max_steps=3, dropout=0.2)
    request.spec.fine_tune.evaluation.sample_prompts.extend([f"Count {number}." for number in range(70)])
    request.spec.fine_tune.evaluation.sample_max_tokens = 3
    sft.train(request, sampled, NoControl())
    found = [each for each in sampled.reports if isinstance(each, event_pb2.SamplesGenerated)]
    assert [each.step for each in found] == [0, 3]
    assert [each.prompt for each in found[0].samples] == [f"Count {number}." for number in range(70)]
    assert all("<|" not in each.completion for each in found[0].samples)
    assert [each.loss for each in plain.steps()] == [each.loss for each in sampled.steps()]


def test_a_model_that_learnt_an_answer_gives_it_and_stops(tmp_path: Path, base: Path) -> None:
    data = tmp_path / "one.jsonl"
    turns = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "Yes, indeed."}]
    data.write_text((json.dumps({"messages": turns}) + "\n") * 8)
    request = task(tmp_path, base, data, max_steps=60, full=True, learning_rate=1e-2, batch_size=2)
    request.spec.fine_tune.evaluation.sample_prompts.extend(["Say it.", "Say"])
    request.spec.fine_tune.checkpoints.every_steps = 1000
    recorder = Recorder()
    sft.train(request, recorder, NoControl())
    last = [each for each in recorder.reports if isinstance(each, event_pb2.SamplesGenerated)][-1]
    assert last.samples[0].completion == "Yes, indeed."


def test_a_stop_before_the_first_step_leaves_no_checkpoint(tmp_path: Path, base: Path, data: Path) -> None:
    recorder = Recorder()
    end = sft.train(task(tmp_path, base, data, max_steps=3), recorder, StopAfter(recorder, 0))
    assert end == report_pb2.Stopped(step=0, checkpoint="")
    assert not (tmp_path / "model").exists()


def test_a_name_that_matches_no_module_is_refused_with_the_nearest(tmp_path: Path, base: Path, data: Path) -> None:
    with pytest.raises(TrainingError) as caught:
        sft.train(task(tmp_path, base, data, max_steps=1, modules_to_save=("embed_token",)), Recorder(), NoControl())
    assert caught.value.reason == "MODULE_NOT_FOUND"
    assert "embed_tokens" in caught.value.hint


def test_a_base_that_is_not_there_is_told_so(tmp_path: Path, base: Path, data: Path) -> None:
    with pytest.raises(TrainingError) as caught:
        sft.train(task(tmp_path, tmp_path / "nowhere", data, max_steps=1), Recorder(), NoControl())
    assert caught.value.reason == "MODEL_NOT_FOUND"


def test_a_spec_that_is_not_resolved_is_refused(tmp_path: Path, base: Path, data: Path) -> None:
    request = task(tmp_path, base, data, max_steps=1)
    request.spec.fine_tune.hyperparameters.ClearField("learning_rate")
    with pytest.raises(TrainingError, match="learning_rate") as caught:
        sft.train(request, Recorder(), NoControl())
    assert caught.value.reason == "SPEC_INCOMPLETE"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_chosen_attention_is_used_and_gives_the_same_losses(
    tmp_path: Path, base: Path, data: Path, attention: str
) -> None:
    documents, padded = Recorder(), Recorder()
    sft.train(task(tmp_path / "a", base, data, max_steps=3), documents, NoControl())
    sft.train(task(tmp_path / "b", base, data, max_steps=3, attn_implementation=attention), padded, NoControl())
    (resolved,) = [each for each in padded.reports if isinstance(each, event_pb2.PlanResolved)]
    assert resolved.attention == f"padded-{attention}"
    for one, other in zip(documents.steps(), padded.steps(), strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)


def test_bfloat16_follows_float32(tmp_path: Path, base: Path, data: Path) -> None:
    exact, short = Recorder(), Recorder()
    sft.train(task(tmp_path / "a", base, data, max_steps=6), exact, NoControl())
    sft.train(task(tmp_path / "b", base, data, max_steps=6, dtype=job_pb2.DTYPE_BFLOAT16), short, NoControl())
    for one, other in zip(exact.steps(), short.steps(), strict=True):
        assert one.loss == pytest.approx(other.loss, rel=2e-2)


def test_fine_tune_in_one_line_gives_a_model(tmp_path: Path, base: Path, data: Path) -> None:
    recorder = Recorder()
    made = fine_tune(str(base), data, tmp_path / "out", max_steps=2, validation=data, reporter=recorder, batch_size=4)
    assert made.steps == 2
    assert made.metrics["eval_loss"] > 0
    assert (made.directory / "adapter_model.safetensors").is_file()
    assert not [each for each in tmp_path.iterdir() if each.name.startswith(".")]
    with pytest.raises(FileExistsError):
        fine_tune(str(base), data, tmp_path / "out", max_steps=2)


def test_importing_the_trainer_loads_no_torch() -> None:
    code = "import luthier_trainer, sys; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_throughput_counts_the_last_seconds_of_steps_alone() -> None:
    now = [0.0]
    throughput = Throughput(window=10.0, clock=lambda: now[0])
    assert throughput.tokens_per_second == 0.0
    for seconds, tokens in ((100.0, 1), (6.0, 600), (6.0, 1200)):
        throughput.start()
        now[0] += seconds
        throughput.stop(tokens)
        now[0] += 1000.0  # an evaluation
    assert throughput.tokens_per_second == pytest.approx(150.0)


def test_a_step_of_rows_that_were_cut_before_their_answer_is_made_without_a_loss_or_an_update(
    tmp_path: Path, base: Path, data: Path
) -> None:
    turns = [{"role": "user", "content": "Count. " * 60}, {"role": "assistant", "content": "one"}]
    with open(data, "a", encoding="utf-8") as file:
        file.write(json.dumps({"messages": turns}) + "\n")
    recorder = Recorder()
    end = sft.train(task(tmp_path, base, data, epochs=1.0, batch_size=1, max_length=64), recorder, NoControl())
    assert isinstance(end, report_pb2.Finished)
    assert (end.step, end.metrics["empty_steps"]) == (11, 1)
    losses = [each.loss for each in recorder.steps()]
    assert len(losses) == 10
    assert all(loss > 0 for loss in losses)
    said = [each.message for each in recorder.reports if isinstance(each, event_pb2.LogEmitted)]
    assert sum("nothing of row 11 is trained" in each for each in said) == 1
