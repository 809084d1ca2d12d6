"""What training takes on its device, foretold."""

import itertools
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from luthier_trainer import loss
from luthier_trainer.config import Settings
from luthier_trainer.flatten import MicroBatch, flattened, padded
from luthier_trainer.forward import DOCUMENTS, Forward, plain_head, set_attention
from luthier_trainer.memory import held as holding
from luthier_trainer.memory.activations import checkpoint_layers
from luthier_trainer.memory.held import held
from luthier_trainer.memory.layers import Skipping
from luthier_trainer.memory.live import Live, Sizes, faked
from luthier_trainer.memory.remembered import remembered
from luthier_trainer.memory.terms import Terms, frontier
from luthier_trainer.model import Trained
from luthier_trainer.plan import Compute

_SHORTEST = 211


@dataclass(frozen=True)
class Need:
    """Memory of training, in bytes over the loaded process: one that imported everything and holds no model.

    fixed: what is held all the time; load, save: the most while a model is loaded, and while a checkpoint is written;
    moments: each point in time that can be the largest of a micro-batch, with what it takes over `fixed`; chunk_rows:
    rows of the loss that are computed at once; checkpointing: whether layers compute twice; slope, offset: what the
    probes found a prediction to be off by (`calibrated`).
    """

    fixed: int
    load: int
    save: int
    moments: tuple[Terms, ...]
    chunk_rows: int
    checkpointing: bool
    offset: float = 0.0
    slope: float = 1.0

    @property
    def per_token(self) -> float:
        """Bytes that one more token takes, at most."""
        return self.slope * max((each.token for each in self.moments), default=0.0)

    @property
    def per_scored_token(self) -> float:
        """Bytes that one more scored token takes once the loss's chunk is full, at most."""
        return self.slope * max((each.scored for each in self.moments), default=0.0)

    def activations(self, tokens: int, scored: int, longest: int, pairs: int | None = None) -> float:
        """Of one micro-batch, over `fixed`, as traced."""
        return max((each.bytes(tokens, scored, longest, self.chunk_rows, pairs) for each in self.moments), default=0.0)

    def peak(self, tokens: int, scored: int, longest: int, pairs: int | None = None) -> int:
        """The most that is taken at a time when the largest micro-batch has so many tokens, `scored` of them targets,
        in documents of at most `longest` tokens, the squares of whose lengths make `pairs` (None: the most that they
        can make). Where batches are padded, padding counts as tokens."""
        step = self.fixed + self.offset + self.slope * self.activations(tokens, scored, longest, pairs)
        return int(max(step, self.load, self.save))


@dataclass(frozen=True)
class Row:
    """A tokenised row that is made up."""

    input_ids: npt.NDArray[np.int64]
    trained: npt.NDArray[np.bool_]


def need(
    trained: Trained,
    settings: Settings,
    compute: Compute,
    *,
    checkpointing: bool,
    documents: bool | None = None,
    fused_head: bool | None = None,
    cache_dir: Path | None = None,
) -> Need:
    """Traces a model that is loaded or on the meta device (`on_meta`), as the engine trains it; nothing is computed,
    and the model is left as it was.

    `documents`, `fused_head`: what `probe.choose_forward` decided, None for what it will in all likelihood;
    `cache_dir`: where traces are remembered, None for nowhere.
    """
    model = trained.causal_lm
    if documents is None:
        documents = settings.attention == "auto" and _switches(trained)
    if fused_head is None:
        fused_head = plain_head(model) is not None
    vocabulary = int(model.config.get_text_config().vocab_size)
    sizes = _sizes(trained, loss.chunk_rows(vocabulary, compute.device), vocabulary, documents)
    forward = Forward(model, documents, fused_head)
    moments = remembered(
        cache_dir,
        trained.root,
        (str(compute.device), checkpointing, documents, fused_head),
        lambda: _trace(trained, forward, sizes, compute.device, checkpointing),
    )
    kept = held(trained, settings, compute.dtype)
    code = holding.CODE if compute.device.type == "cpu" else 0
    code += holding.generated(compute.device, compute.dtype)
    return Need(
        fixed=kept.in_training + code,
        load=kept.peak_load + code,
        save=kept.in_training + kept.peak_save + code,
        moments=moments,
        chunk_rows=sizes.chunk_rows,
        checkpointing=checkpointing,
    )


def _trace(
    trained: Trained, forward: Forward, sizes: Sizes, device: torch.device, checkpointing: bool
) -> tuple[Terms, ...]:
    model = trained.causal_lm
    batch = _batch(forward.documents, sizes)
    own, was_training = model.config._attn_implementation, model.training
    skipping, live = Skipping(model), Live(sizes)
    model.train()
    if forward.documents and own != DOCUMENTS:
        set_attention(model, DOCUMENTS)
    checkpoint_layers(model, checkpointing, keep_randomness=False)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), faked(model, device), live, skipping.watch(live):
            total = forward.loss_sum(batch)
            total.backward()  # type: ignore[no-untyped-call]
            del total
    finally:
        checkpoint_layers(model, False)
        model.train(was_training)
        if model.config._attn_implementation != own:
            set_attention(model, own)
    return frontier([each + skipping.skipped for each in live.points])


def _switches(trained: Trained) -> bool:
    """Whether the model's attention can be that of documents, as far as its configuration tells."""
    model = trained.causal_lm
    own = model.config._attn_implementation
    try:
        set_attention(model, DOCUMENTS)
        return bool(model.config._attn_implementation == DOCUMENTS)
    except (ValueError, KeyError, AttributeError):
        return False
    finally:
        if model.config._attn_implementation != own:
            set_attention(model, own)


def _sizes(trained: Trained, chunk_rows: int, vocabulary: int, documents: bool) -> Sizes:
    """Primes that divide no dimension of the model."""
    dimensions = {size for each in trained.root.parameters() for size in each.shape} | {chunk_rows, vocabulary}
    first = _prime(_SHORTEST, dimensions)
    second = first
    while documents and (second == first or any(size % ((first + second) // 2) == 0 for size in dimensions)):
        second = _prime(second + 1, dimensions)
    return Sizes(first, second, _prime(max(2 * chunk_rows, second) + 1, dimensions), chunk_rows, vocabulary)


def _prime(start: int, dimensions: set[int]) -> int:
    """The first prime from `start` on that divides none of the numbers."""
    return next(
        each
        for each in itertools.count(start)
        if all(each % divisor for divisor in range(2, math.isqrt(each) + 1))
        and not any(size % each == 0 for size in dimensions)
    )


def _batch(documents: bool, sizes: Sizes) -> MicroBatch:
    """Two documents, and as many targets as the sizes say: more than tokens, which is nothing to a trace."""
    rows = [Row(np.zeros(each, np.int64), np.ones(each, np.bool_)) for each in (sizes.first, sizes.second)]
    batch = flattened(rows) if documents else padded(rows, 0)
    scored = torch.zeros(sizes.scored, dtype=torch.int64)
    return replace(batch, scored=scored, targets=scored)
