"""From examples to micro-batches on the device, as the plan says."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from luthier_trainer.flatten import Example, MicroBatch, cut, cut_padded, flattened, padded


@dataclass(frozen=True)
class Batches:
    """How examples become micro-batches: flattened for attention per document, else padded with `pad_id`."""

    documents: bool
    budget: int
    pad_id: int
    device: torch.device

    def of(self, examples: Iterable[Example]) -> Iterator[MicroBatch]:
        """Yields micro-batches of at most `budget` tokens; an example longer than that goes alone."""
        if self.documents:
            for run in cut(examples, self.budget):
                yield flattened(run).to(self.device)
        else:
            for run in cut_padded(examples, self.budget):
                yield padded(run, self.pad_id).to(self.device)
