"""Hyperparameters that rules decide, with the source of each rule; docs/fine-tuning.md tells what they give.

Everything is decided when a job is created, from the number of its rows, from what is trained, and from the base
model's width and family: the same spec on the same dataset always gives the same numbers.

Epochs: three, fewer or more where the examples seen would be over 25,000 or under 100, from 1 to 25. The default of
OpenAI's fine-tuning, as its cookbook publishes it ("Data preparation and analysis for chat model fine-tuning").

Batch size: 0.2 % of the examples, at most 256: the default of OpenAI's fine-tuning as the reference of its first
fine-tuning API (`CreateFineTuneRequest.batch_size`) told it, as a power of two. At most 128 for LoRA, which bears large
batches less well than full fine-tuning (Schulman et al. 2025, "LoRA Without Regret"; 128 is also the batch of
tinker-cookbook's sweeps). At least 4: a rule for large datasets would leave small ones to the noise of single rows.

Learning rate: 5e-5 (2000 / width)^p for full fine-tuning and ten times that for LoRA, p = 0.781 for Llama's family and
0.0775 for Qwen's: tinker-cookbook's fit (`hyperparam_utils.get_lr`, formula of 2025) for adapters of alpha 32, which
"LoRA Without Regret" uses at every rank. The cookbook's later sweep of 28 models (tulu3, batch 128, 780 steps, a coarse
grid of rates) lies within a factor of 2.8 of it, and has 3e-4 as the best rate of 14 models: that is taken for families
without a fit. With another alpha the LoRA rate is scaled by 32 / alpha, for the product of the factors, of which the
second starts at zero, first changes by alpha times the rate; with rsLoRA alpha counts sqrt(rank) times. With LoRA+ the
second factor gets the rate of the fit, so the rate is divided by `lora_plus_ratio`. Narrow models lie outside of what
was fitted: no rate above 1e-2 for LoRA or 1e-3 for full fine-tuning is chosen.
"""

import math
from collections.abc import Callable

from luthier.trainer.v1.report_pb2 import ModelReport
from luthier.v1.job_pb2 import AutoHyperparameter, FineTuneTask, JobSpec
from luthier_server import spec as specs

_TARGET_EPOCHS = 3
_FEWEST_EXAMPLES = 100
_MOST_EXAMPLES = 25_000
_MOST_EPOCHS = 25

_BATCH_SHARE = 0.002
_SMALLEST_BATCH = 4
_LARGEST_BATCH = 256
_LARGEST_LORA_BATCH = 128

_FULL_RATE = 5e-5
_LORA_FACTOR = 10.0
_WIDTH = 2000
_EXPONENTS = {"llama": 0.781, "qwen2": 0.0775, "qwen2_moe": 0.0775, "qwen3": 0.0775, "qwen3_moe": 0.0775}
_USUAL_LORA_RATE = 3e-4
_ALPHA = 32.0
_HIGHEST_LORA_RATE = 1e-2
_HIGHEST_FULL_RATE = 1e-3


def decided(spec: JobSpec, *, rows: int, base: ModelReport) -> tuple[JobSpec, list[str]]:
    """(the spec with a number for each hyperparameter of its `auto`, which is empty then; for each a sentence that says
    what it is and why). `rows` is how many the training dataset has. A spec without `auto` is returned as it is."""
    if not spec.fine_tune.hyperparameters.auto:
        return spec, []
    made = JobSpec()
    made.CopyFrom(spec)
    task = made.fine_tune
    specs.resolve_adaptation(task)
    wanted = sorted(task.hyperparameters.auto)
    task.hyperparameters.ClearField("auto")
    return made, [_RULES[each](task, specs.training_rows(task, rows), base) for each in wanted]


