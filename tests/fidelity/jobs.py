"""Whole jobs on a base model that trains in a blink."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.trainer.v1 import task_pb2
from luthier.trainer.v1.task_pb2 import BaseModelSource, ControlAction, DatasetSource, TrainerTask
from luthier.v1 import event_pb2, job_pb2
from luthier_trainer import inspect
from luthier_trainer.report import Payload


def tiny_base(folder: Path, *, tied: bool = False, width: int = 32) -> Path:
    """A random model of 150,000 weights (twice as many with a width of 64) with the tokenizer and template of
    `builtin/tiny`."""
    base = folder / "base"
    base.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(inspect.BUILTIN / "tiny" / name, base / name)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=48 if width == 32 else 2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(base)
    return base


def chats(path: Path, rows: int = 10) -> Path:
    """Short chats of unequal length."""
    with open(path, "w", encoding="utf-8") as file:
        for number in range(rows):
            answer = " ".join(["one", "two", "three", "four"][each % 4] for each in range(number % 5 + 1))
            turns = [{"role": "user", "content": f"Count {number}."}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def task(
    folder: Path,
    base: Path,
    data: Path,
    *,
    attempt: int = 1,
    resume_from: Path | None = None,
    full: bool = False,
    dropout: float = 0.0,
    modules_to_save: tuple[str, ...] = (),
    evaluation: job_pb2.Evaluation | None = None,
    lora: job_pb2.Lora | None = None,
    last_layers: int = 0,
    **numbers: Any,
) -> TrainerTask:
    """A task as the server makes it, with every default filled in; all that it writes is below `folder`. What `lora`
    sets goes over the adapter's other fields."""
    defaults: dict[str, Any] = {
        "batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.01,
        "lr_scheduler": job_pb2.LR_SCHEDULER_COSINE,
        "warmup_ratio": 0.1,
        "max_grad_norm": 1.0,
        "max_length": 256,
        "seed": 7,
        "attn_implementation": "auto",
        "log_every": 1,
        "dtype": job_pb2.DTYPE_FLOAT32,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
    }
    spec = job_pb2.FineTuneTask(
        base_model="builtin/pocket",
        training_dataset="chats",
        hyperparameters=job_pb2.Hyperparameters(**(defaults | numbers)),
        evaluation=evaluation,
        checkpoints=job_pb2.Checkpoints(every_steps=2, keep=2),
    )
    if full:
        spec.full.train_last_layers = last_layers
    else:
        spec.lora.CopyFrom(
            job_pb2.Lora(
                rank=4, alpha=8.0, dropout=dropout, target_modules=["all-linear"], modules_to_save=modules_to_save
            )
        )
        spec.lora.MergeFrom(lora or job_pb2.Lora())
    source = DatasetSource(path=str(data), id="ds_1", name="chats@1", sha256="0" * 64)
    return TrainerTask(
        job_id="job_1",
        attempt=attempt,
        spec=job_pb2.JobSpec(fine_tune=spec),
        base_model=BaseModelSource(location=str(base)),
        training_dataset=source,
        validation_dataset=source if evaluation is not None else None,
        checkpoints_dir=str(folder / "checkpoints"),
        model_dir=str(folder / "model"),
        cache_dir=str(folder / "cache"),
        resume_from=str(resume_from or ""),
        threads=1,
    )


class Recorder:
    """Keeps every report."""

    def __init__(self) -> None:
        self.reports: list[Payload] = []

    def report(self, payload: Payload, *, durable: bool = False) -> None:
        self.reports.append(payload)

    def steps(self) -> Iterator[event_pb2.StepCompleted]:
        """The steps, in order."""
        return (each for each in self.reports if isinstance(each, event_pb2.StepCompleted))

    def evaluations(self) -> Iterator[event_pb2.EvaluationCompleted]:
        """The evaluations, in order."""
        return (each for each in self.reports if isinstance(each, event_pb2.EvaluationCompleted))


class StopAfter:
    """Asks for a stop once `step` was reported, at the `looks`-th look after that."""

    def __init__(self, recorder: Recorder, step: int, looks: int = 1) -> None:
        self._recorder = recorder
        self._step = step
        self._looks = looks

    def requested(self) -> ControlAction.ValueType:
        """What a trainer reads between micro-batches."""
        if max((each.step for each in self._recorder.steps()), default=0) >= self._step:
            self._looks -= 1
        return task_pb2.CONTROL_ACTION_PAUSE if self._looks <= 0 else task_pb2.CONTROL_ACTION_UNSPECIFIED
