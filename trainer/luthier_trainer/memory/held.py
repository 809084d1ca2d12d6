"""What training holds all the time: weights, gradients, moments and copies."""

from dataclasses import dataclass

import torch
from torch import nn

from luthier.v1 import job_pb2
from luthier_trainer.config import Settings
from luthier_trainer.model import Trained
from luthier_trainer.products import through_onednn

_MASTER = 4
_NF4, _INT8 = 0.5 + 1 / 64 + 4 / (64 * 256), 1.0
"""Bytes a weight: 4 bits with a scale of 8 bits for each 64 weights and one of 32 for each 256 of those; 8 bits."""


CODE = 35 << 20
"""Resident bytes of libraries that a loaded process has not touched before it trains on a CPU."""

_GENERATED = {torch.float32: 20 << 20, torch.bfloat16: 60 << 20}
"""Bytes of code that oneDNN generates, and what belongs to it: for each shape of a product, of which 64 are kept."""


def generated(device: torch.device, dtype: torch.dtype) -> int:
    """Bytes of code that products will have had generated after some steps; more than probes of two see."""
    uses = device.type == "cpu" and (dtype == torch.bfloat16 or through_onednn())
    return _GENERATED.get(dtype, 0) if uses else 0


@dataclass(frozen=True)
class Held:
    """Bytes. weights: as the model computes with them, those of trained ones excepted where they are the masters;
    trained: weights that are trained, counted; peak_load: at most while the weights are read and copied; peak_save:
    over all that is held, while a checkpoint is written."""

    weights: int
    trained: int
    peak_load: int
    peak_save: int

    @property
    def in_training(self) -> int:
        """With masters, gradients and both moments, in 32 bits each."""
        return self.weights + 4 * _MASTER * self.trained


def held(trained: Trained, settings: Settings, dtype: torch.dtype) -> Held:
    """Of a model that is loaded, or on the meta device."""
    quantised = _quantised(trained, settings)
    frozen = live = kept = count = 0
    for each in _distinct(trained.root.parameters()):
        size = each.numel() * each.element_size()
        if each.requires_grad:
            count += each.numel()
            if dtype != torch.promote_types(dtype, torch.float32):
                live += each.numel() * dtype.itemsize
        elif id(each) in quantised:
            frozen += int(each.numel() * quantised[id(each)])
        else:
            frozen += size
            if settings.lora is None and dtype.itemsize < each.element_size():
                kept += each.numel() * dtype.itemsize
    buffers = sum(each.numel() * each.element_size() for each in _distinct(trained.root.buffers()))
    weights = frozen + live + kept + buffers
    read = _MASTER * count if settings.lora is None else 0  # in 32 bits, then copied into the masters
    load = weights + _MASTER * count + read
    return Held(weights, count, load, 5 * _MASTER * count)


def _distinct(tensors: object) -> list[torch.Tensor]:
    return list({id(each): each for each in tensors}.values())  # type: ignore[attr-defined]


def _quantised(trained: Trained, settings: Settings) -> dict[int, float]:
    """Bytes for each element of frozen linear weights that are, or will be, held in 4 or 8 bits; none when they are
    counted as they lie there."""
    wanted = settings.lora.quantization if settings.lora else job_pb2.LORA_QUANTIZATION_NONE
    if wanted == job_pb2.LORA_QUANTIZATION_NONE or settings.lora is None:
        return {}
    head = trained.causal_lm.get_output_embeddings()  # type: ignore[no-untyped-call]
    result = {}
    for name, module in trained.causal_lm.named_modules():
        if not isinstance(module, nn.Linear) or module is head or type(module) is not nn.Linear:
            continue
        weight = module.weight
        if weight.requires_grad or ".lora_" in name or not weight.is_meta:
            continue
        result[id(weight)] = _INT8 if wanted == job_pb2.LORA_QUANTIZATION_INT8 else _NF4
    return result
