"""llama.cpp itself, as the package xllamacpp carries it: its C functions, without its server, which opens a port.

Only functions whose arguments have not changed for years are called. Parameters of a model are passed on as llama.cpp
fills them in, in a structure that is larger than theirs, so that no layout is assumed.
"""

import contextlib
import ctypes
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from luthier_trainer.errors import TrainingError

_LARGER = 4096
_ERROR = 4  # ggml_log_level


class _Parameters(ctypes.Structure):
    """Room for any `llama_model_params`: by the calling conventions of 64-bit systems, a structure of this size is
    passed as bytes in memory, of which the called function reads as many as it knows."""

    _fields_ = [("bytes", ctypes.c_ubyte * _LARGER)]


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


def require_packages() -> None:
    """Raises TrainingError EXPORT_UNSUPPORTED unless the extra `gguf` is installed."""
    if all(importlib.util.find_spec(each) for each in ("gguf", "xllamacpp")):
        return
    raise TrainingError(
        "EXPORT_UNSUPPORTED",
        "This server cannot write GGUF: the packages gguf and xllamacpp are not installed where models are trained.",
        "Install them there: pip install 'luthier-trainer[gguf]'.",
    )


@functools.cache
def library() -> ctypes.CDLL:
    """llama.cpp's functions, each with its types. Calls leave other Python threads running. Raises TrainingError."""
    require_packages()
    spec = importlib.util.find_spec("xllamacpp")
    folders = (spec.submodule_search_locations if spec else None) or []
    loaded = ctypes.CDLL(str(next(each for folder in folders for each in Path(folder).glob("xllamacpp*.so"))))
    loaded.ggml_quantize_chunk.restype = ctypes.c_size_t
    loaded.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,  # type
        ctypes.c_void_p,  # numbers of 32 bits
        ctypes.c_void_p,  # where to
        *[ctypes.c_int64] * 3,  # first number, rows, numbers of a row
        ctypes.c_void_p,  # weights of importance, or null
    ]
    loaded.llama_model_default_params.restype = _Parameters
    loaded.llama_model_default_params.argtypes = []
    loaded.llama_model_load_from_file.restype = ctypes.c_void_p
    loaded.llama_model_load_from_file.argtypes = [ctypes.c_char_p, _Parameters]
    loaded.llama_model_free.restype = None
    loaded.llama_model_free.argtypes = [ctypes.c_void_p]
    loaded.llama_model_get_vocab.restype = ctypes.c_void_p
    loaded.llama_model_get_vocab.argtypes = [ctypes.c_void_p]
    loaded.llama_tokenize.restype = ctypes.c_int32
    loaded.llama_tokenize.argtypes = [
        ctypes.c_void_p,  # vocabulary
        ctypes.c_char_p,
        ctypes.c_int32,
        ctypes.c_void_p,  # where to
        ctypes.c_int32,
        ctypes.c_bool,  # add what begins and ends a text
        ctypes.c_bool,  # read control tokens
    ]
    loaded.llama_log_set.restype = None
    loaded.llama_log_set.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    loaded.llama_log_get.restype = None
    loaded.llama_log_get.argtypes = [ctypes.POINTER(ctypes.c_void_p)] * 2
    return loaded


class Vocabulary:
    """A vocabulary as llama.cpp reads it."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def tokenize(self, text: str) -> list[int]:
        """The tokens of a text, with what the vocabulary begins and ends a text with; control tokens are read."""
        raw = text.encode()
        room = len(raw) + 16
        tokens = (ctypes.c_int32 * room)()
        count = library().llama_tokenize(self._handle, raw, len(raw), tokens, room, True, True)
        if count < 0:
            raise ValueError(f"llama.cpp needs {-count} tokens for {len(raw)} bytes")
        return list(tokens[:count])


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Vocabulary]:
    """The vocabulary of a GGUF file. Raises ValueError with what llama.cpp says when it refuses the file."""
    calls = library()
    with _listening() as errors:
        model = calls.llama_model_load_from_file(str(path).encode(), calls.llama_model_default_params())
        try:
            if not model:
                raise ValueError("; ".join(errors[:3]) or "llama.cpp does not load it")
            yield Vocabulary(calls.llama_model_get_vocab(model))
        finally:
            if model:
                calls.llama_model_free(model)


@contextlib.contextmanager
def _listening() -> Iterator[list[str]]:
    """llama.cpp's errors in place of its log on standard error."""
    errors: list[str] = []

    def keep(level: int, text: bytes | None, _user: object) -> None:
        if level == _ERROR and text:
            errors.append(text.decode("utf-8", errors="replace").strip())

    callback = _LOG(keep)
    before, data = ctypes.c_void_p(), ctypes.c_void_p()
    library().llama_log_get(ctypes.byref(before), ctypes.byref(data))
    library().llama_log_set(ctypes.cast(callback, ctypes.c_void_p), None)
    try:
        yield errors
    finally:
        library().llama_log_set(before, data)
