"""From examples to micro-batches on the device, as the plan says."""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from luthier_trainer.flatten import Example, MicroBatch, cut, cut_padded, flattened, padded


@dataclass(frozen=True)
class Batches:
    """How examples become micro-batches: flattened for attention per document, else padded with `pad_id`.

    `borders`: examples of at most so many tokens and longer ones go apart (`rope.borders`).
    """

    documents: bool
    budget: int
    pad_id: int
    device: torch.device
    borders: tuple[int, ...] = ()

    def of(self, examples: Iterable[Example]) -> Iterator[MicroBatch]:
        """Yields micro-batches of at most `budget` tokens; an example longer than that goes alone."""
        for group in self._apart(examples):
            if self.documents:
                for run in cut(group, self.budget):
                    yield flattened(run).to(self.device)
            else:
                for run in cut_padded(group, self.budget):
                    yield padded(run, self.pad_id).to(self.device)

    def _apart(self, examples: Iterable[Example]) -> Iterable[Iterable[Example]]:
        if not self.borders:
            return (examples,)
        groups: list[list[Example]] = [[] for _ in range(len(self.borders) + 1)]
        for example in examples:
            groups[bisect_left(self.borders, len(example.input_ids))].append(example)
        return groups