def epochs(rows: int) -> int:
    """Passes over so many rows."""
    examples = rows * _TARGET_EPOCHS
    if examples < _FEWEST_EXAMPLES:
        return min(_MOST_EPOCHS, _FEWEST_EXAMPLES // max(rows, 1))
    if examples > _MOST_EXAMPLES:
        return max(1, _MOST_EXAMPLES // rows)
    return _TARGET_EPOCHS


def batch_size(rows: int, *, full: bool) -> int:
    """Examples of an optimizer step for so many rows."""
    share = max(rows * _BATCH_SHARE, 1.0)
    largest = _LARGEST_BATCH if full else _LARGEST_LORA_BATCH
    return max(_SMALLEST_BATCH, min(largest, 1 << round(math.log2(share))))


def learning_rate(task: FineTuneTask, hidden_size: int, model_type: str) -> float:
    """The peak rate for a task whose adaptation is resolved, with two digits; the width is known."""
    full = task.WhichOneof("adaptation") == "full"
    exponent = _EXPONENTS.get(model_type)
    rate = _USUAL_LORA_RATE / _LORA_FACTOR if exponent is None else _FULL_RATE * (_WIDTH / hidden_size) ** exponent
    if full:
        return float(f"{min(rate, _HIGHEST_FULL_RATE):.1e}")
    rate *= _LORA_FACTOR * _ALPHA / _alpha(task) / task.lora.lora_plus_ratio
    return float(f"{min(rate, _HIGHEST_LORA_RATE):.1e}")


def _alpha(task: FineTuneTask) -> float:
    """The alpha that scales an adapter by alpha / rank as this one is scaled."""
    return task.lora.alpha * (math.sqrt(task.lora.rank) if task.lora.use_rslora else 1.0)


def _decide_epochs(task: FineTuneTask, rows: int, base: ModelReport) -> str:
    number = epochs(rows)
    task.hyperparameters.epochs = number
    return (
        f"auto: {_count(number, 'epoch')} of {_count(rows, 'row')}, which aims at three epochs and at"
        f" {_FEWEST_EXAMPLES:,} to {_MOST_EXAMPLES:,} examples (the default of OpenAI's fine-tuning)"
    )


def _decide_batch_size(task: FineTuneTask, rows: int, base: ModelReport) -> str:
    full = task.WhichOneof("adaptation") == "full"
    number = batch_size(rows, full=full)
    task.hyperparameters.batch_size = number
    largest = _LARGEST_BATCH if full else _LARGEST_LORA_BATCH
    return (
        f"auto: a batch of {number}, the power of two nearest to 0.2 % of {_count(rows, 'row')}, from {_SMALLEST_BATCH}"
        f" to {largest} (the default of OpenAI's first fine-tuning API)"
    )


def _decide_learning_rate(task: FineTuneTask, rows: int, base: ModelReport) -> str:
    full = task.WhichOneof("adaptation") == "full"
    if not base.hidden_size or not base.model_type:
        number = specs.default_learning_rate(task)
        task.hyperparameters.learning_rate = number
        return f"auto: a learning rate of {number:g}, the default, because the base model's width is not known here"
    number = learning_rate(task, base.hidden_size, base.model_type)
    task.hyperparameters.learning_rate = number
    what = "full fine-tuning" if full else "LoRA"
    if base.model_type in _EXPONENTS:
        why = f"for {what} of a {base.model_type} model of width {base.hidden_size} (tinker-cookbook's formula)"
    else:
        why = f"the usual one for {what}: no formula was fitted to {base.model_type} (tinker-cookbook's sweep)"
    if not full and _alpha(task) != _ALPHA:
        why += f", scaled from alpha {_ALPHA:g} to {_alpha(task):g}"
    if not full and task.lora.lora_plus_ratio != 1:
        why += f", divided by the LoRA+ ratio of {task.lora.lora_plus_ratio:g}"
    return f"auto: a learning rate of {number:g}, {why}"


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


_RULES: dict[AutoHyperparameter.ValueType, Callable[[FineTuneTask, int, ModelReport], str]] = {
    AutoHyperparameter.AUTO_HYPERPARAMETER_EPOCHS: _decide_epochs,
    AutoHyperparameter.AUTO_HYPERPARAMETER_BATCH_SIZE: _decide_batch_size,
    AutoHyperparameter.AUTO_HYPERPARAMETER_LEARNING_RATE: _decide_learning_rate,
}
