"""Floating-point operations of training, as far as the mathematics needs them. Loads no torch.

F = sum over tokens [4 N_linear + 6 sum r (in + out)] + 4 H V (scored tokens) + 12 L heads d (causal pairs)

A frozen product takes one forward and one for the gradient of its input (4 N); one whose weight is trained takes a
third (6 N), and so do an adapter's factors. The head runs on scored tokens alone, attention's two products six times in
all, a causal pair counted once. Padding, recomputation and unscored logits count for nobody.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from luthier_trainer.flatten import Example
    from luthier_trainer.model import Trained

FROZEN, TRAINED = 4, 6
"""Operations for each weight and token, forward and backward."""


@dataclass(frozen=True)
class Operations:
    """What training a model takes: for each token, for each scored token, and for each pair of a token with one that it
    attends to (itself included)."""

    per_token: float
    per_scored: float
    per_pair: float

    def of(self, tokens: int, scored: int) -> float:
        """Of a document of so many tokens."""
        return tokens * self.per_token + scored * self.per_scored + tokens * (tokens + 1) / 2 * self.per_pair

    def of_examples(self, examples: Iterable["Example"]) -> float:
        """Of the examples of a step."""
        return sum(self.of(len(each.input_ids), int(each.trained[1:].sum())) for each in examples)


def attention_per_pair(layers: int, width: int) -> float:
    """Operations for each causal pair; `width` is heads times their size."""
    return 12.0 * layers * width


def _weights(module: Any) -> int:
    """Weights of a linear layer as it is without quantisation; 0 for anything else, and for PEFT's wrappers, whose
    layers are modules of their own."""
    if hasattr(module, "base_layer") or hasattr(module, "original_module"):
        return 0
    if type(module).__name__ == "Conv1D":  # transformers' own linear layer of GPT-2
        return int(module.weight.numel())
    return int(getattr(module, "in_features", 0) * getattr(module, "out_features", 0))


def operations(trained: "Trained") -> Operations | None:
    """Of a model that is trained, read from its modules; None for one whose tokens take different ways (a mixture of
    experts), which this count does not know. A sliding window is not taken into account."""
    model = trained.causal_lm
    config = model.config.get_text_config()
    if any(getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts")):
        return None
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    in_head = {id(each) for each in head.modules()} if head is not None else set()
    per_token = per_scored = 0.0
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        amount = _weights(module)
        if weight is None or not amount or name.endswith("original_module"):  # what a module saved whole replaces
            continue
        amount *= TRAINED if weight.requires_grad else FROZEN
        if id(module) in in_head:
            per_scored += amount
        else:
            per_token += amount
    heads = getattr(config, "num_attention_heads", 0)
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1))
    return Operations(per_token, per_scored, attention_per_pair(config.num_hidden_layers, width))
