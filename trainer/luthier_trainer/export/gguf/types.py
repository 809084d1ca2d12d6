"""Which type llama.cpp gives each tensor of a quantised file.

The rules are those of `llama_tensor_get_type_impl` and `tensor_type_fallback` in llama.cpp's src/llama-quant.cpp, for
models without experts and without an importance matrix. A file of ours is therefore the same, byte for byte, as what
llama.cpp's own quantisation makes of the model in 16 bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from luthier.v1 import export_task_pb2 as tasks

Type = GGMLQuantizationType
_BASE: dict[tasks.GgufType.ValueType, tuple[LlamaFileType, Type]] = {
    tasks.GGUF_TYPE_F16: (LlamaFileType.MOSTLY_F16, Type.F16),
    tasks.GGUF_TYPE_BF16: (LlamaFileType.MOSTLY_BF16, Type.BF16),
    tasks.GGUF_TYPE_Q8_0: (LlamaFileType.MOSTLY_Q8_0, Type.Q8_0),
    tasks.GGUF_TYPE_Q6_K: (LlamaFileType.MOSTLY_Q6_K, Type.Q6_K),
    tasks.GGUF_TYPE_Q5_K_M: (LlamaFileType.MOSTLY_Q5_K_M, Type.Q5_K),
    tasks.GGUF_TYPE_Q4_K_M: (LlamaFileType.MOSTLY_Q4_K_M, Type.Q4_K),
    tasks.GGUF_TYPE_Q3_K_M: (LlamaFileType.MOSTLY_Q3_K_M, Type.Q3_K),
    tasks.GGUF_TYPE_Q2_K: (LlamaFileType.MOSTLY_Q2_K, Type.Q2_K),
}
_FALLBACK = {
    Type.Q2_K: Type.Q4_0,
    Type.Q3_K: Type.Q4_0,
    Type.Q4_K: Type.Q5_0,
    Type.Q5_K: Type.Q5_1,
    Type.Q6_K: Type.Q8_0,
}
_MANY_LAYERS = 80  # llama.cpp takes Llama and Qwen2 models with so many layers for those of 70 billion weights


@dataclass(frozen=True)
class Model:
    """What the rules ask about a model: its architecture in llama.cpp, layers, heads, and heads of keys."""

    architecture: str
    layers: int
    heads: int
    key_heads: int

    @property
    def shares_keys(self) -> bool:
        """Whether four heads or more share one head of keys."""
        return self.heads // self.key_heads >= 4

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp takes it for a model of 70 billion weights."""
        shared = self.architecture == "qwen2" or self.heads != self.key_heads
        return self.architecture in ("llama", "qwen2") and self.layers == _MANY_LAYERS and shared


@dataclass(frozen=True)
class Mix:
    """The types of a file's tensors, by name. file_type: the file's own. fallbacks: tensors that are held in more bits
    than asked for, because their rows cannot be cut into blocks."""

    file_type: LlamaFileType
    types: dict[str, Type]
    fallbacks: tuple[str, ...]


def mix(asked: tasks.GgufType.ValueType, model: Model, tensors: Sequence[tuple[str, tuple[int, ...]]]) -> Mix:
    """The types of `tensors`, (name, shape) in the order of the file. Vectors and norms stay in 32 bits."""
    file_type, base = _BASE[asked or tasks.GGUF_TYPE_F16]
    tied = all(name != "output.weight" for name, _ in tensors)
    types: dict[str, Type] = {}
    fallbacks = []
    for name, shape in tensors:
        if len(shape) < 2 or name.endswith("_norm.weight"):
            types[name] = Type.F32
            continue
        wanted = base
        if base not in (Type.F16, Type.BF16):
            wanted = _fitting(_mixed(name, shape[-1], file_type, base, model, tied), shape[-1])
            if shape[-1] % block_size(base):
                fallbacks.append(name)
        types[name] = wanted
    return Mix(file_type, types, tuple(fallbacks))


def block_size(kind: Type) -> int:
    """Numbers of a block."""
    return GGML_QUANT_SIZES[kind][0]


def row_bytes(kind: Type, columns: int) -> int:
    """Bytes of a row."""
    block, size = GGML_QUANT_SIZES[kind]
    return columns // block * size


def _mixed(name: str, columns: int, file_type: LlamaFileType, base: Type, model: Model, tied: bool) -> Type:
    """The type by what the tensor is for."""
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        if columns % block_size(base):
            return Type.Q8_0
        return base if base == Type.Q8_0 else Type.Q6_K
    layer, _, part = name.removeprefix("blk.").partition(".")
    if part == "attn_v.weight":
        return _attention_values(int(layer), file_type, base, model)
    if part == "ffn_down.weight":
        return _down(int(layer), file_type, base, model.layers)
    if part == "attn_output.weight":
        mixed = {LlamaFileType.MOSTLY_Q2_K: Type.Q3_K, LlamaFileType.MOSTLY_Q3_K_M: Type.Q4_K}
        return mixed.get(file_type, base)
    return base


def _attention_values(layer: int, file_type: LlamaFileType, base: Type, model: Model) -> Type:
    kind = base
    if file_type == LlamaFileType.MOSTLY_Q2_K:
        kind = Type.Q4_K if model.shares_keys else Type.Q3_K
    elif file_type == LlamaFileType.MOSTLY_Q3_K_M:
        kind = Type.Q5_K if layer < 2 else Type.Q4_K
    elif _is_medium(file_type) and _gets_more_bits(layer, model.layers):
        kind = Type.Q6_K
    return Type.Q5_K if model.is_70b and kind in (Type.Q3_K, Type.Q4_K) else kind


def _down(layer: int, file_type: LlamaFileType, base: Type, layers: int) -> Type:
    if file_type == LlamaFileType.MOSTLY_Q2_K:
        return Type.Q3_K
    if file_type == LlamaFileType.MOSTLY_Q3_K_M:
        return Type.Q5_K if layer < layers // 16 else Type.Q4_K
    if _is_medium(file_type) and _gets_more_bits(layer, layers):
        return Type.Q6_K
    return base


def _is_medium(file_type: LlamaFileType) -> bool:
    return file_type in (LlamaFileType.MOSTLY_Q4_K_M, LlamaFileType.MOSTLY_Q5_K_M)


def _gets_more_bits(layer: int, layers: int) -> bool:
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _fitting(kind: Type, columns: int) -> Type:
    """The type itself, or the nearest that cuts such rows into whole blocks."""
    if columns % block_size(kind):
        kind = _FALLBACK.get(kind, Type.F16)
    return Type.F16 if columns % block_size(kind) else kind
