"""What a task asks of the engine: the resolved spec, read once into frozen values."""

from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import Message

from luthier.trainer.v1.task_pb2 import TrainerTask
from luthier.v1 import job_pb2
from luthier_trainer.errors import TrainingError
from luthier_trainer.optimizer import AdamSettings

_DEFAULT_RATES = {False: 2e-4, True: 2e-5}
"""The learning rate where a range test finds none: of LoRA, and of full fine-tuning."""


@dataclass(frozen=True)
class LoraSettings:
    """A new adapter."""

    rank: int
    alpha: float
    dropout: float
    target_modules: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    use_rslora: bool = False
    use_dora: bool = False
    init: job_pb2.LoraInit.ValueType = job_pb2.LORA_INIT_KAIMING
    quantization: job_pb2.LoraQuantization.ValueType = job_pb2.LORA_QUANTIZATION_NONE


@dataclass(frozen=True)
class Judging:
    """What evaluations are judged by. `patience` of None: they never end training."""

    by_accuracy: bool = False
    patience: int | None = None
    min_delta: float = 0.0


@dataclass(frozen=True)
class Settings:
    """A fine-tuning job, every number decided but those that need the data: `every_*` of None mean never, `epochs` and
    `max_steps` of None no limit (never both), `checkpoint_every` of None a tenth of all steps, `train_last_layers` of 0
    everything, `neftune_alpha` of 0 no noise. With `find_rate` a range test looks for a better `peak_rate`."""

    seed: int
    batch_size: int
    peak_rate: float
    find_rate: bool
    scheduler: job_pb2.LrScheduler.ValueType
    warmup_steps: int | None
    warmup_ratio: float | None
    decay_ratio: float
    min_rate_ratio: float
    adam: AdamSettings
    epochs: float | None
    max_steps: int | None
    log_every: int
    attention: str
    dtype: job_pb2.Dtype.ValueType
    lora: LoraSettings | None
    train_last_layers: int
    label_smoothing: float
    neftune_alpha: float
    validation_fraction: float
    evaluate_every_steps: int | None
    evaluate_every_epochs: int | None
    sample_prompts: tuple[str, ...]
    sample_max_tokens: int
    sample_each_evaluation: bool
    judging: Judging
    checkpoint_every: int | None
    checkpoint_keep: int
    keep_best: bool


@dataclass(frozen=True)
class Places:
    """The directories of a task. `resume_from` is a checkpoint's directory."""

    checkpoints: Path
    model: Path
    cache: Path
    resume_from: Path | None


def _required(message: Message, field: str) -> None:
    if not message.HasField(field):
        raise TrainingError(
            "SPEC_INCOMPLETE",
            f"The resolved spec lacks {message.DESCRIPTOR.name}.{field}.",
            "The server fills in every default before it starts a trainer; this task was made by something else.",
        )


def _lora(spec: job_pb2.Lora) -> LoraSettings:
    for field in ("rank", "alpha", "dropout"):
        _required(spec, field)
    return LoraSettings(
        rank=spec.rank,
        alpha=spec.alpha,
        dropout=spec.dropout,
        target_modules=tuple(spec.target_modules) or ("all-linear",),
        modules_to_save=tuple(spec.modules_to_save),
        use_rslora=spec.use_rslora,
        use_dora=spec.use_dora,
        init=spec.init or job_pb2.LORA_INIT_KAIMING,
        quantization=spec.quantization or job_pb2.LORA_QUANTIZATION_NONE,
    )


def _adam(spec: job_pb2.Hyperparameters, second_factor_rate: float) -> AdamSettings:
    for field in ("weight_decay", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon"):
        _required(spec, field)
    return AdamSettings(
        beta1=spec.adam_beta1,
        beta2=spec.adam_beta2,
        epsilon=spec.adam_epsilon,
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
        second_factor_rate=second_factor_rate,
    )


def _judging(spec: job_pb2.Evaluation) -> Judging:
    if not spec.HasField("early_stopping"):
        return Judging()
    stopping = spec.early_stopping
    return Judging(
        by_accuracy=stopping.metric == job_pb2.EVALUATION_METRIC_TOKEN_ACCURACY,
        patience=stopping.patience if stopping.HasField("patience") else 3,
        min_delta=stopping.min_delta,
    )


def read_settings(task: TrainerTask) -> Settings:
    """The settings of a task. Raises TrainingError SPEC_INCOMPLETE for one whose spec is not resolved."""
    _required(task, "spec")
    _required(task.spec, "fine_tune")
    spec = task.spec.fine_tune
    numbers = spec.hyperparameters
    for field in ("batch_size", "max_length", "seed", "log_every"):
        _required(numbers, field)
    if not numbers.find_learning_rate:
        _required(numbers, "learning_rate")
    if not numbers.HasField("epochs") and not numbers.HasField("max_steps"):
        _required(numbers, "epochs")
    full = spec.WhichOneof("adaptation") == "full"
    evaluation, checkpoints = spec.evaluation, spec.checkpoints
    by_steps = evaluation.every_steps if evaluation.HasField("every_steps") else None
    by_epochs = evaluation.every_epochs if evaluation.HasField("every_epochs") else None
    return Settings(
        seed=numbers.seed,
        batch_size=numbers.batch_size,
        peak_rate=numbers.learning_rate if numbers.HasField("learning_rate") else _DEFAULT_RATES[full],
        find_rate=numbers.find_learning_rate,
        scheduler=numbers.lr_scheduler,
        warmup_steps=numbers.warmup_steps if numbers.HasField("warmup_steps") else None,
        warmup_ratio=numbers.warmup_ratio if numbers.HasField("warmup_ratio") else None,
        decay_ratio=numbers.decay_ratio if numbers.HasField("decay_ratio") else 0.1,
        min_rate_ratio=numbers.min_learning_rate_ratio,
        adam=_adam(numbers, 1.0 if full else spec.lora.lora_plus_ratio or 1.0),
        epochs=numbers.epochs if numbers.HasField("epochs") else None,
        max_steps=numbers.max_steps if numbers.HasField("max_steps") else None,
        log_every=numbers.log_every,
        attention=numbers.attn_implementation or "auto",
        dtype=numbers.dtype,
        lora=None if full else _lora(spec.lora),
        train_last_layers=spec.full.train_last_layers if full else 0,
        label_smoothing=numbers.label_smoothing,
        neftune_alpha=numbers.neftune_alpha,
        validation_fraction=spec.validation_fraction,
        evaluate_every_steps=by_steps,
        evaluate_every_epochs=1 if by_steps is None and by_epochs is None else by_epochs,
        sample_prompts=tuple(evaluation.sample_prompts),
        sample_max_tokens=evaluation.sample_max_tokens if evaluation.HasField("sample_max_tokens") else 128,
        sample_each_evaluation=evaluation.samples_at == job_pb2.SAMPLES_AT_EACH_EVALUATION,
        judging=_judging(evaluation),
        checkpoint_every=checkpoints.every_steps if checkpoints.HasField("every_steps") else None,
        checkpoint_keep=checkpoints.keep if checkpoints.HasField("keep") else 2,
        keep_best=checkpoints.keep_best,
    )


def read_places(task: TrainerTask) -> Places:
    """The directories of a task."""
    return Places(
        checkpoints=Path(task.checkpoints_dir),
        model=Path(task.model_dir),
        cache=Path(task.cache_dir),
        resume_from=Path(task.resume_from) if task.resume_from else None,
    )
