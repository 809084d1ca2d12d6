"""The model families that are written as GGUF: how llama.cpp calls their tensors, and in what it computes otherwise.

What llama.cpp expects is what its own converter writes (conversion/*.py of its repository) and its graphs compute
(src/models/*.cpp).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map
from transformers import PretrainedConfig

from luthier_trainer.errors import TrainingError

Shape = tuple[int, ...]
_GELU = ("gelu_pytorch_tanh", "gelu")
_GEMMA_27B = {
    "gemma2": 46,
    "gemma3": 62,
}  # layers; there llama.cpp scales attention by the width of a head of hidden_size


@dataclass(frozen=True)
class Family:
    """A family. model_type: transformers' name. permuted: whether llama.cpp turns neighbouring numbers of queries and
    keys, where transformers turns halves. norm_offset: what transformers adds to the weights of norms when it computes.
    always_tied: whether llama.cpp's graph has no output matrix of its own. windows: in which cycle of layers the last
    alone sees everything, None where llama.cpp knows no sliding window."""

    model_type: str
    arch: MODEL_ARCH
    permuted: bool = False
    norm_offset: float = 0.0
    always_tied: bool = False
    windows: int | None = None
    activations: tuple[str, ...] = ("silu",)

    @property
    def architecture(self) -> str:
        """llama.cpp's name."""
        return MODEL_ARCH_NAMES[self.arch]


FAMILIES = {
    each.model_type: each
    for each in (
        Family("llama", MODEL_ARCH.LLAMA, permuted=True),
        Family("mistral", MODEL_ARCH.LLAMA, permuted=True),
        Family("smollm3", MODEL_ARCH.SMOLLM3, permuted=True),
        Family("qwen2", MODEL_ARCH.QWEN2),
        Family("qwen3", MODEL_ARCH.QWEN3),
        Family("gemma", MODEL_ARCH.GEMMA, norm_offset=1.0, always_tied=True, activations=_GELU),
        Family("gemma2", MODEL_ARCH.GEMMA2, norm_offset=1.0, always_tied=True, windows=2, activations=_GELU),
        Family("gemma3_text", MODEL_ARCH.GEMMA3, norm_offset=1.0, windows=6, activations=_GELU),
    )
}


@dataclass(frozen=True)
class Planned:
    """A tensor of the file. name: llama.cpp's; source: transformers'. rows: the order that rows are written in. Each
    number is (number + offset) x factor. value: the tensor itself, where the model has none (then source is empty)."""

    name: str
    source: str
    shape: Shape
    rows: torch.Tensor | None = None
    offset: float = 0.0
    factor: float = 1.0
    value: torch.Tensor | None = None


def family_of(config: PretrainedConfig) -> Family:
    """The family of a model. Raises TrainingError EXPORT_UNSUPPORTED for others, and for what llama.cpp does not
    compute in this one."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise TrainingError(
            "EXPORT_UNSUPPORTED",
            f"Luthier writes no GGUF of {config.model_type} models, but of these: {', '.join(sorted(FAMILIES))}.",
            "Export it merged, and convert that; or let the operator start luthierd with --llama-cpp-dir, a llama.cpp "
            "whose converter may know it.",
        )
    for what in _unknown(family, config):
        raise TrainingError(
            "EXPORT_UNSUPPORTED",
            f"llama.cpp does not compute {what} in models of the type {config.model_type}.",
            "Export it merged for what runs transformers' models.",
        )
    return family


def head_size(config: PretrainedConfig) -> int:
    """Numbers of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def key_heads(config: PretrainedConfig) -> int:
    """Heads of keys and values."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def rope(config: PretrainedConfig, layer: str = "full_attention") -> Mapping[str, Any]:
    """The rotary embedding's parameters, of one kind of layer where kinds differ."""
    found: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    nested = found.get(layer)
    return nested if isinstance(nested, Mapping) else found


def window(config: PretrainedConfig) -> int | None:
    """The sliding window that some layer has; None for none."""
    if config.model_type.startswith("gemma3") or config.model_type == "gemma2":
        kinds = getattr(config, "layer_types", None) or []
        return int(config.sliding_window) if "sliding_attention" in kinds else None
    if config.model_type in ("qwen2", "qwen3", "smollm3"):
        kinds = getattr(config, "layer_types", None)
        used = getattr(config, "use_sliding_window", False)
        if not used or (kinds is not None and "sliding_attention" not in kinds):
            return None
    found = getattr(config, "sliding_window", None)
    return int(found) if found else None


def window_cycle(config: PretrainedConfig) -> int | None:
    """Every how many layers one sees everything, when layers with a sliding window follow that order; else None."""
    kinds = list(getattr(config, "layer_types", None) or [])
    if "sliding_attention" not in kinds:
        return None
    cycle = kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1
    expected = ["full_attention" if (i + 1) % cycle == 0 else "sliding_attention" for i in range(len(kinds))]
    return cycle if kinds == expected else None


def plan(config: PretrainedConfig, shapes: Mapping[str, Shape]) -> list[Planned]:
    """The file's tensors in llama.cpp's own order, for a model's tensors by transformers' names. Raises TrainingError
    EXPORT_UNSUPPORTED for tensors that llama.cpp has no place for."""
    family = family_of(config)
    names = get_tensor_name_map(family.arch, config.num_hidden_layers)
    planned = []
    for source, shape in shapes.items():
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None or (family.always_tied and name == "output.weight"):
            raise TrainingError(
                "EXPORT_UNSUPPORTED",
                f"llama.cpp has no place for {source} in models of the type {config.model_type}.",
                "Export it merged for what runs transformers' models.",
            )
        planned.append(
            Planned(name, source, shape, _row_order(family, config, source), *_arithmetic(family, config, source))
        )
    if rope(config).get("rope_type") == "llama3":
        factors = llama3_factors(rope(config), head_size(config))
        planned.append(Planned("rope_freqs.weight", "", tuple(factors.shape), value=factors))
    return sorted(planned, key=_place)


