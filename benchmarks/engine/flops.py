"""Floating-point operations of the pinned work by the engine's own formula: LoRA on every linear, a frozen head."""

from collections.abc import Iterable

from benchmarks.engine import workload
from benchmarks.engine.workload import Chat
from luthier_trainer.flops import FROZEN, TRAINED, Operations, attention_per_pair


def _linears() -> list[tuple[int, int]]:
    """(in, out) of every Linear of a layer that carries an adapter."""
    hidden, wide = workload.HIDDEN, workload.INTERMEDIATE
    return [(hidden, hidden)] * 4 + [(hidden, wide)] * 2 + [(wide, hidden)]


def training_operations() -> Operations:
    """Of the pinned model."""
    linear = workload.LAYERS * sum(a * b for a, b in _linears())
    adapters = workload.LAYERS * sum(workload.RANK * (a + b) for a, b in _linears())
    return Operations(
        per_token=FROZEN * linear + TRAINED * adapters,
        per_scored=FROZEN * workload.HIDDEN * workload.VOCABULARY,
        per_pair=attention_per_pair(workload.LAYERS, workload.HIDDEN),
    )


def training_flops(rows: Iterable[Chat]) -> float:
    """Operations of one pass over the rows, forward and backward."""
    found = training_operations()
    return sum(found.of(row.tokens, row.scored) for row in rows)
