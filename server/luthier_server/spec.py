"""What a job may ask for: the rules that its spec must keep, and the defaults that the server fills in.

Rules on one field stand in the proto (protovalidate); rules between fields stand here.
"""

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import protovalidate
from google.protobuf.message import Message

from luthier.v1.dataset_pb2 import DatasetFormat
from luthier.v1.job_pb2 import (
    AutoHyperparameter,
    EarlyStopping,
    Evaluation,
    EvaluationMetric,
    FineTuneTask,
    Hyperparameters,
    JobSpec,
    Lora,
    LoraInit,
    LoraQuantization,
    LrScheduler,
    SamplesAt,
    Sft,
)
from luthier.v1.tokenization_pb2 import Overlong, Tokenization, TrainOn
from luthier_server.errors import InvalidArgument, Violation

MAX_VIOLATIONS = 25
_NOT_SUPERVISED = {
    DatasetFormat.DATASET_FORMAT_PREFERENCE: "pairs of answers, which need a preference objective; none is offered yet",
    DatasetFormat.DATASET_FORMAT_UNPAIRED_PREFERENCE: "judged answers, which need a preference objective; none is"
    " offered yet",
    DatasetFormat.DATASET_FORMAT_PROMPT_ONLY: "prompts without answers, which need a reinforcement objective; none is"
    " offered yet",
}
_ID_PREFIXES = ("model_", "job_", "ds_", "export_")
_validator = protovalidate.Validator()


def rule_violations(message: Message, prefix: str = "") -> list[Violation]:
    """Every rule of the proto that `message` breaks; `prefix` is put before the path of each field."""
    found = []
    for violation in _validator.collect_violations(message):
        path = ""
        field = violation.proto.field
        for element in field.elements if field is not None else ():
            path += f".{element.field_name}" if path else element.field_name
            if element.subscript is not None:
                value = element.subscript.value
                path += f'["{value}"]' if isinstance(value, str) else f"[{value}]"
        text = violation.proto.message or violation.proto.rule_id
        found.append(Violation(prefix + path, f"the key {text}" if violation.proto.for_key else text))
    return found


def check(message: Message) -> None:
    """Raises InvalidArgument with every rule of the proto that `message` breaks."""
    refuse(rule_violations(message))


def refuse(violations: Sequence[Violation]) -> None:
    """Raises InvalidArgument when there are violations."""
    if not violations:
        return
    first = violations[0]
    more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
    raise InvalidArgument(f"{first.field}: {first.description}{more}", violations[:MAX_VIOLATIONS])


