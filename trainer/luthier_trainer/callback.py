"""A Reporter as a transformers TrainerCallback: transformers' and TRL's trainers report through the same spool."""

import math
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from luthier.trainer.v1 import task_pb2
from luthier.v1 import event_pb2
from luthier_trainer import durable
from luthier_trainer.control import Control
from luthier_trainer.report import Reporter, checkpoint_directory, checkpoint_saved

_STEP_FIELDS = {"loss", "grad_norm", "learning_rate", "epoch", "num_tokens", "num_input_tokens_seen"}


class ReporterCallback(TrainerCallback):
    """Reports the plan, each logged step, evaluations and checkpoints, and makes the trainer obey `control`.

    Losses are the trainer's own: the mean of what it logs. A checkpoint is moved from `checkpoint-N` in the trainer's
    output directory to Luthier's name in `checkpoints_dir`, on the same file system; so `load_best_model_at_end` is
    refused with ValueError, and `save_total_limit` finds nothing to delete. Tokens are counted where the trainer counts
    them (TRL does; transformers does with `include_num_input_tokens_seen`), else 0. When asked to leave it saves and
    stops; the caller reads `stopped_at`.
    """

    def __init__(
        self,
        reporter: Reporter,
        control: Control,
        job_id: str,
        attempt: int,
        checkpoints_dir: Path,
        computed_tokens: int,
    ) -> None:
        self._reporter = reporter
        self._control = control
        self._job_id = job_id
        self._attempt = attempt
        self._checkpoints_dir = checkpoints_dir
        self._computed_before = computed_tokens
        self._tokens_at_start = 0
        self._last = (0.0, 0)
        self.stopped_at: int | None = None
        self.checkpoint = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **inside: Any
    ) -> None:
        if args.load_best_model_at_end:
            raise ValueError("load_best_model_at_end looks for checkpoints by transformers' names, which are changed")
        model: torch.nn.Module = inside["model"]
        weights = list(model.parameters())
        trained = sum(weight.numel() for weight in weights if weight.requires_grad)
        in_base = sum(weight.numel() for name, weight in model.named_parameters() if "lora_" not in name)
        self._reporter.report(
            event_pb2.PlanResolved(
                device=str(args.device),
                dtype=str(weights[0].dtype).removeprefix("torch."),
                attention=str(getattr(getattr(model, "config", None), "_attn_implementation", "")),
                total_steps=state.max_steps,
                training_rows=_rows(inside["train_dataloader"]),
                base_parameters=in_base,
                trained_parameters=trained,
                threads=torch.get_num_threads(),
            )
        )
        self._tokens_at_start = state.num_input_tokens_seen
        self._last = (time.monotonic(), self._tokens_at_start)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **inside: Any) -> None:
        if self._control.requested() != task_pb2.CONTROL_ACTION_UNSPECIFIED:
            self.stopped_at = state.global_step
            control.should_save = True
            control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **inside: Any,
    ) -> None:
        if logs is None or "loss" not in logs:  # evaluations and the closing summary are logged too
            return
        tokens = int(logs.get("num_tokens", state.num_input_tokens_seen))
        then, tokens_then = self._last
        now = time.monotonic()
        self._last = (now, tokens)
        self._reporter.report(
            event_pb2.StepCompleted(
                step=state.global_step,
                total_steps=state.max_steps,
                epoch=state.epoch or 0.0,
                loss=logs["loss"],
                learning_rate=logs.get("learning_rate", 0.0),
                grad_norm=logs.get("grad_norm", 0.0),
                tokens_per_second=max(tokens - tokens_then, 0) / max(now - then, 1e-9),
                trained_tokens=tokens,
                computed_tokens=self._computed_before + max(tokens - self._tokens_at_start, 0),
                metrics={
                    name: float(value)
                    for name, value in logs.items()
                    if name not in _STEP_FIELDS and isinstance(value, int | float)
                },
            )
        )

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **inside: Any,
    ) -> None:
        if metrics is None or "eval_loss" not in metrics:
            return
        loss = metrics["eval_loss"]
        self._reporter.report(
            event_pb2.EvaluationCompleted(
                step=state.global_step,
                epoch=state.epoch or 0.0,
                loss=loss,
                perplexity=math.exp(loss) if loss < 700 else math.inf,
                token_accuracy=metrics.get("eval_mean_token_accuracy", 0.0),
                rows=_rows(inside["eval_dataloader"]),
            )
        )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **inside: Any) -> None:
        name = checkpoint_directory(state.global_step, self._attempt)
        directory = self._checkpoints_dir / name
        made = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        with durable.new_directory(directory) as aside:
            for each in made.iterdir():
                each.rename(aside / each.name)
        made.rmdir()
        size = durable.size(directory)
        saved = checkpoint_saved(self._job_id, state.global_step, self._attempt, size)
        self._reporter.report(saved, durable=True)
        self.checkpoint = name


def _rows(loader: Any) -> int:
    """Rows behind a data loader; 0 when there is none, or it cannot tell."""
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError):
        return 0
