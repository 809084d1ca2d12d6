"""How near an export must come, by the type of its weights.

A difference of log-probabilities grows with the spread of the logits: rounding a weight is an error relative to the
weight, and so in the end to the logits. Limits are therefore stated at a spread of one and multiplied with the mean
spread of the tuned model's logits over the proof's positions where that is above one.

How much a model makes of an error is its own: some of few and large weights make ten times of it what others do. The
tuned model is therefore asked a second time with noise on its weights as large as the type's rounding is (`noise`), and
a limit on log-probabilities is no lower than a multiple of what that changed. What follows tells how the limits of the
types were chosen: figures are of `builtin/tiny` after 120 steps on the example's rows, 516 predictions of 16 held-out
rows, and in brackets the worst of random models.

Quantised exports are judged by what they are for: the same likeliest token, and the same perplexity. A model that does
no better on the rows than guessing among half of its vocabulary, as a random one does, has no likeliest tokens to speak
of, and there alone the limits of quantised types follow from the noise too.
"""

import math
from dataclasses import dataclass

import numpy as np

from luthier.v1 import export_task_pb2
from luthier.v1.export_task_pb2 import ExportTask
from luthier_trainer.export.proof.measure import Judged, Standing, agreement, differences

_TIMES_NOISE = 3.0
"""How many times the largest difference that noise made an export's may be: the largest of many varies."""

_TIMES_MEAN = 2.0
"""The same for the mean of all differences, which varies less."""


@dataclass(frozen=True)
class Thresholds:
    """top1: the share of positions where the likeliest token is the same, or tied; logprob: the largest difference of
    a log-probability in nats at a spread of one, None where it is not judged; perplexity: how many times larger or
    smaller; tie: of quantised types, two tokens are tied that the tuned model sets apart by fewer spreads than this;
    noise: the type's rounding error of a weight, by the root mean square of its row."""

    top1: float
    logprob: float | None
    perplexity: float
    tie: float
    noise: float


_EXACT = Thresholds(1.0, 1e-5, 1.0001, 0.0, 0.0)
"""An adapter: the same weights in the same program. Measured: 0."""

_F32 = Thresholds(1.0, 1e-4, 1.0005, 0.0, 0.0)
"""One product in place of two, each in 32 bits. Measured: 1.2e-5 (7e-6)."""

_F16 = Thresholds(1.0, 1e-2, 1.005, 0.0, 3e-4)
"""10 bits of mantissa: 2^-11 / sqrt(3) at most, in llama.cpp of the activations too. Measured: transformers 0.0044,
llama.cpp 0.0135, at a spread of 2.0 (0.084 at 3.2)."""

_BF16 = Thresholds(1.0, 8e-2, 1.03, 0.0, 2.4e-3)
"""7 bits of mantissa, 8 times as coarse. Measured: transformers 0.076, llama.cpp 0.096, at 2.0 (0.96 at 3.2)."""

_WEIGHTS: dict[int, Thresholds] = {
    export_task_pb2.WEIGHT_TYPE_F32: _F32,
    export_task_pb2.WEIGHT_TYPE_F16: _F16,
    export_task_pb2.WEIGHT_TYPE_BF16: _BF16,
    export_task_pb2.WEIGHT_TYPE_NF4: Thresholds(0.92, None, 1.25, 0.3, 0.09),  # 0.996, 1.016
}
_GGUF: dict[int, Thresholds] = {
    export_task_pb2.GGUF_TYPE_F16: _F16,
    export_task_pb2.GGUF_TYPE_BF16: _BF16,
    # Measured: share of likeliest tokens and ratio of perplexity. noise: of normal numbers, a block's step / sqrt(12).
    export_task_pb2.GGUF_TYPE_Q8_0: Thresholds(0.98, None, 1.02, 0.05, 0.008),  # 1, 1.0013
    export_task_pb2.GGUF_TYPE_Q6_K: Thresholds(0.97, None, 1.03, 0.1, 0.02),  # 0.998, 1.0028
    export_task_pb2.GGUF_TYPE_Q5_K_M: Thresholds(0.95, None, 1.06, 0.15, 0.04),  # 1, 1.0009
    export_task_pb2.GGUF_TYPE_Q4_K_M: Thresholds(0.92, None, 1.15, 0.3, 0.08),  # 0.998, 1.0009
    export_task_pb2.GGUF_TYPE_Q3_K_M: Thresholds(0.87, None, 1.4, 0.5, 0.14),  # 0.998, 1.0057
    export_task_pb2.GGUF_TYPE_Q2_K: Thresholds(0.75, None, 2.2, 0.8, 0.3),  # 0.998, 1.035
}


def thresholds_of(export: ExportTask) -> Thresholds:
    """Of what was asked for; an unset type is the server's default."""
    match export.WhichOneof("format"):
        case "adapter":
            return _EXACT
        case "merged":
            return _WEIGHTS[export.merged.weights or export_task_pb2.WEIGHT_TYPE_BF16]
        case "gguf":
            return _GGUF[export.gguf.type or export_task_pb2.GGUF_TYPE_F16]
        case other:
            raise ValueError(f"an export of format {other}")


@dataclass(frozen=True)
class Limits:
    """Thresholds for one model. tie: in nats at a position of a spread of one and, with `tie_by_spread`, in
    proportion; answers: whether greedy answers are judged, which goes with `logprob`."""

    top1: float
    logprob: float | None
    perplexity: float
    tie: float
    tie_by_spread: bool

    @property
    def answers(self) -> bool:
        """Whether greedy answers are judged."""
        return self.logprob is not None


def limits_of(thresholds: Thresholds, own: Standing, shaken: Judged | None, vocabulary: int) -> Limits:
    """The limits for a model that thinks `own` of all positions and, with the type's noise on its weights, `shaken`."""
    largest = mean = 0.0
    if shaken is not None:
        found = differences(own, shaken)
        largest, mean = float(found.max(initial=0.0)), float(found[:, 0].mean())
    if thresholds.logprob is not None:
        spread = max(1.0, float(own.spread.mean(dtype=np.float64)))
        limit = max(thresholds.logprob * spread, _TIMES_NOISE * largest)
        ratio = max(thresholds.perplexity, _exp(_TIMES_MEAN * mean))
        return Limits(thresholds.top1, limit, ratio, limit, tie_by_spread=False)
    # Of few positions one may always differ: a share of them is no finer than that.
    top1, ratio = min(thresholds.top1, 1 - 1 / len(own.target)), thresholds.perplexity
    if shaken is not None and -float(own.target.mean(dtype=np.float64)) >= math.log(vocabulary / 2):
        same, tied = agreement(own, shaken, thresholds.tie * own.spread)
        top1 = min(top1, float((same | tied).mean()) / 2)
        ratio = max(ratio, _exp(_TIMES_MEAN * mean))
    return Limits(top1, None, ratio, thresholds.tie, tie_by_spread=True)


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))
