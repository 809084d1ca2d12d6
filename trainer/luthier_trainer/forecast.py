"""What a job would take of memory, told from configurations alone, and what would make it fit."""

import dataclasses
import functools
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from luthier.trainer.v1.task_pb2 import BaseModelSource
from luthier.v1 import job_pb2
from luthier_trainer import memory
from luthier_trainer.config import LoraSettings, Settings
from luthier_trainer.memory.activations import can_checkpoint
from luthier_trainer.model import Trained, load_config
from luthier_trainer.plan import Compute

_SHORTEST = 16
_ROUND = 8
"""Lengths are advised in multiples of this."""


@dataclass(frozen=True)
class Extent:
    """What memory depends on of the rows: tokens of the longest example, and the most tokens and targets that a row has
    in all of its examples."""

    longest: int
    tokens: int
    targets: int


@dataclass(frozen=True)
class Room:
    """Bytes that training may take over a loaded process; `limit` of 0 is unknown. host: the same of the host's memory,
    the process included. most: tokens of a micro-batch at most; batch: examples of an optimizer step at most."""

    limit: int
    host: int
    most: int
    batch: int


@dataclass(frozen=True)
class Forecast:
    """How a job trains within its room: the fit, and what it takes of the host, the process included."""

    fit: memory.Fit
    host_bytes: int
    room: Room

    @property
    def fits(self) -> bool:
        """Whether the device and the host have room."""
        return self.fit.fits and (self.room.host <= 0 or self.host_bytes <= self.room.host)


class Outlook:
    """Foresees one way to train: a base model, its settings, where it computes."""

    def __init__(self, source: BaseModelSource, settings: Settings, compute: Compute) -> None:
        self._source = source
        self._settings = settings
        self._compute = compute

    @functools.cached_property
    def trained(self) -> Trained:
        """The model on the meta device. Raises as `memory.on_meta`."""
        return memory.on_meta(self._source, self._settings, self._compute)

    @functools.cache  # noqa: B019 - lives as long as the estimate
    def need(self, checkpointing: bool) -> memory.Need | None:
        """None where there is no checkpointing."""
        if checkpointing and not can_checkpoint(self.trained.causal_lm):
            return None
        return memory.need(self.trained, self._settings, self._compute, checkpointing=checkpointing)

    def forecast(self, extent: Extent, room: Room) -> Forecast:
        """For rows of this extent."""
        return self._forecast(self.need, extent, room)

    def has_room(self, extent: Extent, room: Room) -> bool:
        """Whether such rows fit; told by what takes least, which takes half as long to find out."""
        least = self.need(True) or self.need(False)
        return self._forecast(lambda _: least, extent, room).fits

    def _forecast(self, need_of: Callable[[bool], memory.Need | None], extent: Extent, room: Room) -> Forecast:
        def largest(budget: int) -> memory.Largest:
            tokens = max(min(budget, room.batch * extent.tokens), extent.longest)
            # An example longer than the budget goes alone.
            most = room.batch * extent.targets if budget >= extent.longest else max(extent.targets, budget)
            return memory.Largest(tokens, min(tokens, most), extent.longest)

        found = memory.fit(need_of, largest, room.limit, room.most)
        need = need_of(found.checkpointing)
        assert need is not None
        return Forecast(found, memory.host_need(need, self._compute.device, found.predicted_bytes), room)


def remedies(
    source: BaseModelSource, settings: Settings, compute: Compute, extent: Extent, room: Room, seconds: float
) -> list[str]:
    """What would make a job fit that does not, each told from a forecast of its own, the least change first. Once there
    is one, no other is looked for after so many seconds."""
    until = time.monotonic() + seconds
    found: list[str] = []
    for advise in (_shorter_rows, _smaller_rank, _narrower, _quantized, _adapter, _smaller_base):
        if found and time.monotonic() > until:
            break
        found += advise(source, settings, compute, extent, room)
    return found


def _fits(source: BaseModelSource, settings: Settings, compute: Compute, extent: Extent, room: Room) -> bool:
    return Outlook(source, settings, compute).has_room(extent, room)


