"""Job files and settings: what they may say, and how mistakes are told."""

from pathlib import Path

import pytest
from google.protobuf.descriptor import FieldDescriptor

from luthier.v1.job_pb2 import DTYPE_FLOAT32, LR_SCHEDULER_COSINE, FineTuneTask, JobSpec
from luthier_client.errors import SpecFileError
from luthier_client.spec import apply_settings, find_path, load_spec, parse_spec, spec_fields

WHOLE = """\
display_name: cards
labels: {team: search, run: 7}
max_retries: 2
fine_tune:
  base_model: builtin/tiny
  training_dataset: cards@3
  validation_fraction: .1
  sft: {}
  lora:
    rank: 8
    target_modules: [q_proj, v_proj]
    modules_to_save: lm_head
  hyperparameters:
    learning_rate: 1e-4
    lr_scheduler: cosine
    dtype: Float32
    max_steps: 1_000
  evaluation:
    sample_prompts:
    - Hello
    - "Who, are you?"
"""


def test_a_job_file_means_the_message_it_looks_like(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(WHOLE)
    spec = load_spec(path)
    expected = JobSpec(display_name="cards", labels={"team": "search", "run": "7"}, max_retries=2)
    task = FineTuneTask(base_model="builtin/tiny", training_dataset="cards@3", validation_fraction=0.1)
    task.sft.SetInParent()
    task.lora.rank = 8
    task.lora.target_modules.extend(["q_proj", "v_proj"])
    task.lora.modules_to_save.append("lm_head")
    # YAML 1.1 reads 1e-4 as a text, because it has no dot.
    task.hyperparameters.learning_rate = 1e-4
    task.hyperparameters.lr_scheduler = LR_SCHEDULER_COSINE
    task.hyperparameters.dtype = DTYPE_FLOAT32
    task.hyperparameters.max_steps = 1000
    task.evaluation.sample_prompts.extend(["Hello", "Who, are you?"])
    expected.fine_tune.CopyFrom(task)
    assert spec == expected


def test_a_spec_written_out_and_read_again_is_the_same() -> None:
    import yaml

    spec = parse_spec(WHOLE)
    written = yaml.safe_dump(spec_fields(spec), sort_keys=False)
    assert "lr_scheduler: cosine" in written
    assert parse_spec(written) == spec


def test_proto_json_with_its_camel_case_is_read_too() -> None:
    assert parse_spec('{"displayName": "x", "fineTune": {"baseModel": "b", "full": {}}}').fine_tune.base_model == "b"


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("fine_tune:\n  base_modle: x\n", "job.yaml:2", "did you mean 'base_model'?"),
        ("fine_tune: {}\nlearning_rate: 1\n", "job.yaml:2", "fine_tune.hyperparameters.learning_rate?"),
        ("fine_tune:\n  hyperparameters:\n    epochs: many\n", "job.yaml:3", "'many' is not a number"),
        ("fine_tune:\n  lora:\n    rank: 1.5\n", "job.yaml:3", "'1.5' is not a whole number"),
        ("fine_tune:\n  lora:\n    rank: 99999999999\n", "job.yaml:3", "too large"),
        ("fine_tune:\n  lora:\n    rank: [8]\n", "job.yaml:3", "a whole number, not a list"),
        ("fine_tune:\n  lora:\n    rank:\n", "job.yaml:3", "has no value"),
        ("fine_tune:\n  hyperparameters: {lr_scheduler: cosin}\n", "job.yaml:2", "cosine, linear, constant"),
        ("fine_tune:\n  lora: {}\n  full: {}\n", "job.yaml:3", "'full' and 'lora' exclude each other"),
        ("display_name: a\ndisplay_name: b\n", "job.yaml:2", "twice"),
        ("fine_tune: [1]\n", "job.yaml:1", "a mapping of fields, not a list"),
        ("labels: [a]\n", "job.yaml:1", "labels is a mapping"),
        ("a: b: c\n", "job.yaml:1", "mapping values"),
        ("- 1\n", "job.yaml:1", "a mapping of fields"),
    ],
)
def test_a_mistake_is_told_with_its_line_and_the_nearest_name(text: str, place: str, words: str) -> None:
    with pytest.raises(SpecFileError) as caught:
        parse_spec(text, "job.yaml")
    assert caught.value.violations[0][0] == place
    assert words in str(caught.value)


def test_all_mistakes_of_a_file_are_told_at_once() -> None:
    with pytest.raises(SpecFileError, match="and 2 more") as caught:
        parse_spec("fine_tun: {}\nlabels: 3\nmax_retries: x\n", "job.yaml")
    assert [place for place, _ in caught.value.violations] == ["job.yaml:1", "job.yaml:2", "job.yaml:3"]


def test_a_yaml_tag_makes_no_python_object() -> None:
    with pytest.raises(SpecFileError):
        parse_spec("fine_tune: !!python/object/apply:os.system [echo hi]\n")


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("rank", "fine_tune.lora.rank"),
        ("lora.rank", "fine_tune.lora.rank"),
        ("learning-rate", "fine_tune.hyperparameters.learning_rate"),
        ("evaluation.every_steps", "fine_tune.evaluation.every_steps"),
        ("full", "fine_tune.full"),
        ("labels.team", "labels.team"),
        ("display_name", "display_name"),
    ],
)
def test_a_key_may_be_any_end_that_fits_one_field(key: str, path: str) -> None:
    assert find_path(key) == path


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("every_steps=3", "fine_tune.evaluation.every_steps or fine_tune.checkpoints.every_steps"),
        ("rnk=3", "did you mean fine_tune.lora.rank?"),
        ("rank=x", "'x' is not a whole number"),
        ("rank", "expected KEY=VALUE"),
        ("dtype=int4", "none of float32, bfloat16"),
        ("lora=8", "has fields of its own"),
        ("target_modules=[a", "is no list"),
        ("labels=x", "labels"),
    ],
)
def test_a_setting_that_does_not_fit_says_why(setting: str, words: str) -> None:
    with pytest.raises(SpecFileError) as caught:
        apply_settings(JobSpec(), [setting])
    assert words in str(caught.value)


def test_settings_are_typed_by_their_field_and_go_on_top_of_the_file() -> None:
    spec = parse_spec(WHOLE)
    apply_settings(
        spec,
        ["rank=16", "hyperparameters.epochs=2", "lr_scheduler=linear", "labels.run=8", "sample_prompts=One, two?",
         "sample_prompts=[three, 'fo,ur']", "suffix=007"],
    )  # fmt: skip
    task = spec.fine_tune
    assert (task.lora.rank, task.hyperparameters.epochs, task.hyperparameters.lr_scheduler) == (16, 2.0, 2)
    assert list(task.evaluation.sample_prompts) == ["One, two?", "three", "fo,ur"]
    assert (dict(spec.labels), task.suffix) == ({"team": "search", "run": "8"}, "007")
    apply_settings(spec, ["full="])
    assert task.HasField("full") and not task.HasField("lora")


def test_every_field_of_the_contract_can_be_set_by_its_full_path() -> None:
    from luthier_client.spec import field_paths, is_map

    values = {"enum": "1", "text": "x"}
    for path, field in field_paths(JobSpec.DESCRIPTOR):
        spec = JobSpec()
        key = f"{path}.key" if is_map(field) else path
        if field.enum_type is not None:
            value = field.enum_type.values[1].name
        elif field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
            value = "true"
        else:
            value = "" if field.message_type is not None and not is_map(field) else values["enum"]
        apply_settings(spec, [f"{key}={value}"])
        assert spec != JobSpec(), path
