"""Fine-tuning in one line, without a server: the same engine, the same result."""

import hashlib
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from luthier.trainer.v1.report_pb2 import Finished
from luthier.trainer.v1.task_pb2 import BaseModelSource, DatasetSource, TrainerTask
from luthier.v1 import dataset_pb2, job_pb2, tokenization_pb2
from luthier_trainer.console import ConsoleReporter, SilentReporter
from luthier_trainer.control import NoControl
from luthier_trainer.data.formats import records
from luthier_trainer.data.reading import Reading
from luthier_trainer.errors import TrainingError
from luthier_trainer.inspect import locate
from luthier_trainer.main import set_up_libraries
from luthier_trainer.report import Reporter

_SCHEDULERS = {
    "cosine": job_pb2.LR_SCHEDULER_COSINE,
    "linear": job_pb2.LR_SCHEDULER_LINEAR,
    "constant": job_pb2.LR_SCHEDULER_CONSTANT,
    "warmup_stable_decay": job_pb2.LR_SCHEDULER_WARMUP_STABLE_DECAY,
}
_DTYPES = {
    "auto": job_pb2.DTYPE_UNSPECIFIED,
    "float32": job_pb2.DTYPE_FLOAT32,
    "bfloat16": job_pb2.DTYPE_BFLOAT16,
}
_INITS = {
    "kaiming": job_pb2.LORA_INIT_KAIMING,
    "gaussian": job_pb2.LORA_INIT_GAUSSIAN,
    "orthogonal": job_pb2.LORA_INIT_ORTHOGONAL,
}
_QUANTIZATIONS = {
    "none": job_pb2.LORA_QUANTIZATION_NONE,
    "nf4": job_pb2.LORA_QUANTIZATION_NF4,
    "int8": job_pb2.LORA_QUANTIZATION_INT8,
}
_METRICS = {
    "loss": job_pb2.EVALUATION_METRIC_LOSS,
    "token_accuracy": job_pb2.EVALUATION_METRIC_TOKEN_ACCURACY,
}
_SAMPLES_AT = {
    "ends": job_pb2.SAMPLES_AT_ENDS,
    "each_evaluation": job_pb2.SAMPLES_AT_EACH_EVALUATION,
}
_TRAIN_ON = {
    "assistant": tokenization_pb2.TRAIN_ON_ASSISTANT,
    "last_turn": tokenization_pb2.TRAIN_ON_LAST_TURN,
    "all_tokens": tokenization_pb2.TRAIN_ON_ALL_TOKENS,
}
_OVERLONG = {
    "truncate": tokenization_pb2.OVERLONG_TRUNCATE,
    "drop": tokenization_pb2.OVERLONG_DROP,
    "split": tokenization_pb2.OVERLONG_SPLIT,
    "error": tokenization_pb2.OVERLONG_ERROR,
}
_TEMPLATE_NAME = re.compile(r"[a-z0-9.-]+", re.ASCII)


@dataclass(frozen=True)
class FineTuned:
    """What came out: the directory of the model or adapter, the steps made and the final numbers by name."""

    directory: Path
    steps: int
    metrics: dict[str, float]


