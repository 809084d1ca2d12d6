"""GGUF files, by llama.cpp."""

import contextlib
import ctypes
import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from ctypes import byref, c_float, c_int8, c_int32, c_void_p
from dataclasses import replace
from pathlib import Path

import numpy as np

from luthier_trainer.data.masks.template import Template
from luthier_trainer.export.proof.artefact import Artefact, Floats, Loader, NotLoaded
from luthier_trainer.export.proof.loaders.llama_interface import (
    F32,
    Batch,
    ContextParams,
    ModelParams,
    last_error,
    llama_cpp,
    unknown_interface,
)
from luthier_trainer.export.proof.settings import require_same_metadata
from luthier_trainer.export.proof.texts import has_variants

_BATCH = 128
"""Tokens that are computed at once: their logits are as wide as the vocabulary."""
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_MOST_METADATA = 1 << 20


def loader() -> Loader:
    """xllamacpp's llama.cpp. Raises TrainingError PROOF_IMPOSSIBLE."""
    llama_cpp()
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
        return not has_variants(text)

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
        status = self._library.llama_decode(self._context, Batch(count, tokens, None, places, None, None, outputs))
        if status != 0:
            raise NotLoaded(f"llama.cpp does not compute: {last_error()} ({status})")
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
    library = llama_cpp()
    with contextlib.ExitStack() as stack:
        settings: ModelParams = library.llama_model_default_params()
        settings.n_gpu_layers = 0
        settings.check_tensors = True
        settings.use_extra_bufts = False
        model = _opened(library.llama_model_load_from_file(str(file).encode(), settings))
        stack.callback(library.llama_model_free, model)
        wanted: ContextParams = library.llama_context_default_params()
        wanted.n_ctx = longest
        wanted.n_batch = wanted.n_ubatch = wanted.n_outputs_max = wanted.n_outputs_max_per_seq = _BATCH
        wanted.n_threads = wanted.n_threads_batch = threads
        wanted.flash_attn_type = 0
        wanted.type_k = wanted.type_v = F32
        context = _opened(library.llama_init_from_model(model, wanted))
        stack.callback(library.llama_free, context)
        if library.llama_n_ctx(context) < longest or library.llama_n_threads(context) != threads:
            raise unknown_interface("a context is not as it was asked for")
        if adapter is not None:
            lora = _opened(library.llama_adapter_lora_init(model, str(adapter).encode()))  # freed with the model
            scale = c_float(1.0)
            if library.llama_set_adapters_lora(context, byref(c_void_p(lora)), 1, byref(scale)) != 0:
                raise NotLoaded(f"llama.cpp does not take the adapter: {last_error()}")
        loaded = _Gguf(library, model, context)
        require_same_metadata(base, loaded.metadata)
        yield loaded


def _opened(handle: int | None) -> int:
    if not handle:
        raise NotLoaded(f"llama.cpp refuses it: {last_error()}")
    return handle
