"""GGUF files, by llama.cpp: the library inside xllamacpp, called through its C interface (`llama.h`).

xllamacpp's own Python classes are parameters and a server, which gives no log-probabilities of a prompt; the library
beneath exports the whole interface. Its structures change with its versions: those used here are checked against the
defaults that the library itself gives, and a library that differs is refused.
"""

import contextlib
import ctypes
import importlib.metadata
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from ctypes import POINTER, Structure, byref, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from luthier_trainer.data.masks.template import Template
from luthier_trainer.errors import TrainingError
from luthier_trainer.export.proof.artefact import Artefact, Floats, Loader, NotLoaded
from luthier_trainer.export.proof.settings import require_same_metadata
from luthier_trainer.export.proof.texts import has_marks

_F32, _F16 = 0, 1
_BATCH = 128
"""Tokens that are computed at once: their logits are as wide as the vocabulary."""
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_MOST_METADATA = 1 << 20


class _ModelParams(Structure):
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


class _ContextParams(Structure):
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


class _Batch(Structure):
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
    "type_k": _F16,
    "type_v": _F16,
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
def _library() -> ctypes.CDLL:
    """Raises TrainingError PROOF_IMPOSSIBLE without xllamacpp, or with one whose interface is another."""
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
        raise _unknown(str(error)) from error
    for given, known in ((context, _CONTEXT_DEFAULTS), (model, _MODEL_DEFAULTS)):
        for name, value in known.items():
            if getattr(given, name) != value:
                raise _unknown(f"{name} is {getattr(given, name)} by default and not {value}")
    library.llama_log_set(_listener, None)
    library.llama_backend_init()
    return library


def _unknown(why: str) -> TrainingError:
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
        "llama_model_default_params": (_ModelParams, ()),
        "llama_context_default_params": (_ContextParams, ()),
        "llama_model_load_from_file": (c_void_p, (c_char_p, _ModelParams)),
        "llama_model_free": (None, (c_void_p,)),
        "llama_init_from_model": (c_void_p, (c_void_p, _ContextParams)),
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
        "llama_decode": (c_int32, (c_void_p, _Batch)),
        "llama_get_logits_ith": (POINTER(c_float), (c_void_p, c_int32)),
    }
    for name, (result, arguments) in declared.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments


def loader() -> Loader:
    """xllamacpp's llama.cpp. Raises TrainingError PROOF_IMPOSSIBLE."""
    _library()
    return Loader("llama.cpp", f"xllamacpp {importlib.metadata.version('xllamacpp')}")


