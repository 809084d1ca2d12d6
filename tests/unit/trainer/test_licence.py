"""What a base model's own files say of its licence, and what is not taken for it."""

import json
from pathlib import Path

import pytest

from luthier.trainer.v1.task_pb2 import BaseModelSource
from luthier_trainer.inspect import BUILTIN
from luthier_trainer.licence import base_licence, licence_in, of_card, of_text


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlanguage: en\nlicense: Apache-2.0\n---\n# x", "apache-2.0"),
        ("---\nlicense: 'mit'\n---\n", "mit"),
        ("---\nlicense: other\nlicense_name: tongyi-qianwen\n---\n", "tongyi-qianwen"),
        ("---\nlicense: other\n---\n", "other"),
        ("# no metadata\nlicense: mit\n", ""),
        ("---\ntags: [a]\n---\nlicense: mit\n", ""),
        ("---\nlicense: [mit, apache-2.0]\n---\n", ""),
        ('---\nlicense: "mit\\n---\\n# <script>"\n---\n', ""),
        ("---\nlicense: " + "x" * 1000 + "\n---\n", ""),
        ("", ""),
    ],
)
def test_only_a_plain_identifier_in_a_cards_metadata_is_a_licence(card: str, licence: str) -> None:
    assert of_card(card) == licence


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        (
            "                                 Apache License\n                           Version 2.0, January 2004\n",
            "apache-2.0",
        ),
        ("MIT License\n\nCopyright (c) 2024 Somebody\n", "mit"),
        ("GNU LESSER GENERAL PUBLIC LICENSE\n Version 3, 29 June 2007", "lgpl-3.0"),
        ("SPDX-License-Identifier: BSD-3-Clause\n", "bsd-3-clause"),
        ("LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\n", "llama3.1"),
        ("All rights reserved. " * 40 + "MIT License", ""),
        ("You may do as you like.", ""),
    ],
)
def test_a_licences_text_is_known_by_its_beginning_and_by_nothing_else(text: str, licence: str) -> None:
    assert of_text(text) == licence


def test_the_card_comes_before_the_note_of_a_continued_model_and_that_before_a_text(tmp_path: Path) -> None:
    assert licence_in(tmp_path) == ""
    (tmp_path / "LICENSE").write_text("MIT License\n")
    assert licence_in(tmp_path) == "mit"
    (tmp_path / "luthier.json").write_text(json.dumps({"base_model": {"licence": "gemma"}}))
    assert licence_in(tmp_path) == "gemma"
    (tmp_path / "README.md").write_text("---\nlicense: llama3\n---\n")
    assert licence_in(tmp_path) == "llama3"
    for broken in ("[]", "{", '{"base_model": 7}', '{"base_model": {"licence": "two words"}}'):
        (tmp_path / "README.md").unlink(missing_ok=True)
        (tmp_path / "luthier.json").write_text(broken)
        assert licence_in(tmp_path) == "mit"


def test_the_built_in_model_tells_its_licence_and_a_hub_that_gives_nothing_tells_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert base_licence(BaseModelSource(location=str(BUILTIN / "tiny")), "") == "apache-2.0"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert base_licence(BaseModelSource(location="nobody/has-this", is_hub=True), "") == ""


def test_the_card_of_a_base_from_the_hub_is_that_of_the_commit_that_was_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--base"
    for commit, licence in (("a" * 40, "mit"), ("b" * 40, "gemma")):
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("b" * 40)
    source = BaseModelSource(location="owner/base", is_hub=True)
    assert (base_licence(source, "a" * 40), base_licence(source, "")) == ("mit", "gemma")
