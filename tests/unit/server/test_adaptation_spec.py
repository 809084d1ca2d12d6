"""What a job may ask of its adaptation, and what the server fills in."""

import pytest

from luthier.v1.dataset_pb2 import DatasetFormat
from luthier.v1.job_pb2 import FineTuneTask, Full, Hyperparameters, JobSpec, Lora, LoraInit, LoraQuantization
from luthier_server import spec as specs


def job(**fields: object) -> JobSpec:
    return JobSpec(fine_tune=FineTuneTask(base_model="builtin/tiny", training_dataset="cards", **fields))  # type: ignore[arg-type]


def resolved(spec: JobSpec) -> FineTuneTask:
    return specs.resolved(spec, rows=10, max_positions=0, row_format=DatasetFormat.DATASET_FORMAT_UNSPECIFIED).fine_tune


def test_an_adapter_is_plain_unless_asked_for_more() -> None:
    lora = resolved(job()).lora
    assert all(lora.HasField(field) for field in ("use_rslora", "use_dora", "lora_plus_ratio"))
    assert (lora.use_rslora, lora.use_dora, lora.lora_plus_ratio) == (False, False, 1.0)
    assert lora.init == LoraInit.LORA_INIT_KAIMING
    assert lora.quantization == LoraQuantization.LORA_QUANTIZATION_NONE
    asked = Lora(use_rslora=True, use_dora=True, lora_plus_ratio=16, init=LoraInit.LORA_INIT_GAUSSIAN)
    lora = resolved(job(lora=asked)).lora
    assert (lora.use_rslora, lora.use_dora, lora.lora_plus_ratio) == (True, True, 16.0)
    assert lora.init == LoraInit.LORA_INIT_GAUSSIAN


def test_everything_is_trained_and_nothing_smoothed_unless_asked_for() -> None:
    task = resolved(job(full=Full()))
    assert task.full.HasField("train_last_layers")
    assert task.full.train_last_layers == 0
    numbers = task.hyperparameters
    assert numbers.HasField("label_smoothing")
    assert numbers.HasField("neftune_alpha")
    assert (numbers.label_smoothing, numbers.neftune_alpha) == (0.0, 0.0)


def test_a_task_resolved_before_a_field_was_there_is_what_it_was() -> None:
    before = FineTuneTask(lora=Lora(rank=16, alpha=32, dropout=0, target_modules=["all-linear"]))
    specs.resolve_adaptation(before)
    assert before.lora == resolved(job()).lora


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"lora": Lora(lora_plus_ratio=0)}, "lora.lora_plus_ratio"),
        ({"lora": Lora(init=9)}, "lora.init"),  # type: ignore[arg-type]
        ({"full": Full(train_last_layers=-1)}, "full.train_last_layers"),
        ({"hyperparameters": Hyperparameters(label_smoothing=1)}, "hyperparameters.label_smoothing"),
        ({"hyperparameters": Hyperparameters(neftune_alpha=-1)}, "hyperparameters.neftune_alpha"),
    ],
)
def test_what_makes_no_sense_is_refused_by_its_field(fields: dict[str, object], field: str) -> None:
    (violation,) = specs.rule_violations(job(**fields))
    assert violation.field == f"fine_tune.{field}"


def test_dora_is_offered_on_nf4_and_not_on_int8() -> None:
    for quantization, refused in ((LoraQuantization.LORA_QUANTIZATION_NF4, 0), (3, 1)):
        spec = job(lora=Lora(use_dora=True, quantization=quantization))  # type: ignore[arg-type]
        assert [each.field for each in specs.cross_violations(spec)] == ["spec.fine_tune.lora.use_dora"] * refused


@pytest.mark.parametrize(("rank", "refused"), [(None, False), (8, False), (7, True)])
def test_an_orthogonal_start_needs_an_even_rank(rank: int | None, refused: bool) -> None:
    spec = job(lora=Lora(init=LoraInit.LORA_INIT_ORTHOGONAL, rank=rank))
    assert [each.field for each in specs.cross_violations(spec)] == ["spec.fine_tune.lora.init"] * refused
