"""Frozen weights in 4 or 8 bits below an adapter (QLoRA, Dettmers et al. 2023, arXiv 2305.14314), by bitsandbytes."""

import importlib.util
import logging
from collections.abc import Sequence

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from luthier.v1 import job_pb2
from luthier_trainer.errors import TrainingError

_HEADS = ("lm_head", "embed_out")
"""What transformers' models call their head; it finds the head itself unless other modules are to be kept too."""


def quantization_config(
    wanted: job_pb2.LoraQuantization.ValueType, dtype: torch.dtype, modules_to_save: Sequence[str]
) -> BitsAndBytesConfig | None:
    """What transformers loads a base with; None for weights as they are.

    The head stays as it is, because the loss goes through it in chunks, and so do modules that are trained whole.
    Products are computed in `dtype`. Raises TrainingError QUANTIZATION_UNAVAILABLE without bitsandbytes.
    """
    if wanted == job_pb2.LORA_QUANTIZATION_NONE:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise TrainingError(
            "QUANTIZATION_UNAVAILABLE",
            "lora.quantization needs bitsandbytes, which is not installed beside the trainer.",
            "Install it there (pip install bitsandbytes), or leave the field unset.",
        )
    kept = [*_HEADS, *modules_to_save] if modules_to_save else None
    if wanted == job_pb2.LORA_QUANTIZATION_INT8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)  # type: ignore[no-untyped-call]
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept,
    )


def keep_differentiable(model: nn.Module) -> None:
    """Keeps bitsandbytes 0.50 from two things that it does to a model of its own accord.

    On a CPU with avx512_bf16 the first forward pass in evaluation packs 4-bit weights for a product that has no
    backward: training would then go on without the gradients that pass through it. And every 8-bit product of 32-bit
    inputs logs that it rounds them.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
