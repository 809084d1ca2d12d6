"""Two short micro-batches, measured, that say how far a prediction is off."""

from dataclasses import replace

import numpy as np
import torch

from luthier_trainer.batches import Batches
from luthier_trainer.flatten import MicroBatch, flattened, padded
from luthier_trainer.forward import Forward
from luthier_trainer.masters import Masters
from luthier_trainer.memory.held import generated
from luthier_trainer.memory.need import Need, Row
from luthier_trainer.memory.resident import Gauge

_FEWEST = 256
_MOMENTS = 8
"""Bytes of both moments of a weight: the optimizer makes them in its first step."""

_PLAUSIBLE = (0.5, 2.0)
"""Slopes beyond these are noise: a probe that the system disturbed."""


def calibrated(
    need: Need, forward: Forward, masters: Masters, batches: Batches, longest: int, job_gauge: Gauge
) -> Need:
    """The need with a slope and an offset such that it gives what two micro-batches of a quarter and a half of the
    budget took, above what the process has by then; the moments and half of what oneDNN will generate, which are not
    there yet, are added. No gradient and no random state is left behind.

    `job_gauge` was made before the model was loaded. Where a probe makes no sense the need is returned as it was.
    """
    if batches.budget < 4 * _FEWEST:  # too little to tell from noise
        return need
    model = forward.model
    was_training, devices = model.training, [batches.device] if batches.device.type == "cuda" else []
    masters.zero_gradients()  # on a CPU this is when their memory is there
    points = []
    try:
        model.train()
        with torch.random.fork_rng(devices):
            quarter = batches.budget // 4
            _run(forward, _random(forward, batches, quarter, longest))  # what is touched once and stays
            for tokens in (quarter, 2 * quarter):
                batch = _random(forward, batches, tokens, longest)
                gauge = Gauge(batches.device)
                held = job_gauge.now()
                _run(forward, batch)
                size = batch.input_ids.numel()
                foretold = need.activations(size, len(batch.targets), max(batch.lengths))
                points.append((foretold, held + gauge.peak()))
    finally:
        model.train(was_training)
        masters.zero_gradients()
    (first, took_first), (second, took_second) = points
    slope = (took_second - took_first) / max(second - first, 1.0)
    if not _PLAUSIBLE[0] < slope < _PLAUSIBLE[1]:
        return need
    to_come = _MOMENTS * len(masters) + generated(batches.device, forward.model.dtype) // 2  # the rest is there by now
    offset = took_second - slope * second + to_come - need.fixed
    return replace(need, slope=slope, offset=offset)


def _run(forward: Forward, batch: MicroBatch) -> None:
    forward.loss_sum(batch).backward()  # type: ignore[no-untyped-call]


def _random(forward: Forward, batches: Batches, tokens: int, longest: int) -> MicroBatch:
    """Documents of random tokens, half of them targets, of about so many tokens in all."""
    vocabulary = int(forward.model.config.get_text_config().vocab_size)
    length = max(min(longest, tokens), 2)
    draw = np.random.default_rng(0)
    targets = np.arange(length) >= length - max(length // 32, 1)  # few: the layers are to be measured, not the loss
    rows = [Row(draw.integers(0, vocabulary, length), targets) for _ in range(max(tokens // length, 1))]
    batch = flattened(rows) if batches.documents else padded(rows, batches.pad_id)
    return batch.to(batches.device)
