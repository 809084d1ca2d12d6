"""The C interface of llama.cpp (`llama.h`), in the library inside xllamacpp, as the proof calls it.

xllamacpp's own Python classes are parameters and a server, which gives no log-probabilities of a prompt; the library
beneath exports the whole interface. Its structures change with its versions: those used here are checked against the
defaults that the library itself gives, and a library that differs is refused.
"""

import ctypes
import importlib.util
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

from luthier_trainer.errors import TrainingError

F32, F16 = 0, 1
"""ggml's numbers of two types."""


class ModelParams(Structure):
    """llama_model_params."""

    _fields_ = (
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int32),
        ("load_mode", c_int32),
        ("lazy_mode", c_int32),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
        ("_more", c_int8 * 128),  # a longer structure of a later version is still whole
    )


class ContextParams(Structure):
    """llama_context_params."""

    _fields_ = (
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int32),
        ("rope_scaling_type", c_int32),
        ("pooling_type", c_int32),
        ("attention_type", c_int32),
        ("flash_attn_type", c_int32),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("_more", c_int8 * 192),
    )


class Batch(Structure):
    """llama_batch."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", c_void_p),
        ("seq_id", c_void_p),
        ("logits", POINTER(c_int8)),
    )


_CONTEXT_DEFAULTS = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "ctx_type": 0,
    "rope_scaling_type": -1,
    "pooling_type": -1,
    "attention_type": -1,
    "flash_attn_type": -1,
    "rope_freq_base": 0.0,
    "rope_freq_scale": 0.0,
    "yarn_ext_factor": -1.0,
    "yarn_orig_ctx": 0,
    "type_k": F16,
    "type_v": F16,
}
_MODEL_DEFAULTS = {
    "devices": None,
    "n_gpu_layers": -1,
    "split_mode": 1,
    "main_gpu": 0,
    "kv_overrides": None,
    "vocab_only": False,
    "check_tensors": False,
    "use_extra_bufts": True,
    "no_host": False,
    "no_alloc": False,
}

_LOG = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)
_said: list[str] = []


def _listen(level: int, text: bytes | None, _data: Any) -> None:
    """Keeps what llama.cpp says of errors (level 4), to tell why a file cannot be loaded."""
    if level == 4 and text:
        _said.append(text.decode(errors="replace").strip())
        del _said[:-20]


_listener = _LOG(_listen)  # must outlive every call


@cache
def llama_cpp() -> ctypes.CDLL:
    """llama.cpp. Raises TrainingError PROOF_IMPOSSIBLE without xllamacpp, or with one whose interface is another."""
    found = importlib.util.find_spec("xllamacpp")
    folders = (found.submodule_search_locations if found else None) or []
    binaries = [each for folder in folders for each in sorted(Path(folder).glob("xllamacpp*.so"))]
    if not binaries:
        raise TrainingError(
            "PROOF_IMPOSSIBLE",
            "A GGUF export is proven by llama.cpp, and xllamacpp is not installed beside the trainer.",
            "Install the trainer's extra there: pip install 'luthier-trainer[gguf]'.",
        )
    library = ctypes.CDLL(str(binaries[0]))
    try:
        _declare(library)
        model, context = library.llama_model_default_params(), library.llama_context_default_params()
    except AttributeError as error:
        raise unknown_interface(str(error)) from error
    for given, known in ((context, _CONTEXT_DEFAULTS), (model, _MODEL_DEFAULTS)):
        for name, value in known.items():
            if getattr(given, name) != value:
                raise unknown_interface(f"{name} is {getattr(given, name)} by default and not {value}")
    library.llama_log_set(_listener, None)
    library.llama_backend_init()
    return library


def unknown_interface(why: str) -> TrainingError:
    """The error of a llama.cpp that is not the one that is known here."""
    return TrainingError(
        "PROOF_IMPOSSIBLE",
        f"The llama.cpp of this xllamacpp has another interface than the one that is known: {why}.",
        "Install a version that the trainer's extra `gguf` names.",
    )


def _declare(library: ctypes.CDLL) -> None:
    """The functions that are used, as `llama.h` declares them. Raises AttributeError for one that is not there."""
    text = (c_void_p, c_char_p, c_char_p, c_size_t)
    declared: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "llama_log_set": (None, (_LOG, c_void_p)),
        "llama_backend_init": (None, ()),
        "llama_model_default_params": (ModelParams, ()),
        "llama_context_default_params": (ContextParams, ()),
        "llama_model_load_from_file": (c_void_p, (c_char_p, ModelParams)),
        "llama_model_free": (None, (c_void_p,)),
        "llama_init_from_model": (c_void_p, (c_void_p, ContextParams)),
        "llama_free": (None, (c_void_p,)),
        "llama_n_ctx": (c_uint32, (c_void_p,)),
        "llama_n_threads": (c_int32, (c_void_p,)),
        "llama_adapter_lora_init": (c_void_p, (c_void_p, c_char_p)),
        "llama_set_adapters_lora": (c_int32, (c_void_p, POINTER(c_void_p), c_size_t, POINTER(c_float))),
        "llama_model_get_vocab": (c_void_p, (c_void_p,)),
        "llama_model_meta_val_str": (c_int32, text),
        "llama_vocab_n_tokens": (c_int32, (c_void_p,)),
        "llama_vocab_is_eog": (c_bool, (c_void_p, c_int32)),
        "llama_vocab_bos": (c_int32, (c_void_p,)),
        "llama_vocab_eos": (c_int32, (c_void_p,)),
        "llama_vocab_get_text": (c_char_p, (c_void_p, c_int32)),
        "llama_tokenize": (c_int32, (c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool)),
        "llama_get_memory": (c_void_p, (c_void_p,)),
        "llama_memory_clear": (None, (c_void_p, c_bool)),
        "llama_decode": (c_int32, (c_void_p, Batch)),
        "llama_get_logits_ith": (POINTER(c_float), (c_void_p, c_int32)),
    }
    for name, (result, arguments) in declared.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments


def last_error() -> str:
    """What llama.cpp said last of an error."""
    return _said[-1] if _said else "it does not say why"
