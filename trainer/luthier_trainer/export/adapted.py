"""What an adapter does to each weight of its base.

PEFT's own modules, on the meta device, tell which weight that is, with which scale, and which way round it lies.
"""

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Embedding, Linear, LoraLayer, ParamWrapper
from peft.tuners.lora.variants import DoraEmbeddingVariant, DoraLinearVariant
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from luthier_trainer.export.source import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_json
from luthier_trainer.export.stored import unsupported
from luthier_trainer.export.tensor_file import TensorFile

_ADAPTER = "default"
_PREFIX = "base_model.model."
_OWN_BASE = (True, False, "gaussian", "orthogonal", "eva")
"""Starts of an adapter that leave the base's weights alone; PiSSA, OLoRA and others do not."""


@dataclass(frozen=True)
class Change:
    """What is added to a weight: scale B A, and with DoRA the magnitudes of its columns.

    scale: with rslora alpha over the root of the rank. flipped: whether the weight is [inputs, outputs], as GPT-2's and
    embeddings are. experts: how many a weight of three dimensions has; A is [experts * rank, inputs] then and B
    [outputs, rank * experts]. a, b, magnitude: names in the adapter's file; the last is empty without DoRA.
    """

    scale: float
    flipped: bool
    experts: int
    a: str
    b: str
    magnitude: str = ""


class Adapted:
    """An adapter on disk. changes: to weights of the base, by its modules' names; replaced: weights that it holds whole
    (modules_to_save, biases), each with its name in the file.

    model: the base on the meta device; PEFT wraps it, so it is of no other use afterwards. Raises TrainingError
    EXPORT_UNSUPPORTED for adapters whose effect is no change of weights, or of which a tensor is not understood.
    """

    def __init__(self, directory: Path, model: PreTrainedModel) -> None:
        config = _configuration(directory)
        _require_known(config, model)
        self._file = TensorFile(directory / ADAPTER_WEIGHTS)
        try:
            self.changes, self.replaced = _places(_wrapped(model, config))
            self._require_all_used()
        except BaseException:
            self._file.close()
            raise

    @property
    def touched(self) -> frozenset[str]:
        """Every weight that is not the base's own any more."""
        return frozenset(self.changes) | frozenset(self.replaced)

    def close(self) -> None:
        """Ends the reading."""
        self._file.close()

    def replacement(self, name: str) -> torch.Tensor:
        """The weight that the adapter holds whole."""
        return self._file.read(self.replaced[name])

    @torch.no_grad()
    def merge(self, name: str, weight: torch.Tensor) -> None:
        """Adds what the adapter adds to a weight in 32 bits, in its own memory."""
        change = self.changes[name]
        a, b = self._file.read(change.a).float(), self._file.read(change.b).float()
        if weight.ndim == 3:
            a = a.reshape(change.experts, -1, a.shape[-1])
            b = b.reshape(b.shape[0], -1, change.experts)
            for number, expert in enumerate(weight):
                _add(expert, a[number], b[:, :, number], change)
        else:
            _add(weight, a, b, change)
        if change.magnitude:
            # DoRA, equation 5: the norm of each output's weights is what was learnt.
            outputs = 1 if change.flipped else 0
            norms = torch.linalg.vector_norm(weight, dim=1 - outputs)
            weight *= (self._file.read(change.magnitude).float() / norms).unsqueeze(1 - outputs)

    def _require_all_used(self) -> None:
        known = {each for change in self.changes.values() for each in (change.a, change.b, change.magnitude)} - {""}
        known |= set(self.replaced.values())
        there = self._file.tensors.keys()
        for name in sorted(known - there):
            raise unsupported(f"its adapter lacks {name}")
        for name in sorted(there - known):
            bias = name.removeprefix(_PREFIX)
            if not name.startswith(_PREFIX) or not bias.endswith(".bias"):
                raise unsupported(f"its adapter has {name}, which is no part of a LoRA adapter for this base")
            self.replaced[bias.replace(".base_layer.", ".")] = name


def _add(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, change: Change) -> None:
    if change.flipped:
        weight.addmm_(a.T, b.T, alpha=change.scale)
    else:
        weight.addmm_(b, a, alpha=change.scale)


