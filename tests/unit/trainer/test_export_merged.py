"""A merged model's files: their sizes, what lies beside the weights, and what is refused."""

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fidelity.exports import F32, IDS, loaded_logits, merged, peft_logits, tuned
from fidelity.tiny import llama
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from luthier.trainer.v1.task_pb2 import BaseModelSource, ExportWork, TrainerTask
from luthier.v1 import export_task_pb2
from luthier.v1.export_task_pb2 import MergedExport
from luthier_trainer.data.masks.template import CHATML
from luthier_trainer.errors import TrainingError
from luthier_trainer.export.adapter import write_adapter
from luthier_trainer.export.merge import merged_weights
from luthier_trainer.export.quantized import write_nf4
from luthier_trainer.export.source import Tuned, read_tuned
from luthier_trainer.inspect import BUILTIN
from luthier_trainer.stop import never


def no_progress(_done: int, _total: int) -> None:
    return None


@pytest.fixture
def source(tmp_path: Path) -> Tuned:
    return tuned(tmp_path, llama(torch.float32))


def refused(source: Tuned, folder: Path, options: MergedExport = F32) -> TrainingError:
    """Why the model is not merged."""
    with pytest.raises(TrainingError) as caught:
        merged(source, folder, options)
    return caught.value


def changed(path: Path, **changes: Any) -> None:
    """Changes fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_no_file_is_larger_than_was_asked_for_and_the_index_knows_all(source: Tuned, tmp_path: Path) -> None:
    limit = 30_000
    out = merged(source, tmp_path / "out", MergedExport(weights=F32.weights, max_shard_bytes=limit))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    held = {file.name: load_file(file) for file in sorted(out.glob("*.safetensors"))}
    assert {name: file for file, tensors in held.items() for name in tensors} == index["weight_map"]
    sizes = {file: sum(each.nbytes for each in tensors.values()) for file, tensors in held.items()}
    assert len(sizes) > 3
    assert max(sizes.values()) <= limit
    assert sum(sizes.values()) == index["metadata"]["total_size"]
    torch.testing.assert_close(loaded_logits(out), peft_logits(source), rtol=0, atol=1e-4)


def test_a_base_that_names_foreign_code_leads_nobody_to_it(source: Tuned, tmp_path: Path) -> None:
    changed(source.base / "config.json", auto_map={"AutoModelForCausalLM": "somebody/code--modeling.Model"})
    out = merged(source, tmp_path / "out")
    assert "somebody" not in (out / "config.json").read_text()


def test_progress_counts_every_byte_and_ends_at_the_total(source: Tuned, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    (tmp_path / "out").mkdir()
    from luthier_trainer.export.merged import write_merged

    write_merged(source, F32, tmp_path / "out", lambda done, total: told.append((done, total)), never)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert told[0][0] == 0
    assert told[-1] == (sum(each.nbytes for each in stored.values()),) * 2
    assert told == sorted(told)


def test_names_and_shapes_are_those_of_transformers_state_dict(source: Tuned) -> None:
    model = AutoModelForCausalLM.from_pretrained(source.base)
    with merged_weights(source) as weights:
        assert {name: weights.shape(name) for name in weights.names} == {
            name: tuple(each.shape) for name, each in model.state_dict().items()
        }
        assert weights.changed == {name for name in weights.names if "_proj" in name}
        assert all(weights.read(name).dtype == torch.float32 for name in weights.names)


def test_a_number_that_f16_cannot_hold_is_told_by_its_tensor_name(source: Tuned, tmp_path: Path) -> None:
    state = load_file(source.base / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = 7e4
    save_file(state, source.base / "model.safetensors", metadata={"format": "pt"})
    error = refused(source, tmp_path / "out", MergedExport(weights=export_task_pb2.WEIGHT_TYPE_F16))
    assert error.reason == "EXPORT_UNSUPPORTED"
    assert "model.layers.1.mlp.up_proj.weight" in error.message
    merged(source, tmp_path / "wide", MergedExport(weights=export_task_pb2.WEIGHT_TYPE_BF16))


@pytest.mark.parametrize(
    ("fault", "reason", "told"),
    [
        ("quantised base", "EXPORT_UNSUPPORTED", "quantised"),
        ("pissa", "EXPORT_UNSUPPORTED", "pissa"),
        ("tokens", "EXPORT_UNSUPPORTED", "single tokens"),
        ("another adapter", "EXPORT_UNSUPPORTED", "only LoRA"),
        ("a tensor more", "EXPORT_UNSUPPORTED", "vera_lambda"),
        ("a tensor less", "EXPORT_UNSUPPORTED", "lacks"),
        ("a weight less", "EXPORT_UNSUPPORTED", "have no model.norm.weight"),
        ("base cut off", "MODEL_DAMAGED", "cut off"),
        ("adapter cut off", "MODEL_DAMAGED", "cut off"),
    ],
)
def test_what_cannot_be_merged_rightly_is_refused(
    fault: str, reason: str, told: str, source: Tuned, tmp_path: Path
) -> None:
    base, adapter = source.base / "model.safetensors", source.directory / "adapter_model.safetensors"
    state = load_file(adapter)
    if fault == "quantised base":
        changed(source.base / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    elif fault == "pissa":
        changed(source.directory / "adapter_config.json", init_lora_weights="pissa")
    elif fault == "tokens":
        changed(source.directory / "adapter_config.json", trainable_token_indices=[1, 2])
    elif fault == "another adapter":
        changed(source.directory / "adapter_config.json", peft_type="IA3", feedforward_modules=[])
    elif fault == "a tensor more":
        state["base_model.model.model.layers.0.self_attn.q_proj.vera_lambda"] = torch.ones(3)
        save_file(state, adapter)
    elif fault == "a tensor less":
        state.popitem()
        save_file(state, adapter)
    elif fault == "a weight less":
        weights = load_file(base)
        del weights["model.norm.weight"]
        save_file(weights, base)
    else:
        path = base if fault == "base cut off" else adapter
        path.write_bytes(path.read_bytes()[:-100])
    error = refused(source, tmp_path / "out")
    assert (error.reason, told in str(error)) == (reason, True), str(error)


def test_a_tuned_model_whose_every_weight_was_trained_has_no_adapter(source: Tuned, tmp_path: Path) -> None:
    whole = Tuned(source.base, source.base, None, "model_2")
    with pytest.raises(TrainingError, match="has no adapter"):
        write_adapter(whole, tmp_path, no_progress, never)


@pytest.mark.parametrize("noted", [None, 0, [0, 5]])
def test_the_token_that_ends_a_turn_is_never_lost(noted: Any, source: Tuned, tmp_path: Path) -> None:
    if noted is None:
        (source.base / "generation_config.json").unlink()
    else:
        changed(source.base / "generation_config.json", eos_token_id=noted, _from_model_config=True, temperature=0.7)
    config = json.loads((source.directory / "tokenizer_config.json").read_text())
    config["eos_token"] = "<|endoftext|>"  # and not what the template ends a turn with
    (source.directory / "tokenizer_config.json").write_text(json.dumps(config))
    out = merged(source, tmp_path / "out")
    found = json.loads((out / "generation_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(out)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert {end, tokenizer.eos_token_id} <= set(found["eos_token_id"])
    assert set(noted if isinstance(noted, list) else [noted or 0]) <= set(found["eos_token_id"])
    assert found.get("temperature") == (None if noted is None else 0.7)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.generation_config.eos_token_id == found["eos_token_id"]


@pytest.mark.parametrize("kind", ["model", "checkpoint", "trained on texts"])
def test_the_template_that_training_took_for_granted_is_written(kind: str, source: Tuned, tmp_path: Path) -> None:
    (source.directory / "chat_template.jinja").unlink()
    sha256 = hashlib.sha256(CHATML.encode()).hexdigest()
    (source.directory / "luthier.json").unlink()
    if kind == "checkpoint":
        (source.directory / "state.json").write_text(json.dumps({"rows": {"template_sha256": sha256}}))
    else:
        noted = {"chat_template_sha256": sha256 if kind == "model" else ""}
        (source.directory / "luthier.json").write_text(json.dumps(noted))
    out = merged(source, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(out).chat_template == (None if kind == "trained on texts" else CHATML)


def test_nothing_that_is_written_tells_a_path_of_this_machine(source: Tuned, tmp_path: Path) -> None:
    changed(source.directory / "adapter_config.json", base_model_name_or_path=str(source.base))
    changed(source.base / "config.json", _name_or_path=str(source.base))
    task = TrainerTask(
        base_model=BaseModelSource(location=str(source.base)),
        export=ExportWork(model_dir=str(source.directory), model_id="model_1"),
    )
    found = read_tuned(task)
    assert found.base_name == "base"
    (tmp_path / "adapter").mkdir()
    write_adapter(found, tmp_path / "adapter", no_progress, never)
    out = merged(found, tmp_path / "out")
    for file in (*out.iterdir(), *(tmp_path / "adapter").iterdir()):
        assert str(tmp_path).encode() not in file.read_bytes(), file.name


def test_a_built_in_base_is_called_by_its_name(source: Tuned) -> None:
    task = TrainerTask(
        base_model=BaseModelSource(location=str(BUILTIN / "tiny")),
        export=ExportWork(model_dir=str(source.directory), model_id="model_1"),
    )
    assert read_tuned(task).base_name == "builtin/tiny"


def test_a_hub_base_is_the_commit_that_was_trained_on(
    source: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub" / "models--acme--pocket"
    trained, newer = "a" * 40, "b" * 40
    for commit in (trained, newer):
        shutil.copytree(source.base, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(newer)
    (cache / "snapshots" / trained / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Pocket\n")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    changed(source.directory / "luthier.json", base_model={"hub_id": "acme/pocket", "revision": trained})
    task = TrainerTask(
        base_model=BaseModelSource(location="acme/pocket", is_hub=True),
        export=ExportWork(model_dir=str(source.directory), model_id="model_1"),
    )
    found = read_tuned(task)
    assert (found.base.name, found.base_revision, found.base_name) == (trained, trained, "acme/pocket")
    assert found.base_licence == "apache-2.0"


@pytest.mark.parametrize("lost", ["base", "model", "shard"])
def test_a_model_that_is_gone_is_not_found(lost: str, source: Tuned, tmp_path: Path) -> None:
    if lost == "base":
        shutil.rmtree(source.base)
    elif lost == "model":
        (source.directory / "adapter_model.safetensors").unlink()
    else:
        (source.base / "model.safetensors").unlink()
        index = {"weight_map": {"model.norm.weight": "../../../etc/passwd"}}
        (source.base / "model.safetensors.index.json").write_text(json.dumps(index))
    task = TrainerTask(
        base_model=BaseModelSource(location=str(source.base)),
        export=ExportWork(model_dir=str(source.directory), model_id="model_1"),
    )
    with pytest.raises(TrainingError) as caught:
        read_tuned(task)
    assert caught.value.reason == "MODEL_NOT_FOUND"


def test_nf4_without_bitsandbytes_is_refused_before_anything_is_written(
    source: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "out").mkdir()
    with pytest.raises(TrainingError) as caught:
        write_nf4(source, MergedExport(), tmp_path / "out", no_progress, never)
    assert caught.value.reason == "QUANTIZATION_UNAVAILABLE"
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")  # it is untied
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_nf4_is_bit_by_bit_what_transformers_makes_of_the_merged_model(family: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base: PreTrainedModel
    if family == "llama":
        base = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=97,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                tie_word_embeddings=True,
            )
        )
    else:
        base = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=64, n_embd=64, n_layer=2, n_head=4, n_inner=128))
    source = tuned(tmp_path, base, saved=("lm_head",))
    wide = merged(source, tmp_path / "wide", MergedExport())
    out = tmp_path / "out"
    out.mkdir()
    write_nf4(source, MergedExport(max_shard_bytes=40_000), out, no_progress, never)
    wanted = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        wide, dtype=torch.bfloat16, device_map={"": "cpu"}, quantization_config=wanted
    )
    model.save_pretrained(tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    ours = {name: each for file in out.glob("*.safetensors") for name, each in load_file(file).items()}
    assert len(list(out.glob("*.safetensors"))) > 1
    assert ours.keys() == theirs.keys()
    assert [name for name, each in theirs.items() if not torch.equal(ours[name], each)] == []
    config, expected = (json.loads((folder / "config.json").read_text()) for folder in (out, tmp_path / "theirs"))
    assert config["quantization_config"] == expected["quantization_config"]
    assert config["tie_word_embeddings"] is False
    assert config["dtype"] == expected["dtype"]
    assert not [each for each in out.iterdir() if each.is_dir()]
    found: Any = AutoModelForCausalLM.from_pretrained(out, device_map={"": "cpu"}, output_loading_info=True)
    loaded, told = found
    assert not any(told.values()), told
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)


_MERGE = """
import re, sys
from pathlib import Path
from luthier.v1.export_task_pb2 import MergedExport, WEIGHT_TYPE_F32
from luthier_trainer.export.merged import write_merged
from luthier_trainer.export.source import Tuned
import transformers.models.llama.modeling_llama, peft.tuners.lora.model
base, adapter, out, small = map(Path, sys.argv[1:])
def status(field):
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
warm = Tuned(small / "model", small / "base", small / "model", "model_2")
write_merged(warm, MergedExport(), small, lambda a, b: None, lambda: None)  # loads all libraries
source = Tuned(adapter, base, adapter, "model_1")
Path("/proc/self/clear_refs").write_text("5")  # the peak is measured from here
before = status("VmRSS")
options = MergedExport(weights=WEIGHT_TYPE_F32, max_shard_bytes=12_000_000)
write_merged(source, options, out, lambda a, b: None, lambda: None)
print(status("VmHWM") - before)
"""


@pytest.mark.slow
def test_a_merge_takes_less_memory_than_one_file_of_the_model(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=384,
        intermediate_size=1056,
        num_hidden_layers=12,
        num_attention_heads=6,
        num_key_value_heads=6,
    )
    model = LlamaForCausalLM(config)
    size = sum(each.nbytes for each in model.parameters())
    source = tuned(tmp_path, model, shard="12MB")
    del model
    (tmp_path / "out").mkdir()
    (tmp_path / "small").mkdir()
    tuned(tmp_path / "small", llama(torch.float32))
    folders = [source.base, source.directory, tmp_path / "out", tmp_path / "small"]
    arguments = [sys.executable, "-c", _MERGE, *map(str, folders)]
    peak = int(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout.split()[-1])
    largest = max(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 8
    modules = 16e6  # what the model's modules take without weights, as its base and with its adapter
    assert peak < largest + modules < size / 3, (peak, largest, size)
