"""The trained weights in 32 bits, whatever precision the model computes in."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class _Slot:
    name: str
    parameter: nn.Parameter
    start: int
    stop: int


def _is_second_factor(name: str) -> bool:
    """Whether PEFT calls a weight the second factor of an adapter on a linear module."""
    return "lora_B" in name.split(".")


class Masters:
    """Every weight that is trained, as one flat vector of at least 32 bits, with its gradient in another.

    Where the model computes in that precision its parameters are views of the vector. Where it computes in bfloat16 its
    parameters are copies, written once a step by `publish`, and each backward pass adds its gradients to the 32-bit
    ones, so that neither an update nor a sum over micro-batches is rounded to bfloat16.

    The vector's first `decayed` elements are matrices; the rest are vectors (biases and norms), which no weight decay
    shrinks. Of the matrices the first `first` elements are all but the second factors of adapters, which may learn at a
    rate of their own.

    `cast_frozen`: the weights that are not trained compute in that precision too, and are kept beside as they were.
    """

    def __init__(self, model: nn.Module, compute_dtype: torch.dtype, *, cast_frozen: bool = False) -> None:
        named = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
        named.sort(key=lambda pair: (pair[1].ndim < 2, _is_second_factor(pair[0])))  # stable: each in the model's order
        total = sum(each.numel() for _, each in named)
        device = named[0][1].device
        dtype = torch.promote_types(compute_dtype, torch.float32)
        self.values = torch.empty(total, dtype=dtype, device=device)
        self.gradients = torch.zeros(total, dtype=dtype, device=device)
        matrices = [(name, each) for name, each in named if each.ndim >= 2]
        self.decayed = sum(each.numel() for _, each in matrices)
        self.first = sum(each.numel() for name, each in matrices if not _is_second_factor(name))
        self._copies = compute_dtype != dtype
        self._slots: list[_Slot] = []
        start = 0
        for name, parameter in named:
            slot = _Slot(name, parameter, start, start + parameter.numel())
            start = slot.stop
            self._slots.append(slot)
            self._adopt(slot, compute_dtype)
        self._frozen: dict[int, torch.Tensor] = {}
        for frozen in model.parameters() if cast_frozen and self._copies else ():
            if not frozen.requires_grad and frozen.is_floating_point():
                self._frozen[id(frozen)] = frozen.data
                frozen.data = frozen.data.to(compute_dtype)

    def _adopt(self, slot: _Slot, compute_dtype: torch.dtype) -> None:
        parameter = slot.parameter
        master, gradient = self._view(self.values, slot), self._view(self.gradients, slot)
        master.copy_(parameter.detach())
        if not self._copies:
            parameter.data = master
            parameter.grad = gradient
            return
        parameter.data = master.to(compute_dtype)

        def collect(leaf: torch.Tensor) -> None:
            if leaf.grad is not None:
                gradient.add_(leaf.grad)
                leaf.grad = None

        parameter.register_post_accumulate_grad_hook(collect)  # type: ignore[no-untyped-call]

    @staticmethod
    def _view(flat: torch.Tensor, slot: _Slot) -> torch.Tensor:
        return flat[slot.start : slot.stop].view(slot.parameter.shape)

    def named(self, flat: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (the parameter's name, its part of `flat` as a view of its shape)."""
        for slot in self._slots:
            yield slot.name, self._view(flat, slot)

    def publish(self) -> None:
        """Makes the model compute with the masters as they are now."""
        if self._copies:
            with torch.no_grad():
                for slot in self._slots:
                    slot.parameter.copy_(self._view(self.values, slot))

    def zero_gradients(self) -> None:
        """Forgets what the last step, or half of one, left."""
        self.gradients.zero_()

    def state_dict(self, model: nn.Module, *, copy: bool = True) -> dict[str, torch.Tensor]:
        """The model's state with the trained weights in the masters' precision (copies, or the masters themselves), and
        the others as they were. Names that share a weight share its tensor here too."""
        views = {id(slot.parameter): self._view(self.values, slot).detach() for slot in self._slots}
        masters = self._frozen | ({each: view.clone() for each, view in views.items()} if copy else views)
        return {name: masters.get(id(each), each.detach()) for name, each in model.state_dict(keep_vars=True).items()}

    def __len__(self) -> int:
        return self.values.numel()
