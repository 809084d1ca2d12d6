"""GGUF files: llama.cpp computes what transformers computes, and quantises to the same bytes."""

import filecmp
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cyllama.llama.llama_cpp as llama_cpp
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from peft import LoraConfig, get_peft_model
from unit.trainer.gguf_models import (
    FAMILIES,
    TINY,
    by_llama_cpp,
    expected,
    random_model,
    saved,
    some_tokens,
    written,
)

from luthier.v1.export_task_pb2 import GGUF_TYPE_Q4_K_M, GgufExport
from luthier_trainer.errors import TrainingError
from luthier_trainer.export import gguf
from luthier_trainer.export.source import Tuned
from luthier_trainer.stop import StopRequested, never

_ROUNDING = 0.05
"""llama.cpp rounds activations to 16 bits before it multiplies: 0.03 at most, in log-probabilities whose spread is 1.6.
A fault of any kind is 1 and more."""
_FILE_TYPES = {"Q8_0": 7, "Q6_K": 18, "Q5_K_M": 17, "Q4_K_M": 15, "Q3_K_M": 12, "Q2_K": 10}
_BLOCKS = {"hidden_size": 256, "intermediate_size": 256}


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_what_transformers_does_for_every_family(family: str, tmp_path: Path) -> None:
    model = random_model(family)
    ids = some_tokens()

    file = written(saved(model, tmp_path / "model"), tmp_path / "export")

    found, wanted = by_llama_cpp(file, ids, tmp_path / "model"), expected(model, ids)
    assert np.abs(found - wanted).max() < _ROUNDING
    assert (found.argmax(-1) == wanted.argmax(-1)).mean() > 0.95


@pytest.mark.parametrize(
    ("family", "changes", "kinds"),
    [
        (
            "llama",
            {**_BLOCKS, "num_hidden_layers": 8, "num_key_value_heads": 1},
            ("Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K"),
        ),
        ("qwen-2", {**_BLOCKS, "num_hidden_layers": 3, "tie_word_embeddings": True}, _FILE_TYPES),
        ("llama", {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3}, _FILE_TYPES),
        ("gemma-3", {**_BLOCKS, "head_dim": 64}, ("Q4_K_M",)),
    ],
    ids=["four heads share one", "tied", "rows that are no blocks", "gemma"],
)
def test_quantised_files_are_byte_for_byte_llama_cpps_own(
    family: str, changes: dict[str, Any], kinds: Iterable[str], tmp_path: Path
) -> None:
    tuned = saved(random_model(family, **changes), tmp_path / "model")
    source = written(tuned, tmp_path / "export")

    for kind in kinds:
        ours, theirs = written(tuned, tmp_path / "export", kind), tmp_path / "oracle.gguf"
        _quantised(source, theirs, _FILE_TYPES[kind])
        assert filecmp.cmp(ours, theirs, shallow=False), kind


def test_rows_that_are_no_blocks_are_told_of(tmp_path: Path) -> None:
    tuned = saved(random_model("llama", hidden_size=192, intermediate_size=288), tmp_path / "model")
    written(tuned, tmp_path / "export", "Q4_K_M")
    assert "cannot be cut into the blocks of Q4_K_M" in (tmp_path / "export" / "Modelfile").read_text()


@pytest.mark.parametrize(("family", "rslora"), [("llama-tied", False), ("gemma-2", True), ("qwen-2", False)])
def test_an_adapter_alone_does_in_llama_cpp_what_it_does_in_peft(family: str, rslora: bool, tmp_path: Path) -> None:
    model = random_model(family)
    base = saved(model, tmp_path / "base")
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", use_rslora=rslora))
    torch.manual_seed(1)
    for name, each in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(each, std=0.1)
    peft.save_pretrained(str(tmp_path / "adapter"))
    tuned = Tuned(base.directory, base.directory, tmp_path / "adapter", "model_2", "builtin/tiny")
    ids = some_tokens()

    adapter = written(tuned, tmp_path / "export", adapter_only=True)
    found = by_llama_cpp(written(base, tmp_path / "base-export"), ids, base.directory, adapter)

    wanted = expected(peft, ids)
    assert np.abs(found - wanted).max() < _ROUNDING
    assert np.abs(expected(random_model(family), ids) - wanted).max() > 10 * _ROUNDING
    assert f"ADAPTER ./{adapter.name}" in (tmp_path / "export" / "Modelfile").read_text()

    merged = by_llama_cpp(written(tuned, tmp_path / "merged"), ids, base.directory)
    assert np.abs(merged - wanted).max() < _ROUNDING


