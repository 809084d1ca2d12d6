"""Memory as a linear form in what a micro-batch is made of."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Terms:
    """Bytes: so many always, and so many for each token, each scored token, each scored token of one chunk of the loss,
    each pair of tokens of every document together (`pair`), and of the longest document alone (`alone`)."""

    always: float = 0.0
    token: float = 0.0
    scored: float = 0.0
    chunk: float = 0.0
    pair: float = 0.0
    alone: float = 0.0

    def __add__(self, other: "Terms") -> "Terms":
        return Terms(*(a + b for a, b in zip(self.values, other.values, strict=True)))

    def __sub__(self, other: "Terms") -> "Terms":
        return self + other.times(-1.0)

    def times(self, factor: float) -> "Terms":
        """Each term multiplied."""
        return Terms(*(factor * each for each in self.values))

    @property
    def values(self) -> tuple[float, ...]:
        """The terms in their order."""
        return tuple(getattr(self, each.name) for each in fields(self))

    def covers(self, other: "Terms") -> bool:
        """Whether no micro-batch makes `other` larger than this."""
        return all(mine >= its for mine, its in zip(self.values, other.values, strict=True))

    def bytes(self, tokens: int, scored: int, longest: int, chunk_rows: int, pairs: int | None = None) -> float:
        """For a micro-batch of so many tokens, `scored` of them scored, in documents of at most `longest` tokens, the
        squares of whose lengths make `pairs`; None for the most that they can make."""
        longest = min(longest, tokens)
        return (
            self.always
            + self.token * tokens
            + self.scored * scored
            + self.chunk * min(scored, chunk_rows)
            + self.pair * (tokens * longest if pairs is None else pairs)
            + self.alone * longest * longest
        )


def frontier(points: list[Terms]) -> tuple[Terms, ...]:
    """The points that no other covers: the largest of all is among them, whatever the micro-batch."""
    kept: list[Terms] = []
    for point in points:
        if not any(each.covers(point) for each in kept):
            kept = [each for each in kept if not point.covers(each)]
            kept.append(point)
    return tuple(kept)