class _Gguf:
    """A model in llama.cpp."""

    def __init__(self, library: ctypes.CDLL, model: int, context: int) -> None:
        self._library = library
        self._model = model
        self._context = context
        self._vocab = library.llama_model_get_vocab(model)
        self._width: int = library.llama_vocab_n_tokens(self._vocab)
        self._length = 0

    @property
    def ends(self) -> frozenset[int]:
        """What the file's metadata names an end, and llama.cpp stops at."""
        named = [self.metadata(f"tokenizer.ggml.{key}") for key in _END_KEYS]
        ids = {int(each) for each in named if each and each.isdecimal()}
        return frozenset(each for each in ids if self._library.llama_vocab_is_eog(self._vocab, each))

    @property
    def special(self) -> Mapping[str, int | None]:
        """None: a file has an `eos` or a `bos` for other reasons too, and `ends` tells where llama.cpp stops."""
        return {}

    def tokenise(self, text: str, *, special: bool) -> list[int]:
        """As `Artefact.tokenise`; text that looks like a special token is one, as a rendered conversation needs."""
        raw = text.encode("utf-8", "replace")
        room = len(raw) + 16
        ids = (c_int32 * room)()
        count = self._library.llama_tokenize(self._vocab, raw, len(raw), ids, room, special, True)
        if count < 0:
            raise NotLoaded(f"llama.cpp does not tokenise a text of {len(raw)} bytes")
        return list(ids[:count])

    def knows(self, text: str) -> bool:
        """llama.cpp composes no letters with their marks, as some tokenizers do first, and some of its rules for
        cutting words take no notice of marks: with no file does it cut those texts otherwise."""
        return not has_marks(text)

    def template(self, like: Template) -> Template:
        """As `Artefact.template`: rendered by the training's own renderer, with the tokens that the file names."""
        variables = dict(like.variables)
        for name, token in (
            ("bos_token", self._library.llama_vocab_bos(self._vocab)),
            ("eos_token", self._library.llama_vocab_eos(self._vocab)),
        ):
            if name in variables and token >= 0:
                variables[name] = (self._library.llama_vocab_get_text(self._vocab, token) or b"").decode()
        return replace(like, source=self.metadata("tokenizer.chat_template") or "", variables=variables, name="")

    def logits(self, ids: Sequence[int], positions: Sequence[int]) -> Floats:
        """[positions, vocabulary], in batches that see what came before."""
        self._forget()
        found = np.zeros((len(positions), self._width), np.float32)
        row = 0
        for start in range(0, max(positions) + 1, _BATCH):
            part = ids[start : start + _BATCH]
            wanted = [each - start for each in positions if start <= each < start + len(part)]
            self._decode(part, wanted)
            for each in wanted:
                found[row] = self._at(each)
                row += 1
        return found

    def _forget(self) -> None:
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        self._length = 0

    def _decode(self, ids: Sequence[int], wanted: Sequence[int]) -> None:
        if any(not 0 <= each < self._width for each in ids):
            raise NotLoaded(f"its vocabulary has {self._width} tokens, and a row has {max(ids)}")
        count = len(ids)
        tokens, places, outputs = (c_int32 * count)(*ids), (c_int32 * count)(), (c_int8 * count)()
        places[:] = list(range(self._length, self._length + count))
        for each in wanted:
            outputs[each] = 1
        status = self._library.llama_decode(self._context, _Batch(count, tokens, None, places, None, None, outputs))
        if status != 0:
            raise NotLoaded(f"llama.cpp does not compute: {_why()} ({status})")
        self._length += count

    def _at(self, place: int) -> Floats:
        pointer = self._library.llama_get_logits_ith(self._context, place)
        if not pointer:
            raise NotLoaded("llama.cpp gives no logits")
        found: Floats = np.ctypeslib.as_array(pointer, (self._width,)).copy()
        return found if np.isfinite(found).all() else np.nan_to_num(found, nan=-1e30, posinf=1e30, neginf=-1e30)

    def metadata(self, key: str) -> str:
        """The file's own value of a key; empty where it has none."""
        buffer = ctypes.create_string_buffer(_MOST_METADATA)
        length = self._library.llama_model_meta_val_str(self._model, key.encode(), buffer, len(buffer))
        return buffer.value.decode(errors="replace") if length >= 0 else ""


@contextlib.contextmanager
def load(file: Path, adapter: Path | None, *, base: Path, longest: int, threads: int) -> Iterator[Artefact]:
    """A GGUF file's model, with a GGUF adapter on it if there is one; texts have `longest` tokens at most. `base`:
    whose configuration the file must tell.

    It computes on the CPU, attends to keys and values in 32 bits, and does not repack the weights: what differs is what
    is in the file, and rounding of llama.cpp's own, which multiplies weights of 16 and fewer bits with activations as
    narrow. Raises NotLoaded, and TrainingError PROOF_IMPOSSIBLE.
    """
    library = _library()
    with contextlib.ExitStack() as stack:
        settings: _ModelParams = library.llama_model_default_params()
        settings.n_gpu_layers = 0
        settings.check_tensors = True
        settings.use_extra_bufts = False
        model = _opened(library.llama_model_load_from_file(str(file).encode(), settings))
        stack.callback(library.llama_model_free, model)
        wanted: _ContextParams = library.llama_context_default_params()
        wanted.n_ctx = longest
        wanted.n_batch = wanted.n_ubatch = wanted.n_outputs_max = wanted.n_outputs_max_per_seq = _BATCH
        wanted.n_threads = wanted.n_threads_batch = threads
        wanted.flash_attn_type = 0
        wanted.type_k = wanted.type_v = _F32
        context = _opened(library.llama_init_from_model(model, wanted))
        stack.callback(library.llama_free, context)
        if library.llama_n_ctx(context) < longest or library.llama_n_threads(context) != threads:
            raise _unknown("a context is not as it was asked for")
        if adapter is not None:
            lora = _opened(library.llama_adapter_lora_init(model, str(adapter).encode()))  # freed with the model
            scale = c_float(1.0)
            if library.llama_set_adapters_lora(context, byref(c_void_p(lora)), 1, byref(scale)) != 0:
                raise NotLoaded(f"llama.cpp does not take the adapter: {_why()}")
        loaded = _Gguf(library, model, context)
        require_same_metadata(base, loaded.metadata)
        yield loaded


def _opened(handle: int | None) -> int:
    if not handle:
        raise NotLoaded(f"llama.cpp refuses it: {_why()}")
    return handle


def _why() -> str:
    return _said[-1] if _said else "it does not say why"
