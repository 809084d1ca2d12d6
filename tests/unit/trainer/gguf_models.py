"""Tiny random models of the families that are written as GGUF, their files, and what both compute."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from luthier.v1.export_task_pb2 import GgufExport, GgufType
from luthier_trainer.export import gguf
from luthier_trainer.export.gguf.tokens import HARD_TEXTS
from luthier_trainer.export.proof.loaders import llama
from luthier_trainer.export.source import Tuned
from luthier_trainer.inspect import BUILTIN
from luthier_trainer.stop import never

TINY = BUILTIN / "tiny"
LENGTH = 60
_COMMON: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
}
_GEMMA: dict[str, Any] = {"head_dim": 32, "tie_word_embeddings": True}
_SPLITS = {
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    "tekken": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def _rope(kind: str, **parameters: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **parameters}}


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama-biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    "llama-3": (
        "LlamaConfig",
        _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
    ),
    "llama-linear": ("LlamaConfig", _rope("linear", factor=4.0)),
    "llama-yarn": (
        "LlamaConfig",
        _rope("yarn", factor=4.0, original_max_position_embeddings=64, attention_factor=1.3),
    ),
    "mistral": ("MistralConfig", {"sliding_window": 128}),
    "smollm-3": ("SmolLM3Config", {"num_hidden_layers": 4}),
    "qwen-2": ("Qwen2Config", {}),
    "qwen-3-tied": ("Qwen3Config", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma": ("GemmaConfig", _GEMMA),
    "gemma-2": (
        "Gemma2Config",
        {
            **_GEMMA,
            "sliding_window": 8,
            "query_pre_attn_scalar": 12,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma-3": (
        "Gemma3TextConfig",
        {
            **_GEMMA,
            "sliding_window": 8,
            "query_pre_attn_scalar": 12,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gemma-3-untied": (
        "Gemma3TextConfig",
        {
            **_GEMMA,
            "sliding_window": 8,
            "query_pre_attn_scalar": 32,
            "num_hidden_layers": 7,
            "tie_word_embeddings": False,
        },
    ),
}


def random_model(family: str, **changes: Any) -> PreTrainedModel:
    """The same random model each time, in numbers that 16 bits hold. No bias is zero and no norm is one."""
    config, options = FAMILIES[family]
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        getattr(transformers, config)(**_COMMON | options | changes)
    )
    with torch.no_grad():
        for each in model.parameters():
            if each.ndim < 2:
                each.add_(torch.randn_like(each), alpha=0.1)
            each.copy_(each.half().float())
    return model


def saved(model: PreTrainedModel, folder: Path, adapter: Path | None = None) -> Tuned:
    """The model with a small tokenizer and a licence in a folder."""
    model.save_pretrained(folder)
    small().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return Tuned(folder, folder, adapter, "model_1", "someone/tiny", "0123abc")


def written(tuned: Tuned, folder: Path, kind: str = "F16", **options: Any) -> Path:
    """The GGUF file of a type, written into a folder that may be there."""
    folder.mkdir(exist_ok=True)
    wanted = GgufExport(type=GgufType.Value(f"GGUF_TYPE_{kind}"), **options)
    gguf.write(tuned, wanted, folder, lambda done, total: None, never)
    return next(folder.glob("adapter-*.gguf" if wanted.adapter_only else f"model-{kind.lower()}.gguf"))


def some_tokens(length: int = LENGTH) -> list[int]:
    """The same random tokens each time."""
    return torch.randint(1, 399, (length,), generator=torch.Generator().manual_seed(3)).tolist()


def expected(model: torch.nn.Module, ids: Sequence[int]) -> npt.NDArray[np.float32]:
    """Log-probabilities by transformers: [tokens, vocabulary]."""
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([list(ids)])).logits[0].float(), -1).numpy()


def by_llama_cpp(file: Path, ids: Sequence[int], base: Path, adapter: Path | None = None) -> npt.NDArray[np.float32]:
    """The same by llama.cpp, from a file that says what `base` does."""
    with llama.load(file, adapter, base=base, longest=len(ids), threads=1) as loaded:
        logits = loaded.logits(list(ids), list(range(len(ids))))
    return torch.log_softmax(torch.from_numpy(logits), -1).numpy()


def fast(tokenizer: Tokenizer, **tokens: str) -> PreTrainedTokenizerFast:
    """transformers' tokenizer around one of the library tokenizers."""
    made: PreTrainedTokenizerFast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)  # type: ignore[no-untyped-call]
    return made


@functools.cache
def small() -> PreTrainedTokenizerFast:
    """A tokenizer of 400 tokens."""
    return byte_level("qwen2", 400)


def byte_level(rule: str, size: int = 1500) -> PreTrainedTokenizerFast:
    """A small byte-level BPE that cuts texts as a rule of llama.cpp does."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=rule in ("llama-bpe", "tekken")))
    if rule == "smollm":
        cut: Any = pre_tokenizers.Digits(individual_digits=True)
        bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        cut = pre_tokenizers.Split(Regex(_SPLITS[rule]), "isolated")
        bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if rule == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, bytes_of])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, min_frequency=1, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(HARD_TEXTS, trainer)
    return fast(tokenizer, eos_token="<|end|>")


def sentence_pieces(prefix: bool, added: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A small tokenizer as converted from SentencePiece: with a space before each text, as Llama 2 has it, or without,
    as Gemma."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # words are learnt apart, and only then
    own = ["<unk>", "<s>", "</s>", *(f"<0x{each:02X}>" for each in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=700, min_frequency=1, special_tokens=own, limit_alphabet=80, show_progress=False
    )
    tokenizer.train_from_iterator(HARD_TEXTS, trainer)
    parsed = json.loads(tokenizer.to_str())
    parsed |= {"pre_tokenizer": None, "added_tokens": [each for each in parsed["added_tokens"] if each["id"] < 3]}
    tokenizer = Tokenizer.from_str(json.dumps(parsed))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = fast(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    for token in added:
        made.add_tokens([AddedToken(token, normalized=False, special=token.startswith("<"))])
    return made