def _configuration(directory: Path) -> LoraConfig:
    kind = read_json(directory / ADAPTER_CONFIG).get("peft_type")
    if kind != "LORA":
        raise unsupported(f"its adapter is of type {kind}, and only LoRA can be merged")
    try:
        config = LoraConfig.from_pretrained(str(directory))
    except (TypeError, ValueError) as error:
        raise unsupported(f"PEFT does not read its adapter's configuration: {error}".splitlines()[0]) from error
    assert isinstance(config, LoraConfig)
    return config


def _wrapped(model: PreTrainedModel, config: LoraConfig) -> nn.Module:
    """The model with the adapter's modules, on the meta device."""
    config = copy.deepcopy(config)
    config.inference_mode = True
    config.init_lora_weights = False
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # that weights are tied: merging knows
        try:
            inside = get_peft_model(model, config).get_base_model()
        except ValueError as error:
            raise unsupported(f"its adapter does not fit to its base: {error}".splitlines()[0]) from error
    assert isinstance(inside, nn.Module)
    return inside


def _places(model: nn.Module) -> tuple[dict[str, Change], dict[str, str]]:
    """(changes by the weight's name, the file's names of replacements by the weight's name)."""
    changes: dict[str, Change] = {}
    replaced: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            if not isinstance(module, ModulesToSaveWrapper):
                raise unsupported(f"its adapter has a {type(module).__name__}")
            whole = module.modules_to_save[_ADAPTER].state_dict()
            replaced.update({f"{name}.{each}": f"{_PREFIX}{name}.{each}" for each in whole})
        elif isinstance(module, LoraLayer):
            base = name
            while base.endswith(".base_layer"):  # each parameter of a module has a wrapper of its own
                base = base.removesuffix(".base_layer")
            parameter = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
            weight = f"{base}.{parameter}"
            if weight in changes or "modules_to_save" in base.split(".") or module.lora_bias.get(_ADAPTER):
                raise unsupported(f"its adapter changes {base} in a way that is not known")
            changes[weight] = _change(name, module)
    return changes, replaced


def _change(name: str, layer: LoraLayer) -> Change:
    """What PEFT's layer does. Raises TrainingError EXPORT_UNSUPPORTED for kinds of layers that are not known."""
    variant = layer.lora_variant.get(_ADAPTER)
    if variant is not None and not isinstance(variant, DoraLinearVariant | DoraEmbeddingVariant):
        raise unsupported(f"its adapter uses {type(variant).__name__}")
    magnitude = f"{_PREFIX}{name}.lora_magnitude_vector" if variant is not None else ""
    experts = 1
    if isinstance(layer, Embedding):
        flipped, a, b = True, "lora_embedding_A", "lora_embedding_B"
    elif isinstance(layer, Linear):
        flipped, a, b = bool(layer.fan_in_fan_out), "lora_A.weight", "lora_B.weight"
    elif isinstance(layer, ParamWrapper):
        experts = layer.num_experts
        # PEFT takes [experts, inputs, outputs] for granted and notes where it is the other way round.
        flipped = experts > 1 and not layer._did_swap_in_out_features
        a, b = "lora_A.weight", "lora_B.weight"
    else:
        raise unsupported(f"its adapter changes {name}, a {type(layer).__name__}")
    scale = float(layer.scaling[_ADAPTER])
    return Change(scale, flipped, experts, f"{_PREFIX}{name}.{a}", f"{_PREFIX}{name}.{b}", magnitude)


def _require_known(config: LoraConfig, model: PreTrainedModel) -> None:
    if config.init_lora_weights not in _OWN_BASE:
        raise unsupported(f"its adapter was made with {config.init_lora_weights}, which changes the base's weights")
    if config.trainable_token_indices is not None:
        raise unsupported("its adapter trains single tokens")
    if config.layer_replication:
        raise unsupported("its adapter repeats layers of its base")
    if config.ensure_weight_tying and model.all_tied_weights_keys:
        raise unsupported("its adapter keeps tied weights tied (ensure_weight_tying)")
