"""Floating-point operations of a training step, as far as the mathematics needs them.

F = sum over tokens [4 N_linear + 6 sum r (in + out)] + 4 H V (scored tokens) + 12 L heads d (causal pairs)

Frozen weights take a product forward and one backward (4 N), the adapter's factors three (6), the tied head two on
scored rows alone, attention's two products six in all with a causal pair counted once. Padding, recomputation and
unscored logits count for nobody.
"""

from collections.abc import Iterable

from benchmarks.engine import workload
from benchmarks.engine.workload import Chat


def _linears() -> list[tuple[int, int]]:
    """(in, out) of every Linear of a layer that carries an adapter."""
    hidden, wide = workload.HIDDEN, workload.INTERMEDIATE
    return [(hidden, hidden)] * 4 + [(hidden, wide)] * 2 + [(wide, hidden)]


def training_flops(rows: Iterable[Chat]) -> float:
    """Operations of one pass over the rows, forward and backward, with LoRA on every linear."""
    linear = workload.LAYERS * sum(a * b for a, b in _linears())
    adapters = workload.LAYERS * sum(workload.RANK * (a + b) for a, b in _linears())
    total = 0.0
    for row in rows:
        pairs = row.tokens * (row.tokens + 1) / 2
        total += row.tokens * (4 * linear + 6 * adapters)
        total += row.scored * 4 * workload.HIDDEN * workload.VOCABULARY
        total += 12 * workload.LAYERS * workload.HIDDEN * pairs
    return total
