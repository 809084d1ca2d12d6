"""A model to be exported: a Llama of random weights in bfloat16, in several files, with an adapter on all linears."""

import json
import math
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import LlamaConfig

from luthier_trainer import inspect
from luthier_trainer.export.surroundings import write_config
from luthier_trainer.export.tensor_file import Stored, TensorFileWriter, shard_names, shards

_RANK = 16
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make(folder: Path, *, width: int, layers: int, shard_bytes: int) -> int:
    """Writes `folder/base` and `folder/adapter`, a weight at a time. Returns the bytes of the base's weights."""
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=width,
        intermediate_size=8 * width // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    shapes = _shapes(config)
    base, adapter = folder / "base", folder / "adapter"
    for directory in (base, adapter):
        directory.mkdir(parents=True)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (directory / name).write_bytes((inspect.BUILTIN / "tiny" / name).read_bytes())
    write_config(config, "LlamaForCausalLM", torch.bfloat16, base)
    files = shards({name: Stored(torch.bfloat16, shape) for name, shape in shapes.items()}, shard_bytes)
    torch.manual_seed(0)
    for file, tensors in zip(shard_names(len(files)), files, strict=True):
        with TensorFileWriter(base / file, tensors) as writer:
            for name, each in tensors.items():
                writer.write(name, torch.empty(each.shape, dtype=torch.bfloat16).normal_(0, 0.02))
    where = {name: file for file, tensors in zip(shard_names(len(files)), files, strict=True) for name in tensors}
    if len(files) > 1:
        (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    _adapter(adapter, shapes)
    return sum(2 * math.prod(shape) for shape in shapes.values())


def _shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    width, inner, words = config.hidden_size, config.intermediate_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, width)}
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}."
        for each in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{name}self_attn.{each}.weight"] = (width, width)
        for each in ("gate_proj", "up_proj"):
            shapes[f"{name}mlp.{each}.weight"] = (inner, width)
        shapes[f"{name}mlp.down_proj.weight"] = (width, inner)
        for each in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{name}{each}.weight"] = (width,)
    return shapes | {"model.norm.weight": (width,), "lm_head.weight": (words, width)}


def _adapter(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    tensors = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in _PROJECTIONS:
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(_RANK, shape[1]) * 0.02
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(shape[0], _RANK) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = LoraConfig(r=_RANK, lora_alpha=32, target_modules=list(_PROJECTIONS), task_type="CAUSAL_LM")
    config.base_model_name_or_path = "random/llama"
    config.inference_mode = True
    config.save_pretrained(str(folder))