def cross_violations(spec: JobSpec) -> Iterator[Violation]:
    """Rules between the fields of a spec, and fields that are not honoured yet."""
    if spec.HasField("priority"):
        yield Violation("spec.priority", "is not honoured yet: leave it unset")
    if spec.HasField("resources"):
        yield Violation("spec.resources", "is not honoured yet: leave it unset")
    if spec.WhichOneof("task") == "export":
        yield Violation("spec.export", "is created by Models.ExportModel (luthier model export), not here")
    if spec.WhichOneof("task") != "fine_tune":
        return
    task = spec.fine_tune
    yield from name_violations(task.model_name, "spec.fine_tune.model_name")
    numbers = task.hyperparameters
    path = "spec.fine_tune.hyperparameters"
    if _epochs(numbers) == 0 and not numbers.max_steps:
        yield Violation(f"{path}.epochs", "epochs and max_steps are both 0: nothing would be trained")
    if numbers.HasField("warmup_steps") and numbers.HasField("warmup_ratio"):
        yield Violation(f"{path}.warmup_ratio", "give warmup_steps or warmup_ratio, not both")
    if numbers.HasField("decay_ratio") and numbers.lr_scheduler != LrScheduler.LR_SCHEDULER_WARMUP_STABLE_DECAY:
        yield Violation(f"{path}.decay_ratio", "is a setting of lr_scheduler warmup_stable_decay alone")
    if numbers.min_learning_rate_ratio and numbers.lr_scheduler == LrScheduler.LR_SCHEDULER_CONSTANT:
        yield Violation(f"{path}.min_learning_rate_ratio", "has no meaning where the learning rate is constant")
    yield from _rate_violations(numbers, path)
    parts = _micro(numbers)
    if parts and numbers.HasField("batch_size") and numbers.batch_size != parts:
        yield Violation(
            f"{path}.batch_size",
            f"is {numbers.batch_size}, but per_device_train_batch_size x gradient_accumulation_steps is {parts}",
        )
    if parts > 65536:
        yield Violation(f"{path}.gradient_accumulation_steps", f"makes a batch of {parts} examples; 65536 at most")
    if task.lora.init == LoraInit.LORA_INIT_ORTHOGONAL and task.lora.rank % 2:
        yield Violation("spec.fine_tune.lora.init", f"orthogonal needs an even rank, and rank is {task.lora.rank}")
    if task.lora.use_dora and task.lora.quantization == LoraQuantization.LORA_QUANTIZATION_INT8:
        yield Violation("spec.fine_tune.lora.use_dora", "is offered on weights in nf4 and as they are, not in int8")
    yield from tokenization_violations(task.tokenization, "spec.fine_tune.tokenization")
    if task.validation_dataset and task.validation_fraction:
        yield Violation(
            "spec.fine_tune.validation_fraction", "give validation_dataset or validation_fraction, not both"
        )
    if task.evaluation.HasField("every_steps") and task.evaluation.HasField("every_epochs"):
        yield Violation("spec.fine_tune.evaluation.every_epochs", "give every_steps or every_epochs, not both")
    if _evaluates(task.evaluation) and not (task.validation_dataset or task.validation_fraction):
        yield Violation("spec.fine_tune.evaluation", "needs data: set validation_dataset or validation_fraction")

    if not (task.validation_dataset or task.validation_fraction):
        for field, given in (
            ("evaluation.early_stopping", task.evaluation.HasField("early_stopping")),
            ("evaluation.samples_at", task.evaluation.samples_at == SamplesAt.SAMPLES_AT_EACH_EVALUATION),
            ("checkpoints.keep_best", task.checkpoints.keep_best),
        ):
            if given:
                yield Violation(
                    f"spec.fine_tune.{field}", "needs evaluations: set validation_dataset or validation_fraction"
                )


_AutoField = Literal[
    "epochs", "batch_size", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate"
]
_AUTO_FIELDS: Mapping[AutoHyperparameter.ValueType, Sequence[_AutoField]] = {
    AutoHyperparameter.AUTO_HYPERPARAMETER_EPOCHS: ("epochs",),
    AutoHyperparameter.AUTO_HYPERPARAMETER_BATCH_SIZE: (
        "batch_size",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
    ),
    AutoHyperparameter.AUTO_HYPERPARAMETER_LEARNING_RATE: ("learning_rate",),
}


def _rate_violations(numbers: Hyperparameters, path: str) -> Iterator[Violation]:
    """Numbers that are given although a rule or a range test is to decide them."""
    for auto in numbers.auto:
        for field in _AUTO_FIELDS[auto]:
            if numbers.HasField(field):
                yield Violation(f"{path}.{field}", "give a number or let `auto` decide it, not both")
    if not numbers.find_learning_rate:
        return
    if numbers.HasField("learning_rate"):
        yield Violation(f"{path}.learning_rate", "give a number or find_learning_rate, not both")
    if AutoHyperparameter.AUTO_HYPERPARAMETER_LEARNING_RATE in numbers.auto:
        yield Violation(f"{path}.find_learning_rate", "choose find_learning_rate or `auto`, not both")


def name_violations(name: str, path: str) -> Iterator[Violation]:
    """What keeps a text that the contract's own rules let pass from being a name of models: it must never be taken for
    an id, nor be odd where it becomes part of a file's name."""
    if name.startswith(_ID_PREFIXES):
        yield Violation(path, f"begins as an id does ({', '.join(_ID_PREFIXES)}): choose another name")
    elif ".." in name or name.endswith("."):
        yield Violation(path, "has two dots in a row, or one at its end")


def tokenization_violations(tokenization: Tokenization, path: str) -> Iterator[Violation]:
    """Rules between the fields of a tokenization."""
    if tokenization.chat_template_name and tokenization.chat_template:
        yield Violation(f"{path}.chat_template", "give chat_template or chat_template_name, not both")
    if tokenization.response_template and tokenization.train_on:
        yield Violation(f"{path}.response_template", "give response_template or train_on, not both")


def length_violations(max_length: int, max_positions: int, base_model: str, path: str) -> Iterator[Violation]:
    """A length that the base model was not made for; `max_positions` of 0 is unknown."""
    if max_positions and max_length > max_positions:
        yield Violation(path, f"{base_model} was made for at most {max_positions} tokens")


