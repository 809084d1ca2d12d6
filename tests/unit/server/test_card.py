"""Model cards: what the Hub and a reader see, also of words that were chosen to be seen as something else."""

import ast
import dataclasses
import re
from typing import Any

import pytest
import yaml
from google.protobuf import json_format
from markdown_it import MarkdownIt

from luthier.v1.job_pb2 import JobSpec
from luthier_server.card import Form, Subject, TrainingData, card, code, quoted, text
from luthier_server.store.models import Model, Version

SPEC = json_format.ParseDict(
    {
        "fine_tune": {
            "base_model": "Qwen/Qwen2.5-0.5B",
            "lora": {"rank": 8, "alpha": 16, "target_modules": ["all-linear"], "init": "LORA_INIT_KAIMING"},
            "hyperparameters": {"learning_rate": 2e-4, "lr_scheduler": "LR_SCHEDULER_COSINE", "batch_size": 16},
            "tokenization": {"train_on": "TRAIN_ON_ASSISTANT"},
        }
    },
    JobSpec(),
)
HOSTILE = (
    '"\n---\nlicense: mit\n---\n# Owned\n```\nimport os\n``` <script>alert(1)</script> [x](javascript:1) | a | '
    "![i](http://evil) \u2028 \x00 \x85 \ud800 `code` \\ *b* {{7*7}} \U0001f600"
)


def a_model(**fields: Any) -> Model:
    model = Model(
        id="model_01ARZ3NDEKTSV4RRFFQ69G5FAV",
        tenant="default",
        name="Qwen2.5-0.5B-support",
        job_id="job_01ARZ3NDEKTSV4RRFFQ69G5FAV",
        base_model="Qwen/Qwen2.5-0.5B",
        adaptation="lora",
        step=200,
        size_bytes=10,
        metrics={"train_loss": 1.25, "eval_loss": 1.5},
        create_time=1,
        training_dataset="ds_1",
        validation_dataset="",
        base_model_revision="0123abc",
        base_licence="apache-2.0",
        resolved_spec=SPEC,
        versions=(Version("support-bot", 3, "model_01ARZ3NDEKTSV4RRFFQ69G5FAV", 1),),
    )
    return dataclasses.replace(model, **fields)


def a_subject(model: Model, **fields: Any) -> Subject:
    subject = Subject(
        model,
        {
            "base_model": {"hub_id": "Qwen/Qwen2.5-0.5B"},
            "chat_template_sha256": "ab" * 32,
            "libraries": {"torch": "2.9.0", "peft": "0.18.0"},
        },
        base="Qwen/Qwen2.5-0.5B",
        data=[TrainingData("training", "ds_1", "cards@3", "cd" * 32, 1234, "owner/cards")],
    )
    return dataclasses.replace(subject, **fields)


def metadata(markdown: str) -> dict[str, Any]:
    """The front matter, as the Hub reads it: between the first line and the next one that is `---`."""
    lines = markdown.split("\n")
    assert lines[0] == "---"
    end = lines.index("---", 1)
    found = yaml.safe_load("\n".join(lines[1:end]))
    assert isinstance(found, dict)
    return found


