"""NEFTune: noise on the input embeddings while training (Jain et al. 2023, arXiv 2310.05914).

Every token of an example of L tokens gets noise from the uniform distribution on [-a, a], a = alpha / sqrt(L d), where
d is the width of the embeddings: L is the example's own length, however examples are laid out in a micro-batch, and
padding gets none. The draws of an example depend on the seed of its step and on its place among the step's examples
alone, so they are the same after a resume and for any cut into micro-batches.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class _Draw:
    """What the forward pass of one micro-batch adds: its examples' lengths and the seed of each."""

    lengths: Sequence[int]
    seeds: Sequence[int]


class Neftune:
    """Adds noise to what a model's input embeddings give, within `noise` alone; with an `alpha` of 0 never."""

    def __init__(self, model: PreTrainedModel, alpha: float) -> None:
        self._alpha = alpha
        self._draw: _Draw | None = None
        if alpha > 0:
            embeddings: nn.Module = model.get_input_embeddings()
            embeddings.register_forward_hook(self._add)

    @contextlib.contextmanager
    def noise(self, lengths: Sequence[int], *, first: int, seed: int) -> Iterator[None]:
        """A forward pass within gets the noise of examples of these lengths, the first of which is the `first`-th, from
        0, of the step whose draws depend on `seed`."""
        seeds = [_seed(seed, first + number) for number in range(len(lengths))] if self._alpha > 0 else []
        self._draw = _Draw(lengths, seeds) if seeds else None
        try:
            yield
        finally:
            self._draw = None

    def _add(self, module: nn.Module, arguments: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        draw = self._draw
        if draw is None:
            return None
        width = output.shape[-1]
        noise = torch.zeros(output.shape, dtype=torch.float32, device=output.device)
        generator = torch.Generator(output.device)
        flat = len(output) == 1
        start = 0
        for row, (length, seed) in enumerate(zip(draw.lengths, draw.seeds, strict=True)):
            bound = self._alpha / (length * width) ** 0.5
            part = noise[0, start : start + length] if flat else noise[row, :length]
            part.uniform_(-bound, bound, generator=generator.manual_seed(seed))
            start += length
        return output + noise.to(output.dtype)


def _seed(step: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"neftune {step} {number}".encode()).digest()[:8], "little") >> 1
