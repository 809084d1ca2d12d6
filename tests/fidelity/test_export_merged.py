"""A merged model computes what its base computes with the adapter, whatever the family and whatever was trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fidelity.exports import loaded_logits, merged, peft_logits, tuned
from fidelity.families import FAMILIES, Family
from fidelity.jobs import Recorder, StopAfter, chats, task, tiny_base
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from luthier.trainer.v1.task_pb2 import ExportWork, TrainerTask
from luthier.v1 import export_task_pb2
from luthier_trainer import sft
from luthier_trainer.control import NoControl
from luthier_trainer.export.adapter import write_adapter
from luthier_trainer.export.source import Tuned, read_tuned
from luthier_trainer.job import Job
from luthier_trainer.stop import never

KINDS: list[tuple[bool, dict[str, Any]]] = [
    (False, {"use_dora": True, "use_rslora": True}),
    (True, {}),
    (True, {"saved": ("lm_head",)}),
]
"""(whether head and embeddings are one weight, what adapts)"""


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-4)


def tensors(folder: Path) -> set[str]:
    """The names in a model's files."""
    found: set[str] = set()
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= set(opened.keys())
    return found


def family(name: str) -> Family:
    return next(each for each in FAMILIES if each.name == name)


@pytest.mark.filterwarnings("ignore")  # of models that are not made for tied weights, or for such small ones
@pytest.mark.parametrize("which", FAMILIES, ids=lambda each: each.name)
def test_every_family_computes_merged_what_it_computes_with_its_adapter(which: Family, tmp_path: Path) -> None:
    tied, kind = KINDS[FAMILIES.index(which) % len(KINDS)]
    if "use_dora" in kind and {"gate_up_proj", "gate"} & set(which.targets) and "experts" in str(which.options):
        kind = {}  # PEFT has no DoRA on experts
    source = tuned(tmp_path, which.model(torch.float32, tie_word_embeddings=tied), **kind)
    out = merged(source, tmp_path / "out")
    same(loaded_logits(out), peft_logits(source))
    assert tensors(source.base) <= tensors(out)  # under the names that others know


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")  # it is untied
@pytest.mark.parametrize(
    "kind",
    [
        {"saved": ("embed_tokens",)},
        {"saved": ("lm_head", "embed_tokens")},
        {"targets": ("q_proj", "lm_head")},
        {"targets": ("q_proj", "embed_tokens")},
        {"targets": ("q_proj", "embed_tokens", "lm_head"), "use_dora": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [True, False])
def test_head_and_embeddings_are_two_once_one_of_them_was_trained(
    kind: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    source = tuned(tmp_path, family("llama").model(torch.float32, tie_word_embeddings=tied), **kind)
    out = merged(source, tmp_path / "out")
    same(loaded_logits(out), peft_logits(source))
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= tensors(out)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


def test_head_and_embeddings_stay_one_when_neither_was_trained(tmp_path: Path) -> None:
    source = tuned(tmp_path, family("qwen-2").model(torch.float32, tie_word_embeddings=True))
    out = merged(source, tmp_path / "out")
    assert tensors(out) == tensors(source.base)
    assert "lm_head.weight" not in tensors(out)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize("held", ["the head alone", "both, different", "both, the same"])
def test_tied_weights_are_read_as_transformers_reads_them(held: str, tmp_path: Path) -> None:
    source = tuned(tmp_path, family("llama").model(torch.float32, tie_word_embeddings=True))
    state = load_file(source.base / "model.safetensors")
    embeddings = state["model.embed_tokens.weight"]
    state["lm_head.weight"] = embeddings.flip(0).contiguous() if held == "both, different" else embeddings.clone()
    if held == "the head alone":
        del state["model.embed_tokens.weight"]
    save_file(state, source.base / "model.safetensors", metadata={"format": "pt"})
    out = merged(source, tmp_path / "out")
    same(loaded_logits(out), peft_logits(source))
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is (held != "both, different")


def test_ranks_and_scales_of_their_own_and_trained_biases_are_merged(tmp_path: Path) -> None:
    source = tuned(tmp_path, family("qwen-2").model(torch.float32), targets=("q_proj", "down_proj"))
    state = load_file(source.directory / "adapter_model.safetensors")
    config = json.loads((source.directory / "adapter_config.json").read_text())
    config |= {"alpha_pattern": {"down_proj": 20.0}, "bias": "lora_only"}
    (source.directory / "adapter_config.json").write_text(json.dumps(config))
    for name in list(state):
        if name.endswith("q_proj.lora_A.weight"):
            state[name.replace("lora_A.weight", "base_layer.bias")] = torch.full((32,), 0.3)
    save_file(state, source.directory / "adapter_model.safetensors", metadata={"format": "pt"})
    same(loaded_logits(merged(source, tmp_path / "out")), peft_logits(source))


def export_of(job: TrainerTask, directory: Path) -> Tuned:
    """The source of an export of what a job left in `directory`."""
    work = ExportWork(model_dir=str(directory), model_id="model_1")
    return read_tuned(TrainerTask(base_model=job.base_model, export=work))


def trainers_logits(job: Job) -> torch.Tensor:
    model = job.forward.model.train(False)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(5, 45)[None], use_cache=False).logits
    return found


@pytest.mark.parametrize("full", [False, True], ids=["adapter", "last layer"])
def test_a_model_and_a_checkpoint_give_the_trainers_logits(full: bool, tmp_path: Path, jobs: list[Job]) -> None:
    base, data = tiny_base(tmp_path, tied=full), chats(tmp_path / "chats.jsonl")
    made = task(tmp_path, base, data, max_steps=4, full=full, last_layers=1 if full else 0)
    recorder = Recorder()
    stopped = sft.train(made, recorder, StopAfter(recorder, 3))
    checkpoint = tmp_path / "checkpoints" / stopped.checkpoint  # type: ignore[union-attr]
    out = merged(export_of(made, checkpoint), tmp_path / "early")
    same(loaded_logits(out), trainers_logits(jobs[0]))
    sft.train(made, Recorder(), NoControl())
    source = export_of(made, tmp_path / "model")
    assert (source.adapter is None) == full
    out = merged(source, tmp_path / "late")
    same(loaded_logits(out), trainers_logits(jobs[1]))
    assert (out / "tokenizer.json").read_bytes() == (tmp_path / "model" / "tokenizer.json").read_bytes()


def test_an_adapter_that_went_on_from_another_is_merged_once(tmp_path: Path, jobs: list[Job]) -> None:
    base, data = tiny_base(tmp_path), chats(tmp_path / "chats.jsonl")
    first = task(tmp_path / "first", base, data, max_steps=2)
    sft.train(first, Recorder(), NoControl())
    more = task(tmp_path / "second", base, data, max_steps=2)
    more.base_model.adapter_dir = str(tmp_path / "first" / "model")
    sft.train(more, Recorder(), NoControl())
    out = merged(export_of(more, tmp_path / "second" / "model"), tmp_path / "out")
    same(loaded_logits(out), trainers_logits(jobs[1]))


def test_an_exported_adapter_gives_exactly_the_logits_of_the_tuned_one(tmp_path: Path) -> None:
    source = tuned(tmp_path, family("gpt-2").model(torch.float32), use_dora=True, saved=("lm_head",))
    (tmp_path / "out").mkdir()
    write_adapter(source, tmp_path / "out", lambda _done, _total: None, never)
    base = AutoModelForCausalLM.from_pretrained(source.base, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "out")).train(False)
    with torch.no_grad():
        found = loaded(input_ids=torch.arange(5, 45)[None]).logits
    assert torch.equal(found, peft_logits(source))
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == (
        "builtin/tiny"
    )


@pytest.mark.parametrize(
    ("weights", "kind", "limit"),
    [
        (export_task_pb2.WEIGHT_TYPE_BF16, torch.bfloat16, 2**-8),
        (export_task_pb2.WEIGHT_TYPE_F16, torch.float16, 2**-11),
    ],
)
def test_a_weight_is_rounded_once(
    weights: export_task_pb2.WeightType.ValueType, kind: torch.dtype, limit: float, tmp_path: Path
) -> None:
    source = tuned(tmp_path, family("llama").model(torch.float32))
    wide = load_file(merged(source, tmp_path / "wide") / "model.safetensors")
    found = load_file(
        merged(source, tmp_path / "out", export_task_pb2.MergedExport(weights=weights)) / "model.safetensors"
    )
    assert {each.dtype for each in found.values()} == {kind}
    for name, each in wide.items():
        assert torch.equal(found[name], each.to(kind))
        assert float(((found[name].float() - each) / each.abs().clamp_min(1e-3)).abs().max()) <= limit


@pytest.mark.filterwarnings("ignore:The following:RuntimeWarning")  # PEFT has patterns for experts that are not matched
def test_weights_that_transformers_keeps_in_32_bits_are_not_rounded(tmp_path: Path) -> None:
    options = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "experts_implementation": "eager",
    }
    source = tuned(tmp_path, Family("deepseek-3", "DeepseekV3Config", options).model(torch.float32))
    same(loaded_logits(merged(source, tmp_path / "wide")), peft_logits(source))
    found = load_file(merged(source, tmp_path / "out", export_task_pb2.MergedExport()) / "model.safetensors")
    before = load_file(source.base / "model.safetensors")
    assert found.keys() == before.keys()  # each expert is a weight of its own again
    kept = {name for name, each in found.items() if each.dtype == torch.float32}
    assert kept == {"model.layers.1.mlp.gate.e_score_correction_bias"}
    assert all(torch.equal(found[name], before[name]) for name in kept)