def format_violations(field: str, row_format: DatasetFormat.ValueType) -> Iterator[Violation]:
    """What keeps rows of a format from supervised fine-tuning."""
    if row_format in _NOT_SUPERVISED:
        yield Violation(f"spec.fine_tune.{field}", f"holds {_NOT_SUPERVISED[row_format]}")


def module_violations(lora: Lora, module_names: Sequence[str], base_model: str) -> Iterator[Violation]:
    """Names among the adapter's modules that match nothing in the base model, with the nearest ones.

    A name matches a module that equals it or ends with `.name`: PEFT's own rule. PEFT ignores an unknown name in
    modules_to_save without a word, so it must be refused here.
    """
    if not module_names:
        return
    endings = {ending for name in module_names for ending in _endings(name)}
    for field, names in (("target_modules", lora.target_modules), ("modules_to_save", lora.modules_to_save)):
        for index, name in enumerate(names):
            if name in endings or (field == "target_modules" and name == "all-linear"):
                continue
            known = sorted({each.rpartition(".")[2] for each in module_names} - {""})
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known[:12])}"
            yield Violation(
                f"spec.fine_tune.lora.{field}[{index}]", f"'{name}' matches no module of {base_model}: {hint}"
            )


def _endings(name: str) -> Iterable[str]:
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))


def _micro(numbers: Hyperparameters) -> int:
    """Examples a step by the pair of fields that other trainers use; 0 when neither is given."""
    if not (numbers.HasField("per_device_train_batch_size") or numbers.HasField("gradient_accumulation_steps")):
        return 0
    return (numbers.per_device_train_batch_size or 1) * (numbers.gradient_accumulation_steps or 1)


def _epochs(numbers: Hyperparameters) -> float:
    if numbers.HasField("epochs"):
        return numbers.epochs
    return 0 if numbers.max_steps else 3


def _evaluates(evaluation: Evaluation) -> bool:
    return evaluation.HasField("every_steps") or evaluation.HasField("every_epochs")


def _default(message: Message, field: str, value: float | int) -> None:
    if not message.HasField(field):
        setattr(message, field, value)


def resolved(spec: JobSpec, *, rows: int, max_positions: int, row_format: DatasetFormat.ValueType) -> JobSpec:
    """The spec with every default that the comments in `job.proto` and `tokenization.proto` promise.

    `rows` of training data decide how many steps there are, `max_positions` (0: unknown) how long an example may be,
    the format of the rows which of their tokens are trained.
    """
    full = JobSpec()
    full.CopyFrom(spec)
    _default(full, "max_retries", 2)
    task = full.fine_tune
    if task.WhichOneof("objective") is None:
        task.sft.CopyFrom(Sft())
    resolve_adaptation(task)
    _default(task, "validation_fraction", 0.0)
    _resolve_hyperparameters(task, max_positions)
    _resolve_tokenization(task.tokenization, row_format)
    _default(task.checkpoints, "every_steps", max(50, math.ceil(steps(task, rows) / 10)))
    _default(task.checkpoints, "keep", 2)
    _default(task.checkpoints, "keep_best", False)
    if (task.validation_dataset or task.validation_fraction) and not _evaluates(task.evaluation):
        task.evaluation.every_epochs = 1
    _default(task.evaluation, "sample_max_tokens", 128)
    if task.evaluation.samples_at == SamplesAt.SAMPLES_AT_UNSPECIFIED:
        task.evaluation.samples_at = SamplesAt.SAMPLES_AT_ENDS
    if task.evaluation.HasField("early_stopping"):
        _resolve_early_stopping(task.evaluation.early_stopping)
    return full


def resolve_adaptation(task: FineTuneTask) -> None:
    """Fills in what is trained. Also for a task that was resolved before a field was there: it was its default."""
    if task.WhichOneof("adaptation") is None:
        task.lora.CopyFrom(Lora())
    if task.WhichOneof("adaptation") == "lora":
        _resolve_lora(task.lora)
    else:
        _default(task.full, "train_last_layers", 0)


def _resolve_early_stopping(stopping: EarlyStopping) -> None:
    _default(stopping, "patience", 3)
    _default(stopping, "min_delta", 0.0)
    if stopping.metric == EvaluationMetric.EVALUATION_METRIC_UNSPECIFIED:
        stopping.metric = EvaluationMetric.EVALUATION_METRIC_LOSS