def programs(markdown: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", markdown, re.MULTILINE | re.DOTALL)


def html(markdown: str) -> str:
    body = markdown.split("\n---\n", 1)[1]
    return str(MarkdownIt("commonmark", {"html": True}).enable("table").render(body))


def test_an_adapters_card_has_what_the_hub_reads_and_what_a_reader_asks() -> None:
    markdown = card(a_subject(a_model(description="Answers questions.", tags={"team": "search"})), Form.ADAPTER)
    assert metadata(markdown) == {
        "base_model": "Qwen/Qwen2.5-0.5B",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "datasets": ["owner/cards"],
        "tags": ["luthier", "sft", "lora"],
    }
    (program,) = programs(markdown)
    ast.parse(program)
    assert "PeftModel.from_pretrained" in program
    assert "revision='0123abc'" in program
    facts = (
        "rank 8",
        "cards@3",
        "1,234",
        "cd" * 32,
        "0.0002",
        "cosine",
        "1.25",
        "1.5",
        "ab" * 32,
        "2.9.0",
        "support-bot@3",
    )
    for fact in (*facts, "Answers questions", "team", "search"):
        assert fact in html(markdown), fact


def test_a_whole_models_card_is_for_transformers_and_a_gguf_files_for_llama_cpp() -> None:
    whole = card(a_subject(a_model(adaptation="full", resolved_spec=None)), Form.WHOLE)
    assert (metadata(whole)["library_name"], metadata(whole)["base_model_relation"]) == ("transformers", "finetune")
    assert "peft" not in programs(whole)[0]
    gguf = card(a_subject(a_model()), Form.GGUF)
    assert metadata(gguf)["library_name"] == "gguf"
    assert "llama.cpp" in gguf
    assert not programs(gguf)


def test_the_card_of_an_adapter_as_gguf_promises_no_merged_weights() -> None:
    markdown = card(a_subject(a_model()), Form.GGUF_ADAPTER)
    assert "merged" not in markdown
    assert "llama-cli -m BASE.gguf --lora FILE.gguf" in markdown
    assert metadata(markdown)["base_model_relation"] == "adapter"
    assert metadata(markdown)["library_name"] == "gguf"


def test_a_base_that_is_not_on_the_hub_is_not_linked_and_an_unknown_licence_is_named() -> None:
    made: dict[str, Any] = {"base_model": {"hub_id": ""}}
    markdown = card(
        a_subject(a_model(base_licence="My-Own Licence"), base="builtin/tiny", made=made, data=[]), Form.ADAPTER
    )
    found = metadata(markdown)
    assert "base_model" not in found
    assert "datasets" not in found
    assert (found["license"], found["license_name"]) == ("other", "my-own-licence")
    assert "huggingface.co" not in markdown
    assert "license" not in metadata(card(a_subject(a_model(base_licence="")), Form.ADAPTER))


def test_a_card_does_not_tell_where_the_server_keeps_its_models() -> None:
    made: dict[str, Any] = {"base_model": {"hub_id": "", "name": "/srv/secret/my-model"}}
    model = a_model(base_model="/srv/secret/my-model")
    markdown = card(a_subject(model, base="/srv/secret/my-model/", made=made), Form.ADAPTER)
    assert "my-model" in markdown
    assert "secret" not in markdown


@pytest.mark.parametrize("form", list(Form))
def test_hostile_words_stay_words_wherever_they_stand(form: Form) -> None:
    spec = JobSpec()
    spec.CopyFrom(SPEC)
    spec.fine_tune.lora.target_modules[:] = [HOSTILE.encode(errors="replace").decode()]
    model = a_model(
        name=HOSTILE,
        description="1. " + HOSTILE,
        base_model=HOSTILE,
        base_model_revision=HOSTILE,
        base_licence=HOSTILE,
        metrics={HOSTILE: 1.0, "loss": float("nan")},
        tags={HOSTILE: HOSTILE},
        versions=(Version(HOSTILE, 1, HOSTILE, 1),),
        resolved_spec=spec,
    )
    made = {
        "base_model": {"hub_id": HOSTILE},
        "chat_template_sha256": HOSTILE,
        "libraries": {HOSTILE: HOSTILE},
        "learning_rate": "x",
    }
    data = [TrainingData("training", HOSTILE, HOSTILE, HOSTILE, 0, HOSTILE)]
    markdown = card(Subject(model, made, HOSTILE, data, parents=[HOSTILE]), form)
    markdown.encode()
    found = metadata(markdown)
    assert set(found) == {"library_name", "license", "license_name", "pipeline_tag", "tags"}
    assert found["license"] == "other"
    assert re.fullmatch(r"[a-z0-9.-]+", found["license_name"])
    for program in programs(markdown):
        names = {node.module for node in ast.walk(ast.parse(program)) if isinstance(node, ast.ImportFrom)}
        assert names <= {"peft", "transformers"}
        assert not [node for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Import)]
    rendered = html(markdown)
    assert rendered.count("<h1>") == 1
    assert not re.search(r"<(script|img|ol|ul|li|strong|em)\b", rendered)
    assert not re.search(r'href="(?!https://huggingface\.co/)', rendered)
    assert rendered.count("<pre>") == (form in (Form.ADAPTER, Form.WHOLE))
    assert "alert(1)" in rendered


@pytest.mark.parametrize(
    "value",
    [
        "plain",
        "",
        'a "quote" \\ back',
        "line\nbreak\r\ttab",
        "nul\x00 del\x7f nel\x85",
        "\u2028\ufeff\u00a0",
        "😀",
        ": #&*!",
    ],
)
def test_a_quoted_text_is_read_back_by_yaml_as_it_was_written(value: str) -> None:
    assert yaml.safe_load(f"key: {quoted(value)}") == {"key": value}
    assert "\n" not in quoted(value)


def test_names_are_code_spans_only_where_nothing_in_them_has_a_meaning() -> None:
    assert code("support-bot@3") == "`support-bot@3`"
    assert code("a`b") == "a\\`b"
    assert text("- item") == "\\- item"
    assert text("1. item") == "1\\. item"