def _shorter_rows(
    source: BaseModelSource, settings: Settings, compute: Compute, extent: Extent, room: Room
) -> Iterator[str]:
    outlook = Outlook(source, settings, compute)

    def fits(rounds: int) -> bool:
        return outlook.has_room(dataclasses.replace(extent, longest=rounds * _ROUND), room)

    best = _largest(_SHORTEST // _ROUND, (extent.longest - 1) // _ROUND, fits)
    if best:
        yield f"Lower max_length to {best * _ROUND} (the longest row has {extent.longest} tokens now)."


def _smaller_rank(
    source: BaseModelSource, settings: Settings, compute: Compute, extent: Extent, room: Room
) -> Iterator[str]:
    adapter = settings.lora
    if adapter is None or source.adapter_dir:
        return
    rank = adapter.rank // 2
    while rank:
        smaller = dataclasses.replace(settings, lora=dataclasses.replace(adapter, rank=rank))
        if _fits(source, smaller, compute, extent, room):
            yield f"Lower lora.rank from {adapter.rank} to {rank}."
            return
        rank //= 4


def _narrower(
    source: BaseModelSource, settings: Settings, compute: Compute, extent: Extent, room: Room
) -> Iterator[str]:
    if compute.dtype != torch.float32:
        return
    narrow = dataclasses.replace(compute, dtype=torch.bfloat16)
    if _fits(source, settings, narrow, extent, room):
        slower = ", which is slower on this CPU" if compute.device.type == "cpu" else ""
        yield f"Set dtype to bfloat16{slower}."


def _quantized(
    source: BaseModelSource, settings: Settings, compute: Compute, extent: Extent, room: Room
) -> Iterator[str]:
    adapter = settings.lora
    if adapter is None or adapter.quantization != job_pb2.LORA_QUANTIZATION_NONE or not _has_bitsandbytes():
        return
    quantized = dataclasses.replace(adapter, quantization=job_pb2.LORA_QUANTIZATION_NF4)
    if _fits(source, dataclasses.replace(settings, lora=quantized), compute, extent, room):
        yield "Set lora.quantization to nf4: the frozen weights are held in 4 bits."


def _adapter(
    source: BaseModelSource, settings: Settings, compute: Compute, extent: Extent, room: Room
) -> Iterator[str]:
    if settings.lora is not None:
        return
    adapter = LoraSettings(rank=16, alpha=32.0, dropout=0.0, target_modules=("all-linear",), modules_to_save=())
    with_adapter = dataclasses.replace(settings, lora=adapter, train_last_layers=0)
    if _fits(source, with_adapter, compute, extent, room):
        yield "Train an adapter (lora) in place of all weights (full)."
    elif _has_bitsandbytes():
        quantized = dataclasses.replace(adapter, quantization=job_pb2.LORA_QUANTIZATION_NF4)
        if _fits(source, dataclasses.replace(with_adapter, lora=quantized), compute, extent, room):
            yield "Train an adapter on weights in 4 bits (lora.quantization: nf4) in place of all weights (full)."


def _smaller_base(
    source: BaseModelSource, settings: Settings, compute: Compute, extent: Extent, room: Room
) -> Iterator[str]:
    """The same model with fewer layers, which says how large one may be."""
    config = load_config(source)
    if not isinstance(config, PretrainedConfig) or source.adapter_dir:
        return
    layers = config.get_text_config().num_hidden_layers
    found: dict[int, int] = {}

    def fits(count: int) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            _with_layers(config, count).save_pretrained(folder)
            outlook = Outlook(BaseModelSource(location=folder), settings, compute)
            found[count] = outlook.trained.base_parameters
            return outlook.has_room(extent, room)

    best = _largest(1, layers - 1, fits)
    if best:
        yield (
            f"Take a smaller base model: one like this with {best} of its {layers} layers,"
            f" {found[best] / 1e6:,.1f} million weights, would fit."
        )


def _with_layers(config: PretrainedConfig, count: int) -> PretrainedConfig:
    smaller = type(config).from_dict(config.to_dict())
    text = smaller.get_text_config()
    text.num_hidden_layers = count
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:count]
    return smaller


def _largest(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The largest number of the range for which it holds, if it does for all below one of them; 0 for none."""
    if high < low or not holds(low):
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _has_bitsandbytes() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None