def fine_tune(
    base_model: str,
    data: str | Path,
    out: str | Path,
    *,
    validation: str | Path | None = None,
    validation_fraction: float = 0.0,
    adaptation: Literal["lora", "full"] = "lora",
    rank: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: Sequence[str] = ("all-linear",),
    modules_to_save: Sequence[str] = (),
    use_rslora: bool = False,
    use_dora: bool = False,
    init: Literal["kaiming", "gaussian", "orthogonal"] = "kaiming",
    lora_plus_ratio: float = 1.0,
    quantization: Literal["none", "nf4", "int8"] = "none",
    train_last_layers: int = 0,
    epochs: float | None = None,
    max_steps: int | None = None,
    batch_size: int = 16,
    learning_rate: float | None = None,
    find_learning_rate: bool = False,
    lr_scheduler: Literal["cosine", "linear", "constant", "warmup_stable_decay"] = "cosine",
    warmup_ratio: float = 0.03,
    decay_ratio: float = 0.1,
    min_learning_rate_ratio: float = 0.0,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    label_smoothing: float = 0.0,
    neftune_alpha: float = 0.0,
    max_length: int = 1024,
    overlong: Literal["truncate", "drop", "split", "error"] | None = None,
    train_on: Literal["assistant", "last_turn", "all_tokens"] | None = None,
    chat_template: str = "",
    response_template: str = "",
    columns: Mapping[str, str] | None = None,
    seed: int = 0,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    evaluate_every_steps: int | None = None,
    early_stopping_patience: int | None = None,
    early_stopping_min_delta: float = 0.0,
    early_stopping_metric: Literal["loss", "token_accuracy"] = "loss",
    keep_best: bool = False,
    sample_prompts: Sequence[str] = (),
    sample_max_tokens: int = 128,
    samples_at: Literal["ends", "each_evaluation"] = "ends",
    progress: bool | None = None,
    reporter: Reporter | None = None,
) -> FineTuned:
    """Fine-tunes `base_model` on the rows of `data` (JSONL, JSON, CSV, Parquet or Arrow; messages, prompts,
    instructions, ShareGPT or texts) into `out`.

    `base_model` is a hub id, a directory with a model or an adapter, or `builtin/tiny`. Defaults are the server's: 3
    epochs unless `max_steps` is given, a rate of 2e-4 for LoRA and 2e-5 for full fine-tuning, alpha twice the rank;
    rows over `max_length` are cut, and texts split. `chat_template` is the name of one that Luthier brings (`chatml`),
    or the template itself; `columns` maps the field that a format has (`prompt`) to the column that holds it
    (`question`).
    `find_learning_rate` looks for the rate by a range test before the first step, in place of `learning_rate`.
    The other options are the fields of a job with the same names, which `docs/fine-tuning.md` explains. Evaluations are
    made every epoch or every `evaluate_every_steps`; `early_stopping_patience` of them in a row without improvement end
    training, and with `keep_best` the best one's weights are the model.
    `progress` writes lines to standard error, by default when that is a terminal; `reporter` takes the reports instead.

    Raises TrainingError, FileExistsError when `out` is there already, and ValueError for options that exclude each
    other.
    """
    if find_learning_rate and learning_rate is not None:
        raise ValueError("give learning_rate or find_learning_rate, not both")
    judged = keep_best or early_stopping_patience is not None or samples_at == "each_evaluation"
    if (judged or evaluate_every_steps is not None) and validation is None and not validation_fraction:
        raise ValueError("evaluations need data: give validation or validation_fraction")
    set_up_libraries()
    target = Path(out).absolute()
    if target.exists():
        raise FileExistsError(f"{target} is there already")
    spec = job_pb2.FineTuneTask(
        base_model=base_model,
        training_dataset=Path(data).name,
        validation_dataset=Path(validation).name if validation is not None else "",
        validation_fraction=validation_fraction,
        sft=job_pb2.Sft(),
        hyperparameters=job_pb2.Hyperparameters(
            batch_size=batch_size,
            learning_rate=None if find_learning_rate else learning_rate or (2e-5 if adaptation == "full" else 2e-4),
            find_learning_rate=find_learning_rate,
            weight_decay=weight_decay,
            lr_scheduler=_SCHEDULERS[lr_scheduler],
            warmup_ratio=warmup_ratio,
            decay_ratio=decay_ratio if lr_scheduler == "warmup_stable_decay" else None,
            min_learning_rate_ratio=min_learning_rate_ratio,
            max_grad_norm=max_grad_norm,
            epochs=3.0 if epochs is None and max_steps is None else epochs,
            max_steps=max_steps,
            max_length=max_length,
            seed=seed,
            attn_implementation="auto",
            log_every=1,
            dtype=_DTYPES[dtype],
            adam_beta1=0.9,
            adam_beta2=0.999,
            adam_epsilon=1e-8,
            label_smoothing=label_smoothing,
            neftune_alpha=neftune_alpha,
        ),
        evaluation=job_pb2.Evaluation(
            every_steps=evaluate_every_steps,
            sample_prompts=sample_prompts,
            sample_max_tokens=sample_max_tokens,
            samples_at=_SAMPLES_AT[samples_at],
        ),
        checkpoints=job_pb2.Checkpoints(keep=1, keep_best=keep_best),
    )
    if early_stopping_patience is not None:
        spec.evaluation.early_stopping.CopyFrom(
            job_pb2.EarlyStopping(
                patience=early_stopping_patience,
                min_delta=early_stopping_min_delta,
                metric=_METRICS[early_stopping_metric],
            )
        )
    if adaptation == "full":
        spec.full.train_last_layers = train_last_layers
    else:
        spec.lora.CopyFrom(
            job_pb2.Lora(
                rank=rank,
                alpha=2.0 * rank if alpha is None else alpha,
                dropout=dropout,
                target_modules=target_modules,
                modules_to_save=modules_to_save,
                use_rslora=use_rslora,
                use_dora=use_dora,
                init=_INITS[init],
                lora_plus_ratio=lora_plus_ratio,
                quantization=_QUANTIZATIONS[quantization],
            )
        )
    if reporter is None:
        shown = sys.stderr.isatty() if progress is None else progress
        reporter = ConsoleReporter() if shown else SilentReporter()
    source = dataset_source(Path(data), columns or {})
    texts = source.reading.format == dataset_pb2.DATASET_FORMAT_TEXT
    spec.tokenization.CopyFrom(
        tokenization_pb2.Tokenization(
            train_on=_TRAIN_ON[train_on or ("all_tokens" if texts else "assistant")],
            overlong=_OVERLONG[overlong or ("split" if texts else "truncate")],
            response_template=response_template,
        )
    )
    if _TEMPLATE_NAME.fullmatch(chat_template):
        spec.tokenization.chat_template_name = chat_template
    else:
        spec.tokenization.chat_template = chat_template
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as work:
        task = TrainerTask(
            job_id=f"local-{target.name}",
            attempt=1,
            spec=job_pb2.JobSpec(display_name=target.name, fine_tune=spec),
            base_model=model_source(base_model),
            training_dataset=source,
            validation_dataset=None if validation is None else dataset_source(Path(validation), columns or {}),
            checkpoints_dir=str(Path(work) / "checkpoints"),
            model_dir=str(target),
            cache_dir=str(Path(work) / "cache"),
            cuda_devices=_devices(),
        )
        from luthier_trainer import sft

        end = sft.train(task, reporter, NoControl())
    if not isinstance(end, Finished):
        raise RuntimeError("training was stopped, and nobody asked for it")
    return FineTuned(target, end.step, dict(end.metrics))


def model_source(base_model: str) -> BaseModelSource:
    """Where the base lies. Unlike a server, a person's own process may read any directory."""
    path = Path(base_model)
    local = path.is_dir() and not base_model.startswith("builtin/")
    report = locate(str(path.resolve()), [Path("/")]) if local else locate(base_model)
    if not report.found or report.problem:
        raise TrainingError("MODEL_NOT_FOUND", report.problem or f"There is no model {base_model}.")
    if report.adapter_dir:
        return BaseModelSource(location=report.base_location, is_hub=report.is_hub, adapter_dir=report.adapter_dir)
    return BaseModelSource(location=base_model if report.is_hub else report.directory, is_hub=report.is_hub)


def dataset_source(path: Path, columns: Mapping[str, str]) -> DatasetSource:
    """The file and how it is read, which its first row tells."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with records(path, Reading(columns=columns)) as found:
        next(iter(found), None)
        reading = found.reading
    return DatasetSource(path=str(path.resolve()), name=path.name, sha256=digest, reading=reading.to_proto())


def _devices() -> list[int]:
    import torch

    return [0] if torch.cuda.is_available() else []
