"""A model's decoder layers, of which one of each kind stands for all."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from luthier_trainer.memory.live import Live
from luthier_trainer.memory.terms import Terms


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder's layers in order; none where they are not one list of modules."""
    decoder: nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
    total = int(model.config.get_text_config().num_hidden_layers)
    stacks = [each for each in decoder.children() if isinstance(each, nn.ModuleList) and len(each) == total]
    return list(stacks[0]) if len(stacks) == 1 else []


class Skipping:
    """Lets only the last layer of each kind compute; `skipped` tells what the others would have saved."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._layers = decoder_layers(model)
        self._kinds = _kinds(model, self._layers)
        self._saved: dict[Any, Terms] = {}
        self._width = 0

    @property
    def skipped(self) -> Terms:
        """What layers that did not compute would have left alive after a forward pass."""
        total = Terms()
        for place, kind in enumerate(self._kinds):
            if self._is_skipped(place):
                total += self._saved.get(kind, Terms())
        return total

    def _is_skipped(self, place: int) -> bool:
        return self._kinds[place] in self._kinds[place + 1 :]

    @contextlib.contextmanager
    def watch(self, live: Live) -> Iterator[None]:
        """Within, forward passes skip, and what each kind saves is noted from `live`."""
        hooks = []
        stubbed = []
        before: dict[int, Terms] = {}
        try:
            for place, layer in enumerate(self._layers):
                if self._is_skipped(place):
                    stubbed.append((layer, layer.__dict__.get("forward")))
                    layer.forward = self._pass_on
                    continue

                def start(_: nn.Module, *__: Any, place: int = place) -> None:
                    before[place] = live.now

                def end(_: nn.Module, __: Any, output: Any, place: int = place) -> None:
                    self._saved[self._kinds[place]] = live.now - before[place]

                hooks += [layer.register_forward_pre_hook(start), layer.register_forward_hook(end)]
            self._width = _outputs(self._layers)
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for layer, forward in stubbed:
                if forward is None:
                    del layer.__dict__["forward"]
                else:
                    layer.__dict__["forward"] = forward

    def _pass_on(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        return hidden_states if self._width == 0 else (hidden_states,)


def _outputs(layers: list[nn.Module]) -> int:
    """0 where a layer gives its hidden states, else how many things it gives: told by its annotation."""
    annotation = str(getattr(type(layers[0]).forward, "__annotations__", {}).get("return", "")) if layers else ""
    return 0 if "tuple" not in annotation.lower() else 1


def _kinds(model: PreTrainedModel, layers: list[nn.Module]) -> list[Any]:
    """Equal for layers that save the same: the same weights, trained alike, above the same."""
    gradient = any(each.requires_grad for each in model.get_input_embeddings().parameters())
    kinds = []
    for layer in layers:
        parameters = tuple((name, tuple(each.shape), each.requires_grad) for name, each in layer.named_parameters())
        attention = getattr(layer, "attention_type", None)
        inner = getattr(getattr(layer, "self_attn", None), "sliding_window", None)
        kinds.append((type(layer).__name__, attention, inner, gradient, parameters))
        gradient = gradient or any(each.requires_grad for each in layer.parameters())
    return kinds
