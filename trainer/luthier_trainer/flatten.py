"""Micro-batches: how the examples of an optimizer step are cut up. The cut changes speed and memory, never the
result."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch


class Example(Protocol):
    """A tokenised row: `input_ids` [n] and, for each token, whether it is `trained` [n]."""

    @property
    def input_ids(self) -> npt.NDArray[np.integer]: ...
    @property
    def trained(self) -> npt.NDArray[np.bool_]: ...


@dataclass(frozen=True)
class MicroBatch:
    """Examples that go through the model together.

    Flattened: `input_ids` [1, T], the documents one after the other, positions restarting, no mask.
    Padded: `input_ids` [B, L], each row padded at its end, with `attention_mask` [B, L].

    `scored` [n] holds the flat indices of the hidden states that predict a trained token, `targets` [n] those tokens.
    A document's first token has no predecessor and is never a target.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    lengths: tuple[int, ...]
    scored: torch.Tensor
    targets: torch.Tensor

    @property
    def tokens(self) -> int:
        """Real tokens, padding not counted."""
        return sum(self.lengths)

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on a device."""
        if device.type == "cpu":
            return self

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return to_device(tensor, device)

        mask = None if self.attention_mask is None else move(self.attention_mask)
        return MicroBatch(
            move(self.input_ids), move(self.position_ids), mask, self.lengths, move(self.scored), move(self.targets)
        )


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on the device that nothing waits for, which CUDA has from pinned memory alone."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def scored_tokens(examples: Sequence[Example]) -> int:
    """How many tokens of the examples are targets."""
    return sum(int(np.count_nonzero(example.trained[1:])) for example in examples)


def flattened(examples: Sequence[Example]) -> MicroBatch:
    """The examples as one row of tokens."""
    lengths = tuple(len(example.input_ids) for example in examples)
    input_ids = np.concatenate([np.asarray(example.input_ids, dtype=np.int64) for example in examples])
    trained = np.concatenate([np.asarray(example.trained, dtype=bool) for example in examples])
    starts = np.concatenate(([0], np.cumsum(lengths)[:-1])).astype(np.int64)
    trained[starts] = False
    positions = np.arange(len(input_ids), dtype=np.int64) - np.repeat(starts, lengths)
    target_index = np.flatnonzero(trained)
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids)[None],
        position_ids=torch.from_numpy(positions)[None],
        attention_mask=None,
        lengths=lengths,
        scored=torch.from_numpy(target_index - 1),
        targets=torch.from_numpy(input_ids[target_index]),
    )


def padded(examples: Sequence[Example], pad_id: int) -> MicroBatch:
    """The examples as rows of equal length, for attention that knows no documents."""
    lengths = tuple(len(example.input_ids) for example in examples)
    shape = (len(examples), max(lengths))
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    mask = np.zeros(shape, dtype=np.int64)
    trained = np.zeros(shape, dtype=bool)
    for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        input_ids[row, :length] = example.input_ids
        mask[row, :length] = 1
        trained[row, 1:length] = example.trained[1:]
    target_index = np.flatnonzero(trained)
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(np.broadcast_to(np.arange(shape[1]), shape).copy()),
        attention_mask=torch.from_numpy(mask),
        lengths=lengths,
        scored=torch.from_numpy(target_index - 1),
        targets=torch.from_numpy(input_ids.reshape(-1)[target_index]),
    )


def cut(examples: Iterable[Example], budget: int) -> Iterator[Sequence[Example]]:
    """Yields runs of examples of at most `budget` tokens each, in order; an example longer than that goes alone."""
    run: list[Example] = []
    tokens = 0
    for example in examples:
        length = len(example.input_ids)
        if run and tokens + length > budget:
            yield run
            run, tokens = [], 0
        run.append(example)
        tokens += length
    if run:
        yield run


def cut_padded(examples: Iterable[Example], budget: int) -> Iterator[Sequence[Example]]:
    """Like `cut` for padded rows: sorted by length, and padding counts."""
    run: list[Example] = []
    for example in sorted(examples, key=lambda each: len(each.input_ids)):
        if run and len(example.input_ids) * (len(run) + 1) > budget:
            yield run
            run = []
        run.append(example)
    if run:
        yield run
