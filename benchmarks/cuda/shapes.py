"""The shapes of the models, and the operations that training them takes. Loads no torch."""

from dataclasses import dataclass

from luthier_trainer.flops import FROZEN, TRAINED, Operations, attention_per_pair

RANK = 16


@dataclass(frozen=True)
class Shape:
    """A Llama. kv_heads: key and value heads, of the size that the query's have; tied: the head is the embedding."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool
    rope_theta: float = 500_000.0

    @property
    def head_size(self) -> int:
        """Numbers of a head."""
        return self.hidden // self.heads

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of every Linear of a layer, each of which carries an adapter."""
        narrow = self.kv_heads * self.head_size
        attention = [(self.hidden, self.hidden)] * 2 + [(self.hidden, narrow)] * 2
        return attention + [(self.hidden, self.intermediate)] * 2 + [(self.intermediate, self.hidden)]

    @property
    def parameters(self) -> int:
        """Weights, without adapters."""
        layer = sum(a * b for a, b in self.linears) + 2 * self.hidden
        return self.layers * layer + self.hidden + self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def operations(self) -> Operations:
        """Of training adapters of RANK on all linears."""
        linear = self.layers * sum(a * b for a, b in self.linears)
        adapters = self.layers * sum(RANK * (a + b) for a, b in self.linears)
        return Operations(
            per_token=FROZEN * linear + TRAINED * adapters,
            per_scored=FROZEN * self.hidden * self.vocabulary,
            per_pair=attention_per_pair(self.layers, self.hidden),
        )


SHAPES = {
    each.name: each
    for each in (
        Shape("1B", 2048, 16, 32, 8, 8192, 128_256, tied=True),  # Llama 3.2 1B
        Shape("8B", 4096, 32, 32, 8, 14_336, 128_256, tied=False),  # Llama 3 8B
        Shape("tiny", 64, 2, 4, 2, 128, 512, tied=True),  # to rehearse on a CPU
    )
}