def row_order(heads: int, rows: int) -> torch.Tensor:
    """The order of rows in which neighbours are turned together, for rows in which halves of a head are."""
    return torch.arange(rows).reshape(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)


def _row_order(family: Family, config: PretrainedConfig, source: str) -> torch.Tensor | None:
    if not family.permuted:
        return None
    part = source.rsplit(".", 2)[-2]
    heads = {"q_proj": config.num_attention_heads, "k_proj": key_heads(config)}.get(part)
    return None if heads is None else row_order(heads, heads * head_size(config))


def _arithmetic(family: Family, config: PretrainedConfig, source: str) -> tuple[float, float]:
    """(offset, factor) of a tensor."""
    offset = family.norm_offset if source.endswith("norm.weight") else 0.0
    scaled = {"gemma2": ".q_proj.", "gemma3": ".q_norm."}.get(family.architecture)
    return offset, query_factor(family, config) if scaled and scaled in source else 1.0


def query_factor(family: Family, config: PretrainedConfig) -> float:
    """What queries are multiplied by where llama.cpp divides them by another root than the configuration says; 1.0 for
    all models that were published."""
    if family.architecture not in _GEMMA_27B:
        return 1.0
    assumed = head_size(config)
    if config.num_hidden_layers == _GEMMA_27B[family.architecture]:
        assumed = config.hidden_size // config.num_attention_heads
    return math.sqrt(assumed / config.query_pre_attn_scalar)


def llama3_factors(parameters: Mapping[str, Any], head: int) -> torch.Tensor:
    """What each frequency is divided by, as `_compute_llama3_parameters` of transformers has it; (head / 2)."""
    base = float(parameters["rope_theta"])
    factor, original = float(parameters["factor"]), float(parameters["original_max_position_embeddings"])
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    lengths = 2 * math.pi * base ** (torch.arange(0, head, 2, dtype=torch.float32) / head)
    smooth = (original / lengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = torch.where(lengths > original / low, torch.full_like(lengths, factor), between)
    return torch.where(lengths < original / high, torch.ones_like(lengths), factors)


def _place(planned: Planned) -> tuple[int, str]:
    """llama.cpp's order: what is of no layer, then layers; by name within."""
    if not planned.name.startswith("blk."):
        return -1, planned.name
    return int(planned.name.split(".")[1]), planned.name


def _unknown(family: Family, config: PretrainedConfig) -> list[str]:
    """What the configuration asks for and llama.cpp's graph of the family has not."""
    checks: list[tuple[bool, Callable[[], str]]] = [
        (_activation(config) not in family.activations, lambda: f"the activation {_activation(config)!r}"),
        (
            rope(config).get("rope_type", "default") not in ("default", "linear", "dynamic", "llama3", "yarn"),
            lambda: f"rotary embeddings of the type {rope(config)['rope_type']!r}",
        ),
        (
            rope(config).get("rope_type") == "yarn" and not _is_plain_yarn(rope(config)),
            lambda: "YaRN with other limits than 32 and 1, or limits that are no whole dimensions",
        ),
        (
            float(rope(config).get("partial_rotary_factor") or 1.0) != 1.0,
            lambda: "rotary embeddings of a part of each head",
        ),
        (
            family.windows is not None and window(config) is not None and not _windows_fit(family, config),
            lambda: "this order of layers with a sliding window",
        ),
        (
            family.model_type == "gemma2" and not config.attn_logit_softcapping,
            lambda: "attention without soft-capped scores",
        ),
        (
            family.model_type == "gemma2" and not config.final_logit_softcapping,
            lambda: "logits that are not soft-capped",
        ),
        (
            family.model_type == "gemma3_text" and bool(getattr(config, "attn_logit_softcapping", None)),
            lambda: "soft-capped attention",
        ),
        (
            family.model_type == "gemma3_text" and rope(config, "sliding_attention").get("rope_type") != "default",
            lambda: "scaled rotary embeddings in layers with a sliding window",
        ),
        (
            family.model_type == "smollm3" and not _every_fourth(config),
            lambda: "this order of layers without positions",
        ),
        (
            bool(getattr(config, "use_bidirectional_attention", False)),
            lambda: "attention to what comes later",
        ),
    ]
    return [say() for found, say in checks if found]


def _is_plain_yarn(parameters: Mapping[str, Any]) -> bool:
    limits = parameters.get("beta_fast") or 32, parameters.get("beta_slow") or 1
    scaled = parameters.get("mscale") or parameters.get("mscale_all_dim")
    return limits == (32, 1) and bool(parameters.get("truncate", True)) and not scaled


def _activation(config: PretrainedConfig) -> str:
    return str(getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", ""))


def _windows_fit(family: Family, config: PretrainedConfig) -> bool:
    cycle = window_cycle(config)
    return cycle is not None and (family.model_type == "gemma3_text" or cycle == family.windows)


def _every_fourth(config: PretrainedConfig) -> bool:
    layers = list(config.no_rope_layers)
    return layers == [int((i + 1) % 4 != 0) for i in range(config.num_hidden_layers)]
