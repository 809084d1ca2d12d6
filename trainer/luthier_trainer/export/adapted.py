"""What an adapter does to each weight of its base, by PEFT's own formulas on one layer at a time."""

import contextlib
import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.lora.variants import DoraEmbeddingVariant, DoraLinearVariant
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from luthier_trainer.export.source import ADAPTER_WEIGHTS
from luthier_trainer.export.stored import unsupported
from luthier_trainer.export.tensor_file import TensorFile

_ADAPTER = "default"
_PREFIX = "base_model.model."
_OWN_BASE = (True, False, "gaussian", "orthogonal", "eva")
"""Starts of an adapter that leave the base's weights alone; PiSSA, OLoRA and others do not."""


@dataclass(frozen=True)
class _Change:
    """layer: PEFT's layer on the meta device. tensors: its parameters by name, as the file calls them."""

    layer: LoraLayer
    parameter: str
    tensors: dict[str, str]


class Adapted:
    """An adapter on disk. `changed`: weights that it adds to, by the base's module names; `replaced`: weights that it
    holds whole (modules_to_save), biases among them.

    model: the base on the meta device; PEFT wraps it, so it is of no other use afterwards. Raises TrainingError
    EXPORT_UNSUPPORTED for adapters whose effect is no change of weights, or of which a tensor is not understood.
    """

    def __init__(self, directory: Path, model: PreTrainedModel) -> None:
        config = PeftConfig.from_pretrained(str(directory))
        if not isinstance(config, LoraConfig):
            raise unsupported(f"its adapter is of type {config.peft_type}, and only LoRA can be merged")
        _require_known(config, model)
        self._file = TensorFile(directory / ADAPTER_WEIGHTS)
        try:
            self._changes, self.replaced = _places(_wrapped(model, config))
            self._require_all_used()
        except BaseException:
            self._file.close()
            raise

    @property
    def changed(self) -> frozenset[str]:
        """The weights that `merged` has something to add to."""
        return frozenset(self._changes)

    def close(self) -> None:
        """Ends the reading."""
        self._file.close()

    def replacement(self, name: str) -> torch.Tensor:
        """The weight that the adapter holds whole."""
        return self._file.read(self.replaced[name])

    @torch.no_grad()
    def merged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A weight of the base in 32 bits with what the adapter adds, in 32 bits."""
        change = self._changes[name]
        layer = change.layer
        with self._filled(change, weight):
            variant = layer.lora_variant.get(_ADAPTER)
            if variant is None:
                merged = layer.get_delta_weight(_ADAPTER).add_(weight)
            else:
                merged = variant.merge_safe(layer, _ADAPTER, weight)
                layer._caches.clear()
        return merged

    @contextlib.contextmanager
    def _filled(self, change: _Change, weight: torch.Tensor) -> Iterator[None]:
        """The layer with real numbers in place of its shapes."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(_parameter(change.layer.get_base_layer(), change.parameter, weight))
            for own, stored in change.tensors.items():
                path, _, last = own.rpartition(".")
                owner = change.layer.get_submodule(path)
                stack.enter_context(_parameter(owner, last, self._file.read(stored).float()))
            yield

    def _require_all_used(self) -> None:
        known = {stored for each in self._changes.values() for stored in each.tensors.values()}
        known |= set(self.replaced.values())
        there = self._file.tensors.keys()
        for name in sorted(known - there):
            raise unsupported(f"its adapter lacks {name}")
        for name in sorted(there - known):
            bias = name.removeprefix(_PREFIX)
            if not name.startswith(_PREFIX) or not bias.endswith(".bias"):
                raise unsupported(f"its adapter has {name}, which is no part of a LoRA adapter for this base")
            self.replaced[bias.replace(".base_layer.", ".")] = name


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


def _places(model: nn.Module) -> tuple[dict[str, _Change], dict[str, str]]:
    """(changes by the weight's name, the file's names of replacements by the weight's name)."""
    changes: dict[str, _Change] = {}
    replaced: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            if not isinstance(module, ModulesToSaveWrapper):
                raise unsupported(f"its adapter has a {type(module).__name__}")
            whole = module.modules_to_save[_ADAPTER].state_dict()
            replaced.update({f"{name}.{each}": f"{_PREFIX}{name}.{each}" for each in whole})
        elif isinstance(module, LoraLayer):
            parameter = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
            base = name
            while base.endswith(".base_layer"):  # each parameter of a module has a wrapper of its own
                base = base.removesuffix(".base_layer")
            weight = f"{base}.{parameter}"
            if weight in changes or "modules_to_save" in base.split(".") or module.lora_bias.get(_ADAPTER):
                raise unsupported(f"its adapter changes {base} in a way that is not known")
            if not isinstance(module.lora_variant.get(_ADAPTER), type(None) | DoraLinearVariant | DoraEmbeddingVariant):
                raise unsupported(f"its adapter uses {type(module.lora_variant[_ADAPTER]).__name__}")
            changes[weight] = _Change(module, parameter, _tensors(name, module))
    return changes, replaced


def _tensors(name: str, layer: LoraLayer) -> dict[str, str]:
    """The layer's own parameters, each with its name in the file; what an adapter's parameter is called there is the
    name without the adapter's."""
    assert isinstance(layer, nn.Module)
    own = [each for each, _ in layer.named_parameters() if each.split(".")[0] in layer.adapter_layer_names]
    named = {}
    for each in own:
        parts = [part for part in each.split(".") if part != _ADAPTER]
        if parts[0] == "lora_magnitude_vector":
            parts = parts[:1]
        named[each] = f"{_PREFIX}{name}.{'.'.join(parts)}"
    return named


def _require_known(config: LoraConfig, model: PreTrainedModel) -> None:
    if config.init_lora_weights not in _OWN_BASE:
        raise unsupported(f"its adapter was made with {config.init_lora_weights}, which changes the base's weights")
    if config.trainable_token_indices is not None:
        raise unsupported("its adapter trains single tokens")
    if config.layer_replication:
        raise unsupported("its adapter repeats layers of its base")
    if config.ensure_weight_tying and model.all_tied_weights_keys:
        raise unsupported("its adapter keeps tied weights tied (ensure_weight_tying)")


@contextlib.contextmanager
def _parameter(owner: nn.Module, name: str, value: torch.Tensor) -> Iterator[None]:
    """The module with another parameter in the meantime. Not `setattr`: PEFT's ParameterDict has dots in its names."""
    before = owner._parameters[name]
    owner._parameters[name] = nn.Parameter(value, requires_grad=False)
    try:
        yield
    finally:
        owner._parameters[name] = before