def _resolve_lora(lora: Lora) -> None:
    _default(lora, "rank", 16)
    _default(lora, "alpha", 2.0 * lora.rank)
    _default(lora, "dropout", 0.0)
    if not lora.target_modules:
        lora.target_modules.append("all-linear")
    _default(lora, "use_rslora", False)
    _default(lora, "use_dora", False)
    if lora.init == LoraInit.LORA_INIT_UNSPECIFIED:
        lora.init = LoraInit.LORA_INIT_KAIMING
    _default(lora, "lora_plus_ratio", 1.0)
    if lora.quantization == LoraQuantization.LORA_QUANTIZATION_UNSPECIFIED:
        lora.quantization = LoraQuantization.LORA_QUANTIZATION_NONE


def _resolve_hyperparameters(task: FineTuneTask, max_positions: int) -> None:
    numbers = task.hyperparameters
    _default(numbers, "batch_size", _micro(numbers) or 16)
    numbers.ClearField("per_device_train_batch_size")
    numbers.ClearField("gradient_accumulation_steps")
    _default(numbers, "find_learning_rate", False)
    if not numbers.find_learning_rate:
        _default(numbers, "learning_rate", default_learning_rate(task))
    _default(numbers, "weight_decay", 0.0)
    if numbers.lr_scheduler == LrScheduler.LR_SCHEDULER_UNSPECIFIED:
        numbers.lr_scheduler = LrScheduler.LR_SCHEDULER_COSINE
    if numbers.lr_scheduler == LrScheduler.LR_SCHEDULER_WARMUP_STABLE_DECAY:
        _default(numbers, "decay_ratio", 0.1)
    if numbers.lr_scheduler != LrScheduler.LR_SCHEDULER_CONSTANT:
        _default(numbers, "min_learning_rate_ratio", 0.0)
    if not numbers.HasField("warmup_steps"):
        _default(numbers, "warmup_ratio", 0.03)
    _default(numbers, "max_grad_norm", 1.0)
    if epochs := _epochs(numbers):
        numbers.epochs = epochs
    else:
        numbers.ClearField("epochs")
    if not numbers.max_steps:
        numbers.ClearField("max_steps")
    _default(numbers, "max_length", min(1024, max_positions or 1024))
    _default(numbers, "seed", 0)
    numbers.attn_implementation = numbers.attn_implementation or "auto"
    _default(numbers, "log_every", 1)
    _default(numbers, "adam_beta1", 0.9)
    _default(numbers, "adam_beta2", 0.999)
    _default(numbers, "adam_epsilon", 1e-8)
    _default(numbers, "label_smoothing", 0.0)
    _default(numbers, "neftune_alpha", 0.0)


def default_learning_rate(task: FineTuneTask) -> float:
    """The peak learning rate where nobody says anything about it."""
    return 2e-5 if task.HasField("full") else 2e-4


def _resolve_tokenization(tokenization: Tokenization, row_format: DatasetFormat.ValueType) -> None:
    text = row_format == DatasetFormat.DATASET_FORMAT_TEXT
    if tokenization.train_on == TrainOn.TRAIN_ON_UNSPECIFIED and not tokenization.response_template:
        tokenization.train_on = TrainOn.TRAIN_ON_ALL_TOKENS if text else TrainOn.TRAIN_ON_ASSISTANT
    if tokenization.overlong == Overlong.OVERLONG_UNSPECIFIED:
        tokenization.overlong = Overlong.OVERLONG_SPLIT if text else Overlong.OVERLONG_TRUNCATE


def training_rows(task: FineTuneTask, rows: int) -> int:
    """Those of so many rows that are trained on."""
    return rows - (max(1, int(rows * task.validation_fraction)) if task.validation_fraction else 0)


def steps(task: FineTuneTask, rows: int) -> int:
    """Optimizer steps of a resolved task on so many rows."""
    numbers = task.hyperparameters
    an_epoch = max(1, math.ceil(training_rows(task, rows) / numbers.batch_size))
    by_epochs = math.ceil(an_epoch * numbers.epochs) if numbers.HasField("epochs") else None
    by_limit = numbers.max_steps if numbers.HasField("max_steps") else None
    return min(each for each in (by_epochs, by_limit) if each is not None)
