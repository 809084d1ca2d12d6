"""The template a job trains with is the one that its checkpoints and its model carry."""

import json
from pathlib import Path

import pytest
from fidelity.jobs import Recorder, StopAfter, chats, task, tiny_base
from transformers import AutoTokenizer

from luthier.trainer.v1 import report_pb2
from luthier.v1 import event_pb2, tokenization_pb2
from luthier_trainer import fine_tune, sft
from luthier_trainer.control import NoControl
from luthier_trainer.data.masks.render import template_sha256
from luthier_trainer.data.masks.template import template_of
from luthier_trainer.errors import TrainingError

GIVEN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}: {% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)


def test_a_given_template_is_in_the_checkpoints_and_the_model_with_its_generation_blocks(tmp_path: Path) -> None:
    base = tiny_base(tmp_path)
    request = task(tmp_path, base, chats(tmp_path / "chats.jsonl"), max_steps=4)
    request.spec.fine_tune.tokenization.chat_template = GIVEN
    assert isinstance(sft.train(request, Recorder(), NoControl()), report_pb2.Finished)
    lineage = json.loads((tmp_path / "model" / "luthier.json").read_text())
    for folder in (tmp_path / "model", tmp_path / "checkpoints" / "000002-a1"):
        saved = AutoTokenizer.from_pretrained(folder)
        assert saved.get_chat_template() == GIVEN
        assert template_sha256(saved, template_of(saved)) == lineage["chat_template_sha256"]
    assert lineage["tokenization"]["train_on"] == "TRAIN_ON_ASSISTANT"
    assert lineage["mask_method"] == "generation blocks"
    assert "reading" in lineage["training_dataset"]


def test_a_models_own_template_is_saved_as_it_was(tmp_path: Path) -> None:
    base = tiny_base(tmp_path)
    sft.train(task(tmp_path, base, chats(tmp_path / "chats.jsonl"), max_steps=1), Recorder(), NoControl())
    before, after = (AutoTokenizer.from_pretrained(each).get_chat_template() for each in (base, tmp_path / "model"))
    assert after == before


def test_a_job_does_not_go_on_with_another_template(tmp_path: Path) -> None:
    base = tiny_base(tmp_path)
    recorder = Recorder()
    request = task(tmp_path, base, chats(tmp_path / "chats.jsonl"), max_steps=6)
    end = sft.train(request, recorder, StopAfter(recorder, 2))
    assert isinstance(end, report_pb2.Stopped)
    request.attempt, request.resume_from = 2, str(tmp_path / "checkpoints" / end.checkpoint)
    request.spec.fine_tune.tokenization.chat_template = GIVEN
    with pytest.raises(TrainingError) as caught:
        sft.train(request, Recorder(), NoControl())
    assert caught.value.reason == "CHECKPOINT_MISMATCH"


def test_a_job_with_a_given_template_resumes_bit_by_bit(tmp_path: Path) -> None:
    base = tiny_base(tmp_path)
    data = chats(tmp_path / "chats.jsonl")
    losses: list[list[float]] = []
    for name in ("straight", "stopped"):
        request = task(tmp_path / name, base, data, max_steps=6, dropout=0.1)
        request.spec.fine_tune.tokenization.chat_template = GIVEN
        recorder = Recorder()
        if name == "stopped":
            end = sft.train(request, recorder, StopAfter(recorder, 3))
            assert isinstance(end, report_pb2.Stopped)
            request.attempt, request.resume_from = 2, str(tmp_path / name / "checkpoints" / end.checkpoint)
        sft.train(request, recorder, NoControl())
        losses.append([each.loss for each in recorder.steps()])
    assert losses[0] == losses[1]


def test_fine_tuning_in_one_line_takes_columns_a_named_template_and_a_policy(tmp_path: Path) -> None:
    data = tmp_path / "rows.csv"
    data.write_text("question,answer\n" + "".join(f"What is {n}?,It is {n}.\n" for n in range(6)))
    recorder = Recorder()
    fine_tune(
        str(tiny_base(tmp_path)),
        data,
        tmp_path / "out",
        columns={"prompt": "question", "completion": "answer"},
        chat_template="chatml",
        train_on="last_turn",
        overlong="error",
        max_steps=2,
        batch_size=2,
        reporter=recorder,
    )
    (plan,) = [each for each in recorder.reports if isinstance(each, event_pb2.PlanResolved)]
    assert plan.training_rows == 6
    lineage = json.loads((tmp_path / "out" / "luthier.json").read_text())
    assert lineage["tokenization"] == {"train_on": "TRAIN_ON_LAST_TURN", "overlong": "OVERLONG_ERROR"}
    assert lineage["training_dataset"]["reading"] == {
        "file_format": "FILE_FORMAT_CSV",
        "format": "DATASET_FORMAT_PROMPT_COMPLETION",
        "columns": {"prompt": "question", "completion": "answer"},
    }


def test_texts_are_fine_tuned_without_a_chat_template_and_sampled_as_texts(tmp_path: Path) -> None:
    base = tiny_base(tmp_path)
    (base / "chat_template.jinja").unlink()
    tokens = json.loads((base / "tokenizer.json").read_text())
    for token in tokens["added_tokens"]:
        token["content"] = token["content"].replace("<|im_start|>", "<|begins|>")
    (base / "tokenizer.json").write_text(json.dumps(tokens).replace("<|im_start|>", "<|begins|>"))
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(config).replace("<|im_start|>", "<|begins|>"))
    assert AutoTokenizer.from_pretrained(base).chat_template is None
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": "one two three four " * n}) + "\n" for n in range(1, 40)))
    recorder = Recorder()
    fine_tune(str(base), data, tmp_path / "out", max_steps=2, max_length=64, sample_prompts=["one"], reporter=recorder)
    (plan,) = [each for each in recorder.reports if isinstance(each, event_pb2.PlanResolved)]
    assert any("were split" in note for note in plan.notes)
    (first, _) = [each for each in recorder.reports if isinstance(each, event_pb2.SamplesGenerated)]
    assert first.samples[0].prompt == "one"
    lineage = json.loads((tmp_path / "out" / "luthier.json").read_text())
    assert lineage["chat_template_sha256"] == ""
    assert lineage["tokenization"] == {"train_on": "TRAIN_ON_ALL_TOKENS", "overlong": "OVERLONG_SPLIT"}
    with pytest.raises(TrainingError) as caught:
        fine_tune(str(base), chats(tmp_path / "chats.jsonl"), tmp_path / "other", max_steps=1, reporter=Recorder())
    assert caught.value.reason == "TEMPLATE_MISSING"


def test_an_unset_tokenization_is_the_models_own_template_and_the_assistants_turns(tmp_path: Path) -> None:
    request = task(tmp_path, tiny_base(tmp_path), chats(tmp_path / "chats.jsonl"), max_steps=1)
    assert request.spec.fine_tune.tokenization == tokenization_pb2.Tokenization()
    sft.train(request, Recorder(), NoControl())
    lineage = json.loads((tmp_path / "model" / "luthier.json").read_text())
    assert lineage["tokenization"] == {"train_on": "TRAIN_ON_ASSISTANT", "overlong": "OVERLONG_TRUNCATE"}