@pytest.mark.parametrize(
    ("options", "named"),
    [({"use_dora": True}, "use_dora"), ({"modules_to_save": ["lm_head"]}, "modules_to_save")],
)
def test_an_adapter_that_llama_cpp_would_load_in_part_is_refused(
    options: dict[str, Any], named: str, tmp_path: Path
) -> None:
    base = saved(random_model("llama"), tmp_path / "base")
    peft = get_peft_model(random_model("llama"), LoraConfig(target_modules=["q_proj"], **options))
    peft.save_pretrained(str(tmp_path / "adapter"))
    tuned = Tuned(base.directory, base.directory, tmp_path / "adapter", "model_2")

    with pytest.raises(TrainingError, match=named) as refused:
        gguf.require(tuned, GgufExport(adapter_only=True))
    assert refused.value.reason == "EXPORT_UNSUPPORTED"


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_an_adapter_of_a_head_that_a_tied_base_does_not_have_is_refused(tmp_path: Path) -> None:
    base = saved(random_model("llama", tie_word_embeddings=True), tmp_path / "base")
    peft = get_peft_model(
        random_model("llama", tie_word_embeddings=True), LoraConfig(target_modules=["q_proj", "lm_head"])
    )
    peft.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    tuned = Tuned(base.directory, base.directory, tmp_path / "adapter", "model_2")

    with pytest.raises(TrainingError, match="changes the head") as refused:
        gguf.require(tuned, GgufExport(adapter_only=True))
    assert refused.value.reason == "EXPORT_UNSUPPORTED"


def test_a_bases_name_brings_no_instructions_into_a_modelfile(tmp_path: Path) -> None:
    base = saved(random_model("llama"), tmp_path / "base")
    peft = get_peft_model(random_model("llama"), LoraConfig(target_modules=["q_proj"]))
    peft.save_pretrained(str(tmp_path / "adapter"))
    tuned = Tuned(base.directory, base.directory, tmp_path / "adapter", "model_2", "x\nFROM elsewhere")

    written(tuned, tmp_path / "export", adapter_only=True)

    lines = (tmp_path / "export" / "Modelfile").read_text().splitlines()
    assert [each for each in lines if each.startswith("FROM")] == ["FROM ./base.gguf"]


def test_the_file_names_its_base_and_what_made_it(tmp_path: Path) -> None:
    file = written(saved(random_model("llama"), tmp_path / "model"), tmp_path / "export")
    fields = {name: field.contents() for name, field in GGUFReader(file).fields.items()}

    assert fields["general.architecture"] == "llama"
    assert fields["general.base_model.0.name"] == "tiny"
    assert fields["general.base_model.0.repo_url"] == "https://huggingface.co/someone/tiny"
    assert fields["general.license"] == "apache-2.0"
    assert fields["luthier.model"] == "model_1"
    assert fields["tokenizer.ggml.eos_token_id"] == 0


def test_a_number_beyond_16_bits_is_no_infinity_in_the_file(tmp_path: Path) -> None:
    model = random_model("llama")
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight")[7, 7] = 1e5
    tuned = saved(model, tmp_path / "model")

    with pytest.raises(TrainingError, match=r"embed_tokens.*beyond 65,504") as refused:
        written(tuned, tmp_path / "export", "Q4_K_M")
    assert refused.value.reason == "EXPORT_UNSUPPORTED"
    assert "bf16" in refused.value.hint
    assert written(tuned, tmp_path / "export", "BF16").is_file()


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("gemma", {"tie_word_embeddings": False}, "lm_head"),
        ("gemma-2", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding window"),
        ("llama", {"hidden_act": "relu"}, "relu"),
        ("smollm-3", {"no_rope_layer_interval": 2}, "without positions"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    family: str, changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    tuned = saved(random_model(family, **changes), tmp_path / "model")
    with pytest.raises(TrainingError, match=named) as refused:
        gguf.require(tuned, GgufExport())
    assert refused.value.reason == "EXPORT_UNSUPPORTED"


def test_a_window_that_llama_cpp_does_not_compute_bounds_the_files_context(tmp_path: Path) -> None:
    file = written(saved(random_model("mistral"), tmp_path / "model"), tmp_path / "export")
    assert GGUFReader(file).fields["llama.context_length"].contents() == 128
    assert "no sliding window" in (tmp_path / "export" / "Modelfile").read_text()


def test_without_the_extra_the_export_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TrainingError, match="gguf and xllamacpp") as refused:
        gguf.require(Tuned(TINY, TINY, None, "model_1"), GgufExport())
    assert refused.value.reason == "EXPORT_UNSUPPORTED"
    assert "pip install 'luthier-trainer[gguf]'" in refused.value.hint


def test_a_stop_is_heard_within_a_tensor(tmp_path: Path) -> None:
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise StopRequested

    with pytest.raises(StopRequested):
        gguf.write(
            Tuned(TINY, TINY, None, "model_1"), GgufExport(type=GGUF_TYPE_Q4_K_M), tmp_path, lambda *_: None, check
        )


def test_progress_counts_the_bytes_of_the_tensors(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    gguf.write(
        Tuned(TINY, TINY, None, "model_1"),
        GgufExport(),
        tmp_path,
        lambda done, total: told.append((done, total)),
        never,
    )
    done = [each for each, _ in told]
    assert done == sorted(done)
    assert told[-1][0] == told[-1][1] > 8_000_000


def _quantised(source: Path, target: Path, file_type: int) -> None:
    options = llama_cpp.LlamaModelQuantizeParams()
    options.ftype = file_type
    options.nthread = 1
    llama_cpp.model_quantize(str(source), str(target), options)
