"""How the evaluations of a job stand to each other: which is the best, and whether they still improve. Loads no torch.

Two questions, and not one. The best evaluation is the first of the best value, however little better it is; patience
asks for more than `min_delta`, and against the last evaluation that gave as much, so that slow progress adds up (Keras'
EarlyStopping). The evaluation of step 0 is of the base model, and no candidate: what comes out was trained. A value
that is not finite never improves.
"""

import math
from dataclasses import dataclass, field


@dataclass
class Standing:
    """What the evaluations said so far; part of a checkpoint's state.

    `best_step` is -1 before the first evaluation; `best_value` and `improved_value` are higher for better ones;
    `best_metrics` are the best's numbers by name, and `best_checkpoint` the directory that holds its weights, empty
    when none is kept; `unimproved` counts the evaluations since the last one that improved.
    """

    best_step: int = -1
    best_value: float = 0.0
    best_metrics: dict[str, float] = field(default_factory=dict)
    best_checkpoint: str = ""
    improved_value: float | None = None
    unimproved: int = 0

    def add(self, step: int, value: float, metrics: dict[str, float], min_delta: float) -> bool:
        """Takes the evaluation of a step, whose `value` is higher when it is better. Returns whether it is the best."""
        best = math.isfinite(value) and (self.best_step < 0 or value > self.best_value)
        if best:
            self.best_step, self.best_value, self.best_metrics = step, value, metrics
        if math.isfinite(value) and (self.improved_value is None or value > self.improved_value + min_delta):
            self.improved_value, self.unimproved = value, 0
        else:
            self.unimproved += 1
        return best
