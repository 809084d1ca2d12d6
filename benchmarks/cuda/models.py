"""Models of random weights, made on the device: nothing is downloaded and no weight is written to a disk."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.cuda.cells import Method
from benchmarks.cuda.shapes import Shape
from benchmarks.engine import workload
from luthier_trainer.quantization import keep_differentiable


def config(shape: Shape, length: int) -> LlamaConfig:
    """Of a shape, for rows of at most `length` tokens."""
    return LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        max_position_embeddings=length,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=workload.END_OF_TURN,
        pad_token_id=0,
    )


def write_description(folder: Path, shape: Shape, length: int) -> None:
    """The tokenizer and the configuration, which both sides read; the weights stay on the device."""
    workload.write_tokenizer(folder, shape.vocabulary)
    config(shape, length).save_pretrained(folder)


def build(shape: Shape, length: int, method: Method, device: torch.device, attention: str = "sdpa") -> PreTrainedModel:
    """The model in bfloat16 on the device; for `qlora` its layers' linear weights in nf4, the head as it is."""
    torch.manual_seed(workload.SEED)
    described = config(shape, length)
    described._attn_implementation = attention
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = LlamaForCausalLM(described)
    finally:
        torch.set_default_dtype(before)
    if method == "qlora":
        _quantise(model, device)
    return model


def _quantise(model: PreTrainedModel, device: torch.device) -> None:
    """Layer by layer, so that no more than the model and one weight are held. Raises ImportError without
    bitsandbytes."""
    import bitsandbytes as bnb  # type: ignore[import-not-found,import-untyped,unused-ignore]

    narrowed: Any = bnb.nn  # it has types, and names none of these in them
    for layer in model.get_decoder().layers:  # type: ignore[no-untyped-call]
        for name, linear in [pair for pair in layer.named_modules() if type(pair[1]) is nn.Linear]:
            narrow = narrowed.Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                compress_statistics=True,
                quant_type="nf4",
                device="meta",
            )
            narrow.weight = narrowed.Params4bit(
                linear.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=narrow
            )
            parent, _, last = name.rpartition(".")
            setattr(layer.get_submodule(parent), last, narrow.to(device))
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
    keep_differentiable(model)
