"""safetensors files, read and written one tensor at a time.

The format (github.com/huggingface/safetensors): the length of the header (u64, little endian), the header as a JSON
object of `{name: {dtype, shape, data_offsets}}`, then the bytes. Files are read by position and not mapped: a page of a
mapped file counts as memory of the process, and one of a file that was cut off ends it.
"""

import contextlib
import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from luthier_trainer.errors import TrainingError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100 << 20
_CHUNK = 1 << 24
"""Bytes that are handed to the system at once."""


@dataclass(frozen=True)
class Stored:
    """A tensor's kind and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """A safetensors file to read from; a context manager. Raises TrainingError MODEL_DAMAGED for one that is broken or
    shorter than its header says."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        try:
            self.tensors, self._places = self._header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the reading."""
        self._file.close()

    def read(self, name: str) -> torch.Tensor:
        """A tensor of its own memory. Raises KeyError for a name that is not in the file."""
        stored = self.tensors[name]
        tensor = torch.empty(stored.shape, dtype=stored.dtype)
        if stored.size_bytes:
            target = _bytes(tensor)
            self._file.seek(self._places[name])
            filled = 0
            while filled < len(target):
                count = self._file.readinto(target[filled : filled + _CHUNK])
                if not count:
                    raise self._damaged("was cut off")
                filled += count
        return tensor

    def _header(self) -> tuple[dict[str, Stored], dict[str, int]]:
        """What the file holds, and where each tensor's bytes begin."""
        size = os.fstat(self._file.fileno()).st_size
        prefix = self._file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER + 1
        if length > min(_MAX_HEADER, size - 8):
            raise self._damaged("is no safetensors file, or was cut off")
        tensors: dict[str, Stored] = {}
        places: dict[str, int] = {}
        try:
            described: dict[str, Any] = json.loads(_whole(self._file, length))
            described.pop("__metadata__", None)
            for name, each in described.items():
                begin, end = each["data_offsets"]
                stored = Stored(_DTYPES[each["dtype"]], tuple(int(size) for size in each["shape"]))
                if end - begin != stored.size_bytes or begin < 0 or min(stored.shape, default=0) < 0:
                    raise ValueError(name)
                if end > size - 8 - length:
                    raise self._damaged("was cut off")
                tensors[name], places[name] = stored, 8 + length + begin
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._damaged("has a header that is broken, or number formats that are not known") from error
        return tensors, places

    def _damaged(self, what: str) -> TrainingError:
        return TrainingError("MODEL_DAMAGED", f"{self._path.name} {what}.", "Fetch or make the model anew.")


class TensorFileWriter:
    """A safetensors file that is written in the order of `tensors`; a context manager. What it holds is known before
    its first number is."""

    def __init__(self, path: Path, tensors: Mapping[str, Stored]) -> None:
        self._waiting = list(tensors.items())[::-1]
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115
        self._file.write(_header(tensors))

    def __enter__(self) -> "TensorFileWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None and self._waiting:
            raise ValueError(f"{len(self._waiting)} tensors were not written")

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes the next tensor. Raises ValueError for another one than was announced."""
        expected, stored = self._waiting.pop()
        if name != expected or tensor.dtype != stored.dtype or tuple(tensor.shape) != stored.shape:
            raise ValueError(f"{name} of {tensor.dtype} {tuple(tensor.shape)} in place of {expected} {stored}")
        _write_bytes(self._file, tensor)


class Gathered:
    """Tensors that are gathered on the disk for a safetensors file, because what a file will hold is known only when
    all of them are made; a context manager, whose files have no name.

    Widths of numbers are gathered apart: each tensor must lie at a multiple of its own.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = contextlib.ExitStack()
        self._begin()

    def __enter__(self) -> "Gathered":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def size_bytes(self) -> int:
        """Bytes of what is gathered."""
        return sum(each.size_bytes for each in self._held.values())

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Gathers one more."""
        stored = Stored(tensor.dtype, tuple(tensor.shape))
        if stored.dtype.itemsize not in self._files:
            file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115
            self._files[stored.dtype.itemsize] = self._stack.enter_context(file)
        _write_bytes(self._files[stored.dtype.itemsize], tensor)
        self._held[name] = stored

    def write(self, path: Path) -> dict[str, Stored]:
        """Writes what is gathered into a file, and begins anew. Returns what the file holds."""
        held = in_writing_order(self._held)
        with open(path, "wb") as target:
            target.write(_header(held))
            for _, file in sorted(self._files.items(), reverse=True):
                file.seek(0)
                shutil.copyfileobj(file, target, _CHUNK)
        self._stack.close()
        self._begin()
        return held

    def _begin(self) -> None:
        self._files: dict[int, Any] = {}
        self._held: dict[str, Stored] = {}


def _header(tensors: Mapping[str, Stored]) -> bytes:
    """What a file of these tensors begins with."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, each in tensors.items():
        header[name] = {
            "dtype": _NAMES[each.dtype],
            "shape": list(each.shape),
            "data_offsets": [place, place + each.size_bytes],
        }
        place += each.size_bytes
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded


def _write_bytes(file: Any, tensor: torch.Tensor) -> None:
    """Appends a tensor's numbers; an unbuffered file may take fewer than it is given."""
    if not tensor.numel():
        return
    source = _bytes(tensor.contiguous())
    written = 0
    while written < len(source):
        written += file.write(source[written : written + _CHUNK])


def in_writing_order(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Wider numbers first, so that each lies at a multiple of its own size."""
    return dict(sorted(tensors.items(), key=lambda each: -each[1].dtype.itemsize))


def shards(tensors: Mapping[str, Stored], max_bytes: int) -> list[dict[str, Stored]]:
    """The tensors in files of at most `max_bytes`, in order; a larger tensor has a file of its own."""
    files: list[dict[str, Stored]] = [{}]
    filled = 0
    for name, each in tensors.items():
        if files[-1] and filled + each.size_bytes > max_bytes:
            files.append({})
            filled = 0
        files[-1][name] = each
        filled += each.size_bytes
    return files


def shard_names(count: int) -> Sequence[str]:
    """What transformers calls the files of a model."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    numbers: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(numbers)


def _whole(file: Any, length: int) -> bytes:
    """`length` bytes; an unbuffered read may give fewer."""
    content = bytearray()
    while len(content) < length:
        block = file.read(length - len(content))
        if not block:
            break
        content += block
    return bytes(content)
