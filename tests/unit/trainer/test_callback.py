"""The callback: a real transformers Trainer reports through a real spool."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from unit.trainer.attempts import kinds, read_spool

from luthier.trainer.v1 import task_pb2
from luthier.trainer.v1.task_pb2 import ControlAction
from luthier_trainer.callback import ReporterCallback
from luthier_trainer.control import Control, NoControl
from luthier_trainer.spool import SpoolReporter


class _PauseAfter:
    """Asks for a pause from the given look on."""

    def __init__(self, looks: int) -> None:
        self._left = looks

    def requested(self) -> ControlAction.ValueType:
        self._left -= 1
        return task_pb2.CONTROL_ACTION_UNSPECIFIED if self._left > 0 else task_pb2.CONTROL_ACTION_PAUSE


def _rows(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 64, (12,), generator=generator) for _ in range(count)]
    return [{"input_ids": row, "labels": row} for row in rows]


def _trainer(folder: Path, control: Control, **arguments: Any) -> tuple[Trainer, ReporterCallback, SpoolReporter]:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **sizes))
    reporter = SpoolReporter(folder, "")
    callback = ReporterCallback(reporter, control, "job_1", 2, folder / "checkpoints", computed_tokens=1000)
    settings = TrainingArguments(
        output_dir=str(folder / "transformers"),
        max_steps=6,
        per_device_train_batch_size=2,
        logging_steps=1,
        learning_rate=1e-2,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        include_num_input_tokens_seen="all",
        **arguments,
    )
    trainer = Trainer(model, settings, train_dataset=_rows(8), eval_dataset=_rows(4), callbacks=[callback])
    return trainer, callback, reporter


def test_a_transformers_trainer_reports_through_the_spool(tmp_path: Path) -> None:
    trainer, callback, reporter = _trainer(
        tmp_path, NoControl(), save_strategy="steps", save_steps=3, eval_strategy="steps", eval_steps=3
    )
    trainer.train()
    reporter.close()
    assert callback.stopped_at is None

    reports = read_spool(tmp_path)
    steps, ended = ["step_completed"] * 3, ["evaluation_completed", "checkpoint_saved"]
    assert kinds(reports) == ["plan_resolved", *steps, *ended, *steps, *ended]
    assert [report.sequence for report in reports] == list(range(1, 12))

    plan = reports[0].plan_resolved
    assert (plan.device, plan.dtype, plan.total_steps) == ("cpu", "float32", 6)
    assert plan.training_rows == 8
    assert isinstance(trainer.model, torch.nn.Module)
    assert plan.trained_parameters == plan.base_parameters
    assert plan.trained_parameters == sum(int(weight.numel()) for weight in trainer.model.parameters())

    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    made = [report.step_completed for report in reports if report.HasField("step_completed")]
    assert [step.step for step in made] == [1, 2, 3, 4, 5, 6]
    assert [step.loss for step in made] == [entry["loss"] for entry in logged]
    assert [step.grad_norm for step in made] == [entry["grad_norm"] for entry in logged]
    assert [step.learning_rate for step in made] == [entry["learning_rate"] for entry in logged]
    assert [step.trained_tokens for step in made] == [24 * step for step in range(1, 7)]
    assert made[-1].computed_tokens == 1000 + 6 * 24
    assert all(step.tokens_per_second > 0 for step in made)

    evaluated = [report.evaluation_completed for report in reports if report.HasField("evaluation_completed")]
    eval_losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [(each.step, each.loss, each.rows) for each in evaluated] == [(3, eval_losses[0], 4), (6, eval_losses[1], 4)]

    saved = [report.checkpoint_saved for report in reports if report.HasField("checkpoint_saved")]
    assert [(each.directory, each.name) for each in saved] == [
        ("000003-a2", "job_1:step-3"),
        ("000006-a2", "job_1:step-6"),
    ]
    for each in saved:
        files = list((tmp_path / "checkpoints" / each.directory).iterdir())
        assert {"model.safetensors", "optimizer.pt", "trainer_state.json"} <= {file.name for file in files}
        assert each.size_bytes == sum(file.stat().st_size for file in files)


def test_a_transformers_trainer_that_is_paused_saves_and_goes_on_from_there(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    paused = tmp_path / "paused"
    resumed = tmp_path / "resumed"
    for folder in (whole, paused, resumed):
        folder.mkdir()
    trainer, _, reporter = _trainer(whole, NoControl(), save_strategy="no")
    trainer.train()
    reporter.close()
    expected = [report.step_completed.loss for report in read_spool(whole) if report.HasField("step_completed")]

    trainer, callback, reporter = _trainer(paused, _PauseAfter(4), save_strategy="no")
    trainer.train()
    reporter.close()
    assert callback.stopped_at == 4
    assert callback.checkpoint == "000004-a2"
    assert kinds(read_spool(paused)) == ["plan_resolved", *["step_completed"] * 4, "checkpoint_saved"]

    trainer, callback, reporter = _trainer(resumed, NoControl(), save_strategy="no")
    trainer.train(resume_from_checkpoint=str(paused / "checkpoints/000004-a2"))
    reporter.close()
    steps = [report.step_completed for report in read_spool(resumed) if report.HasField("step_completed")]
    assert [step.step for step in steps] == [5, 6]
    assert [step.loss for step in steps] == pytest.approx(expected[4:], rel=1e-6)
    assert steps[-1].trained_tokens == 6 * 24
    assert steps[-1].computed_tokens == 1000 + 2 * 24


def test_loading_the_best_model_at_the_end_is_refused(tmp_path: Path) -> None:
    trainer, _, reporter = _trainer(
        tmp_path, NoControl(), load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps", save_steps=500
    )
    with pytest.raises(ValueError, match="load_best_model_at_end"):
        trainer.train()
    reporter.close()
