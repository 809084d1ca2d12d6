"""How near an export must come, by the type of its weights.

A difference of log-probabilities grows with the spread of the logits: rounding a weight is an error relative to the
weight, and so in the end to the logits. Limits are therefore stated at a spread of one and multiplied with the mean
spread of the tuned model's logits over the proof's positions where that is above one (a trained model's is 2 to 4, a
random one's far below one). In the same way two tokens are a tie, between which rounding may choose, where the tuned
model sets them apart by less than `tie` spreads.
"""

from dataclasses import dataclass

from luthier.v1 import export_task_pb2
from luthier.v1.export_task_pb2 import ExportTask


@dataclass(frozen=True)
class Thresholds:
    """top1: the share of positions where the likeliest token is the same, or tied; logprob: the largest difference of
    a log-probability in nats at a spread of one, None where it is not judged; perplexity: how many times larger or
    smaller; greedy: the share of answers that are the same up to a tie, None where it is not judged; tie: in
    spreads."""

    top1: float
    logprob: float | None
    perplexity: float
    greedy: float | None
    tie: float


_EXACT = Thresholds(1.0, 1e-5, 1.0001, 1.0, 1e-4)
_F32 = Thresholds(1.0, 1e-4, 1.0005, 1.0, 1e-3)
_F16 = Thresholds(1.0, 1e-2, 1.005, 1.0, 1e-2)
_BF16 = Thresholds(1.0, 8e-2, 1.03, 1.0, 8e-2)

_WEIGHTS: dict[int, Thresholds] = {
    export_task_pb2.WEIGHT_TYPE_F32: _F32,
    export_task_pb2.WEIGHT_TYPE_F16: _F16,
    export_task_pb2.WEIGHT_TYPE_BF16: _BF16,
    export_task_pb2.WEIGHT_TYPE_NF4: Thresholds(0.90, None, 1.35, None, 0.3),
}
_GGUF: dict[int, Thresholds] = {
    export_task_pb2.GGUF_TYPE_F16: _F16,
    export_task_pb2.GGUF_TYPE_BF16: _BF16,
    export_task_pb2.GGUF_TYPE_Q8_0: Thresholds(0.98, None, 1.05, None, 0.05),
    export_task_pb2.GGUF_TYPE_Q6_K: Thresholds(0.97, None, 1.08, None, 0.1),
    export_task_pb2.GGUF_TYPE_Q5_K_M: Thresholds(0.95, None, 1.12, None, 0.15),
    export_task_pb2.GGUF_TYPE_Q4_K_M: Thresholds(0.90, None, 1.25, None, 0.3),
    export_task_pb2.GGUF_TYPE_Q3_K_M: Thresholds(0.85, None, 1.6, None, 0.5),
    export_task_pb2.GGUF_TYPE_Q2_K: Thresholds(0.75, None, 2.5, None, 0.8),
}


def thresholds_of(export: ExportTask) -> Thresholds:
    """The limits of what was asked for; an unset type is the server's default."""
    match export.WhichOneof("format"):
        case "adapter":
            return _EXACT
        case "merged":
            return _WEIGHTS[export.merged.weights or export_task_pb2.WEIGHT_TYPE_BF16]
        case "gguf":
            return _GGUF[export.gguf.type or export_task_pb2.GGUF_TYPE_F16]
        case other:
            raise ValueError(f"an export of format {other}")
