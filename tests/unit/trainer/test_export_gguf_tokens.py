"""GGUF vocabularies: llama.cpp makes the tokens of the tokenizer that the model was trained with, or is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGUFReader
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from unit.trainer.gguf_models import TINY, byte_level, fast, random_model, saved, sentence_pieces, small, written

from luthier_trainer.data.masks import templates
from luthier_trainer.data.masks.template import template_of
from luthier_trainer.errors import TrainingError
from luthier_trainer.export.gguf.modelfile import go_template
from luthier_trainer.export.gguf.tokenizer import for_others
from luthier_trainer.export.gguf.tokens import proven
from luthier_trainer.export.gguf.vocabulary import Vocabulary, read
from luthier_trainer.export.source import Tuned
from luthier_trainer.stop import never

_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)


def _proven(tokenizer: PreTrainedTokenizerBase, rows: int = 0) -> Vocabulary:
    return proven(read(tokenizer, rows or len(tokenizer), {"eos": 0}, ""), tokenizer, never)


@pytest.mark.parametrize("rule", ["llama-bpe", "qwen2", "smollm"])
def test_the_rule_by_which_texts_are_cut_is_found(rule: str) -> None:
    found = _proven(byte_level(rule))
    assert found.pre == rule
    assert not found.notes


def test_the_shipped_models_rule_is_found_and_proven() -> None:
    found = _proven(AutoTokenizer.from_pretrained(TINY))
    assert (found.model, found.pre, found.add_bos) == ("gpt2", "gpt-2", False)


def test_a_rule_that_llama_cpp_has_nearly_is_taken_with_a_note() -> None:
    found = _proven(byte_level("tekken", 2000))
    assert found.pre == "tekken"
    assert "combining marks" in found.notes[0]


@pytest.mark.parametrize("prefix", [True, False])
def test_pieces_are_made_in_the_same_order_and_with_the_same_spaces(prefix: bool) -> None:
    found = _proven(sentence_pieces(prefix, ["<start_of_turn>", "##"]))
    assert (found.model, found.add_bos, found.add_eos, found.add_space_prefix) == ("llama", True, False, prefix)
    assert found.special["bos"] == 1
    assert found.types[-2:] == (3, 4)  # control, and one that texts may have


def test_an_entry_that_the_tokenizer_itself_never_makes_is_not_held_against_llama_cpp() -> None:
    parsed = json.loads(byte_level("qwen2", 400).backend_tokenizer.to_str())
    parsed["model"]["vocab"]["ï¥¾"] = 400  # U+F97E, which the normalizer composes to U+91CF
    assert _proven(fast(Tokenizer.from_str(json.dumps(parsed)), eos_token="<|end|>")).pre == "qwen2"


def test_rows_without_a_token_and_tokens_without_a_row_do_no_harm() -> None:
    tokenizer = small()
    assert _proven(tokenizer, 410).tokens[-1] == "[PAD409]"

    more = byte_level("qwen2", 400)
    more.add_tokens(["<|never trained|>"], special_tokens=True)
    assert len(_proven(more, 400).tokens) == 400


def test_words_that_no_rule_of_llama_cpp_cuts_so_are_refused_with_the_first_text() -> None:
    parsed = Tokenizer.from_str(small().backend_tokenizer.to_str())
    parsed.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("e", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    with pytest.raises(TrainingError, match=r"of .* it makes \d+ .* where the tokenizer makes \d+") as refused:
        _proven(fast(parsed, eos_token="<|end|>"))
    assert refused.value.reason == "EXPORT_UNSUPPORTED"


def _words() -> PreTrainedTokenizerBase:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    return fast(tokenizer, unk_token="<unk>")


def _unigram() -> PreTrainedTokenizerBase:
    return fast(Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0, False)))


@pytest.mark.parametrize(("make", "named"), [(_words, "WordLevel"), (_unigram, "Unigram")])
def test_kinds_of_tokenizers_that_are_not_written_are_refused(
    make: Callable[[], PreTrainedTokenizerBase], named: str
) -> None:
    with pytest.raises(TrainingError, match=named):
        _proven(make())


def test_the_token_that_ends_a_turn_is_in_the_file_beside_the_one_that_ends_texts(tmp_path: Path) -> None:
    tuned = saved(random_model("llama"), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tuned.directory)
    tokens = tokenizer.convert_ids_to_tokens([50, 51])
    tokenizer.add_tokens(tokens, special_tokens=True)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = _CHATML
    tokenizer.save_pretrained(tmp_path / "model")
    model = random_model("llama", vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "model")

    file = written(Tuned(tuned.directory, tuned.directory, None, "model_1"), tmp_path / "export")

    fields = {name: field.contents() for name, field in GGUFReader(file).fields.items()}
    assert fields["tokenizer.ggml.eos_token_id"] == 0
    assert fields["tokenizer.ggml.eot_token_id"] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert fields["tokenizer.chat_template"] == _CHATML
    modelfile = (tmp_path / "export" / "Modelfile").read_text()
    assert f"FROM ./{file.name}\n" in modelfile
    assert 'PARAMETER stop "<|im_end|>"\n' in modelfile
    assert 'PARAMETER stop "<|end|>"\n' in modelfile
    assert "<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>" in modelfile


def test_other_programs_get_a_template_without_blocks_that_only_trainers_know() -> None:
    source = "a{%- generation %}b{% endgeneration -%} c {%generation%}d{%+ endgeneration %}"
    assert for_others(source) == "a{%- if true %}b{% endif -%} c {% if true %}d{%+ endif %}"


def _with(template: str) -> PreTrainedTokenizerFast:
    tokenizer = fast(small().backend_tokenizer, eos_token="</s>", bos_token="<s>")
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("name", "begins"),
    [
        ("chatml", "{{- range .Messages }}<|im_start|>"),
        ("qwen", "{{- range .Messages }}<|im_start|>"),
        ("llama-3", "{{- range .Messages }}<|start_header_id|>"),
        ("gemma", "{{- range $i, $turn := .Messages }}"),
        ("mistral", '{{- range $i, $turn := .Messages }}{{ if eq $turn.Role "user" }}[INST] '),
    ],
)
def test_ollama_gets_a_template_for_each_layout_that_luthier_brings(name: str, begins: str) -> None:
    found = go_template(template_of(_with(templates.NAMED[name].source)))
    assert found is not None
    assert found.startswith(begins)


def test_a_system_turn_that_the_models_template_adds_is_added_for_ollama_too() -> None:
    rule = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.\nAlways.<|im_end|>\n{% endif %}"
    found = go_template(template_of(_with(rule + _CHATML)))
    assert found is not None
    assert found.startswith("{{- if not .System }}<|im_start|>system\nBe kind.\nAlways.<|im_end|>\n{{ end }}{{- range")


def test_a_template_of_no_known_layout_is_left_to_the_file() -> None:
    assert go_template(template_of(_with("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"))) is None
