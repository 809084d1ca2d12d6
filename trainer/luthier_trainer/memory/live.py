"""How much memory tensors take while a model computes, told without computing: the tensors are fakes.

A fake tensor has a shape, a dtype and a device, and a storage without memory. The very functions that train run on
them, whatever those are, and every storage that is made and freed on the way is counted. So nothing here knows what a
layer saves for its backward pass. The numbers of tokens are primes that divide nothing else in the model: a storage's
size tells what it is proportional to.
"""

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from luthier_trainer.memory.terms import Terms

_SMALL = 64


@dataclass(frozen=True)
class Sizes:
    """The numbers of a trace: two documents of `first` and `second` tokens, `scored` targets, and the loss's chunk of
    `chunk_rows` rows of a vocabulary."""

    first: int
    second: int
    scored: int
    chunk_rows: int
    vocabulary: int

    def terms(self, size: int) -> tuple[Terms, int]:
        """What a storage of so many bytes is proportional to; and the document (0, 1) whose pairs of tokens it holds,
        -1 for none or both."""
        a, b = self.first, self.second
        tokens = a + b
        if size <= _SMALL:
            return Terms(), -1
        if size % self.scored == 0:
            return Terms(scored=size / self.scored), -1
        if size % (tokens * tokens) == 0 or (a == b and size % (a * a) == 0):
            return Terms(pair=size / (a * a + b * b)), -1
        for document, length in enumerate((a, b)):
            if size % (length * length) == 0:
                return Terms(pair=size / (length * length)), document
        if size % tokens == 0:
            return Terms(token=size / tokens), -1
        if size % a == 0 or size % b == 0:
            return Terms(token=size / tokens), -1
        logits = self.chunk_rows * self.vocabulary
        if size in (2 * logits, 4 * logits):
            return Terms(chunk=size / self.chunk_rows), -1
        return Terms(always=float(size)), -1


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts, within its context, all storages that were made there and are still alive.

    What depends on no fake tensor and has integers or truth values is computed for real: models ask for the values of
    positions and of the borders of documents.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sizes = sizes
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._common = Terms()
        self._pairs = [0.0, 0.0]
        self.points: list[Terms] = []

    @property
    def now(self) -> Terms:
        """What is alive. Pairs that both documents hold at a time are `pair`, those of one alone are `alone`."""
        low, high = sorted(self._pairs)
        return self._common + Terms(pair=low, alone=high - low)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        if _is_real(inputs, kwargs):
            with _disable_current_modes():
                result = func(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        made = [each for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
        known = {each.untyped_storage()._cdata for each in inputs}
        counted = [self._count(each, known) for each in made]  # each of them, so no generator
        if any(counted):
            self.points.append(self.now)
        return result

    def _count(self, tensor: torch.Tensor, known: set[int]) -> bool:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in known or key in self._alive:
            return False
        terms, document = self._sizes.terms(storage.nbytes())
        self._add(terms, document)

        def freed(_: Any) -> None:
            del self._alive[key]
            self._add(terms.times(-1.0), document)

        self._alive[key] = weakref.ref(storage, freed)
        return True

    def _add(self, terms: Terms, document: int) -> None:
        if document < 0:
            self._common += terms
        else:
            self._pairs[document] += terms.pair


def _is_real(inputs: list[torch.Tensor], kwargs: dict[str, Any]) -> bool:
    if any(isinstance(each, FakeTensor) for each in inputs):
        return False
    dtypes = {each.dtype for each in inputs} | {each for each in kwargs.values() if isinstance(each, torch.dtype)}
    return bool(dtypes) and not any(each.is_floating_point for each in dtypes)


@contextlib.contextmanager
def faked(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Within, and within a fake mode, the model's parameters and buffers are fakes on the device. Gradients are as the
    engine holds them: kept where the model computes in 32 bits, else handed on as soon as they are there."""
    kept: list[tuple[dict[str, Any], str, Any]] = []
    made: dict[int, Any] = {}
    try:
        for module in model.modules():
            stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for held in stores:
                for name, real in list(held.items()):
                    if real is not None:
                        kept.append((held, name, real))
                        if id(real) not in made:
                            made[id(real)] = _fake(real, device)
                        held[name] = made[id(real)]
        yield
    finally:
        for held, name, real in reversed(kept):
            held[name] = real


def _fake(real: torch.Tensor, device: torch.device) -> torch.Tensor:
    empty = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device=device)
    if not isinstance(real, nn.Parameter):
        return empty
    fake = nn.Parameter(empty, requires_grad=real.requires_grad)
    if fake.requires_grad and fake.dtype == torch.promote_types(fake.dtype, torch.float32):
        fake.grad = torch.empty_like(empty)
    elif fake.requires_grad:
        fake.register_post_accumulate_grad_hook(_drop)  # type: ignore[no-untyped-call]
    return fake


def _drop(leaf: torch.Tensor) -> None:
    leaf.grad = None
