"""Numbers that rules decide, and what may not be given beside them."""

import pytest

from luthier.trainer.v1.report_pb2 import ModelReport
from luthier.v1.dataset_pb2 import DatasetFormat
from luthier.v1.job_pb2 import AutoHyperparameter, FineTuneTask, Full, Hyperparameters, JobSpec, Lora
from luthier_server import auto
from luthier_server import spec as specs

EPOCHS = AutoHyperparameter.AUTO_HYPERPARAMETER_EPOCHS
BATCH = AutoHyperparameter.AUTO_HYPERPARAMETER_BATCH_SIZE
RATE = AutoHyperparameter.AUTO_HYPERPARAMETER_LEARNING_RATE
LLAMA = ModelReport(hidden_size=4096, model_type="llama")


def job(numbers: Hyperparameters, **fields: object) -> JobSpec:
    task = FineTuneTask(base_model="b", training_dataset="d", hyperparameters=numbers, **fields)  # type: ignore[arg-type]
    return JobSpec(fine_tune=task)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(1, 25), (4, 25), (5, 20), (20, 5), (33, 3), (34, 3), (1000, 3), (8333, 3), (8334, 2), (12_501, 1), (10**6, 1)],
)
def test_epochs_aim_at_a_hundred_to_25000_examples(rows: int, expected: int) -> None:
    assert auto.epochs(rows) == expected


@pytest.mark.parametrize(
    ("rows", "full", "expected"),
    [
        (1, False, 4),
        (1000, False, 4),
        (4000, False, 8),
        (10_000, False, 16),
        (50_000, False, 128),
        (50_000, True, 128),
        (10**6, False, 128),
        (10**6, True, 256),
    ],
)
def test_a_batch_is_a_share_of_the_rows(rows: int, full: bool, expected: int) -> None:
    assert auto.batch_size(rows, full=full) == expected


@pytest.mark.parametrize(
    ("adaptation", "width", "family", "expected"),
    [
        (Lora(), 2048, "llama", 4.9e-4),
        (Lora(), 4096, "llama", 2.9e-4),
        (Lora(), 8192, "llama", 1.7e-4),
        (Full(), 4096, "llama", 2.9e-5),
        (Lora(), 2560, "qwen3", 4.9e-4),
        (Full(), 3584, "qwen2", 4.8e-5),
        (Lora(), 2304, "gemma2", 3e-4),
        (Full(), 2304, "gemma2", 3e-5),
        (Lora(), 32, "llama", 1e-2),
        (Full(), 32, "llama", 1e-3),
        (Lora(rank=64), 4096, "llama", 7.1e-5),
        (Lora(alpha=16), 4096, "llama", 5.7e-4),
        (Lora(alpha=8, use_rslora=True), 4096, "llama", 2.9e-4),
        (Lora(lora_plus_ratio=16), 4096, "llama", 1.8e-5),
    ],
)
def test_a_rate_follows_the_width_the_family_and_what_is_trained(
    adaptation: Lora | Full, width: int, family: str, expected: float
) -> None:
    kind = {"full": adaptation} if isinstance(adaptation, Full) else {"lora": adaptation}
    base = ModelReport(hidden_size=width, model_type=family)
    made, _ = auto.decided(job(Hyperparameters(auto=[RATE]), **kind), rows=100, base=base)
    assert made.fine_tune.hyperparameters.learning_rate == expected


def test_every_decision_is_told_with_its_reason_and_source() -> None:
    spec = job(Hyperparameters(auto=[RATE, EPOCHS, BATCH]), lora=Lora(rank=8), validation_fraction=0.1)
    made, reasons = auto.decided(spec, rows=20_000, base=LLAMA)
    numbers = made.fine_tune.hyperparameters
    assert (numbers.epochs, numbers.batch_size, numbers.learning_rate) == (1, 32, 5.7e-4)
    assert not numbers.auto
    assert reasons == [
        "auto: 1 epoch of 18,000 rows, which aims at three epochs and at 100 to 25,000 examples (the default of"
        " OpenAI's fine-tuning)",
        "auto: a batch of 32, the power of two nearest to 0.2 % of 18,000 rows, from 4 to 128 (the default of OpenAI's"
        " first fine-tuning API)",
        "auto: a learning rate of 0.00057, for LoRA of a llama model of width 4096 (tinker-cookbook's formula), scaled"
        " from alpha 32 to 16",
    ]
    assert spec.fine_tune.hyperparameters.auto


def test_a_base_of_unknown_width_gets_the_default_rate_and_is_told_so() -> None:
    made, reasons = auto.decided(job(Hyperparameters(auto=[RATE])), rows=10, base=ModelReport(is_hub=True))
    assert made.fine_tune.hyperparameters.learning_rate == 2e-4
    assert reasons == ["auto: a learning rate of 0.0002, the default, because the base model's width is not known here"]


def test_a_spec_without_auto_is_left_alone() -> None:
    spec = job(Hyperparameters(epochs=2))
    assert auto.decided(spec, rows=10, base=LLAMA) == (spec, [])


@pytest.mark.parametrize(
    ("numbers", "field"),
    [
        (Hyperparameters(auto=[EPOCHS], epochs=3), "epochs"),
        (Hyperparameters(auto=[BATCH], batch_size=8), "batch_size"),
        (Hyperparameters(auto=[BATCH], per_device_train_batch_size=8), "per_device_train_batch_size"),
        (Hyperparameters(auto=[BATCH], gradient_accumulation_steps=8), "gradient_accumulation_steps"),
        (Hyperparameters(auto=[RATE], learning_rate=1e-4), "learning_rate"),
        (Hyperparameters(find_learning_rate=True, learning_rate=1e-4), "learning_rate"),
        (Hyperparameters(find_learning_rate=True, auto=[RATE]), "find_learning_rate"),
    ],
)
def test_a_number_that_is_given_and_decided_is_refused_by_its_field(numbers: Hyperparameters, field: str) -> None:
    (violation,) = specs.cross_violations(job(numbers))
    assert violation.field == f"spec.fine_tune.hyperparameters.{field}"


@pytest.mark.parametrize(
    "numbers",
    [
        Hyperparameters(auto=[EPOCHS, BATCH, RATE], max_steps=100),
        Hyperparameters(find_learning_rate=True, auto=[EPOCHS, BATCH]),
        Hyperparameters(find_learning_rate=False, learning_rate=1e-4),
    ],
)
def test_what_goes_together_is_taken(numbers: Hyperparameters) -> None:
    assert not list(specs.cross_violations(job(numbers)))


def test_each_auto_is_named_once() -> None:
    (violation,) = specs.rule_violations(job(Hyperparameters(auto=[RATE, RATE])))
    assert violation.field == "fine_tune.hyperparameters.auto"


def test_a_rate_that_is_to_be_found_has_no_number_before() -> None:
    kind = DatasetFormat.DATASET_FORMAT_UNSPECIFIED
    searching = specs.resolved(job(Hyperparameters(find_learning_rate=True)), rows=10, max_positions=0, row_format=kind)
    assert not searching.fine_tune.hyperparameters.HasField("learning_rate")
    plain = specs.resolved(job(Hyperparameters()), rows=10, max_positions=0, row_format=kind)
    assert plain.fine_tune.hyperparameters.HasField("find_learning_rate")
    assert plain.fine_tune.hyperparameters.learning_rate == 2e-4
