"""`fine_tune()` has every option of a job."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from fidelity.jobs import Recorder, chats, tiny_base

from luthier.v1 import event_pb2
from luthier.v1.job_pb2 import Evaluation, Full, Hyperparameters, Lora
from luthier_trainer import fine_tune

# Of the server (rules, retries, several devices), or decided for a process of one's own.
ELSEWHERE = {
    "auto",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "warmup_steps",
    "attn_implementation",
    "log_every",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "every_steps",
    "every_epochs",
    "early_stopping",
}


def test_every_field_that_says_how_to_train_is_an_option() -> None:
    options = set(inspect.signature(fine_tune).parameters)
    fields = {field.name for kind in (Hyperparameters, Lora, Full, Evaluation) for field in kind.DESCRIPTOR.fields}
    assert fields - ELSEWHERE <= options


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, Path]:
    return str(tiny_base(tmp_path)), chats(tmp_path / "chats.jsonl")


def lineage(folder: Path) -> Any:
    return json.loads((folder / "luthier.json").read_text())


def test_the_options_of_an_adapter_reach_it(files: tuple[str, Path], tmp_path: Path) -> None:
    base, data = files
    recorder = Recorder()
    made = fine_tune(
        base,
        data,
        tmp_path / "out",
        validation_fraction=0.3,
        max_steps=3,
        batch_size=4,
        rank=4,
        use_rslora=True,
        init="gaussian",
        lora_plus_ratio=4.0,
        label_smoothing=0.1,
        neftune_alpha=5.0,
        lr_scheduler="warmup_stable_decay",
        decay_ratio=0.5,
        min_learning_rate_ratio=0.1,
        evaluate_every_steps=1,
        early_stopping_patience=2,
        early_stopping_min_delta=100.0,
        keep_best=True,
        sample_prompts=["Count 1."],
        sample_max_tokens=2,
        samples_at="each_evaluation",
        find_learning_rate=True,
        reporter=recorder,
    )
    spec = lineage(made.directory)["spec"]["fine_tune"]
    expected = {"use_rslora": True, "init": "LORA_INIT_GAUSSIAN", "lora_plus_ratio": 4.0}
    assert expected.items() <= spec["lora"].items()
    numbers = {"label_smoothing": 0.1, "neftune_alpha": 5.0, "decay_ratio": 0.5, "min_learning_rate_ratio": 0.1}
    assert numbers.items() <= spec["hyperparameters"].items()
    config = json.loads((made.directory / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["r"]) == (True, 4)
    (found,) = [each for each in recorder.reports if isinstance(each, event_pb2.LearningRateFound)]
    assert lineage(made.directory)["learning_rate"] == found.learning_rate
    # 100 better than the first: never. Step 3 is the last, so stopping early changes nothing but is counted.
    samples = [each.step for each in recorder.reports if isinstance(each, event_pb2.SamplesGenerated)]
    assert samples[:3] == [0, 1, 2]
    assert made.metrics["best_step"] >= 1


def test_the_last_layers_alone_are_trained(files: tuple[str, Path], tmp_path: Path) -> None:
    base, data = files
    made = fine_tune(base, data, tmp_path / "out", adaptation="full", train_last_layers=1, max_steps=1)
    assert lineage(made.directory)["spec"]["fine_tune"]["full"] == {"train_last_layers": 1}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"learning_rate": 1e-3, "find_learning_rate": True}, "not both"),
        ({"keep_best": True}, "evaluations need data"),
        ({"early_stopping_patience": 2}, "evaluations need data"),
    ],
)
def test_options_that_make_no_sense_together_are_refused(
    files: tuple[str, Path], tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    base, data = files
    with pytest.raises(ValueError, match=words):
        fine_tune(base, data, tmp_path / "out", **options)
