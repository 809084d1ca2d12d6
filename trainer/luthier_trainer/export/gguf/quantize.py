"""A tensor as the bytes of a GGUF file, slab by slab: never all of it at once."""

import ctypes
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from gguf import GGMLQuantizationType

from luthier_trainer.errors import TrainingError
from luthier_trainer.export.gguf.library import library
from luthier_trainer.export.gguf.types import row_bytes
from luthier_trainer.stop import Check

_SLAB = 1 << 20
"""Numbers of a slab: 4 MiB in 32 bits."""
_PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


class Slabs:
    """Turns tensors into bytes with some threads; a context manager."""

    def __init__(self, threads: int, check: Check) -> None:
        self._threads = max(threads, 1)
        self._pool = ThreadPoolExecutor(self._threads, "quantize")
        self._check = check

    def __enter__(self) -> "Slabs":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def of(
        self,
        name: str,
        tensor: torch.Tensor,
        kind: GGMLQuantizationType,
        rows: torch.Tensor | None = None,
        factor: float = 1.0,
        offset: float = 0.0,
    ) -> Iterator[memoryview]:
        """The bytes of a tensor of 32-bit numbers, (rows, columns) or a vector, in order.

        rows: the order that its rows are written in. Each number is multiplied by `factor` after `offset` is added.
        Quantised types are made of numbers rounded to 16 bits first, as llama.cpp makes them of a file in 16 bits.
        Raises TrainingError EXPORT_UNSUPPORTED for numbers that are not finite or not within the type's range, and what
        `check` raises.
        """
        if tensor.ndim == 1 and rows is not None:
            tensor, rows = tensor[rows], None
        flat = tensor if tensor.ndim == 2 else tensor.reshape(1, -1)
        step = max(_SLAB // max(flat.shape[1], 1), 1)
        waiting: deque[Future[memoryview]] = deque()
        for start in range(0, flat.shape[0], step):
            self._check()
            slab = flat[start : start + step] if rows is None else flat[rows[start : start + step]]
            if offset or factor != 1.0:
                slab = (slab + offset) * factor
            waiting.append(self._pool.submit(_bytes, name, slab.contiguous(), kind))
            if len(waiting) > self._threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _bytes(name: str, slab: torch.Tensor, kind: GGMLQuantizationType) -> memoryview:
    plain = _PLAIN.get(kind)
    rounded = slab.to(plain or torch.float16)
    if not torch.isfinite(rounded).all():
        raise _out_of_range(name, kind, bool(torch.isfinite(slab).all()))
    if plain is not None:
        return rounded.view(torch.uint8).reshape(-1).numpy().data
    numbers = rounded.float()
    rows, columns = numbers.shape
    made = bytearray(rows * row_bytes(kind, columns))
    target = (ctypes.c_ubyte * len(made)).from_buffer(made)
    size = library().ggml_quantize_chunk(int(kind), numbers.data_ptr(), target, 0, rows, columns, None)
    if size != len(made):
        raise RuntimeError(f"llama.cpp made {size} bytes of {name}, and {len(made)} were expected")
    return memoryview(made)


def _out_of_range(name: str, kind: GGMLQuantizationType, finite: bool) -> TrainingError:
    if finite:
        return TrainingError(
            "EXPORT_UNSUPPORTED",
            f"{name} holds numbers beyond 65,504, where 16-bit floating point ends, and {kind.name} is made of it.",
            "Export it as bf16.",
        )
    return TrainingError(
        "EXPORT_UNSUPPORTED",
        f"{name} holds numbers that are not finite: the model is damaged.",
        "Export an earlier checkpoint of its job.",
    )
