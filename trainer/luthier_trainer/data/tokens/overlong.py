"""What happens to a row that is longer than max_length: which ranges of its tokens become examples."""

from enum import StrEnum

from luthier.v1 import tokenization_pb2

Ranges = tuple[tuple[int, int], ...]


class Overlong(StrEnum):
    """`luthier.v1.Overlong` as a value."""

    TRUNCATE = "truncate"
    DROP = "drop"
    SPLIT = "split"
    ERROR = "error"

    @classmethod
    def from_proto(cls, value: tokenization_pb2.Overlong.ValueType) -> "Overlong":
        """The policy of a tokenization; unset is truncate."""
        return cls(tokenization_pb2.Overlong.Name(value).removeprefix("OVERLONG_").lower()) if value else cls.TRUNCATE

    def to_proto(self) -> tokenization_pb2.Overlong.ValueType:
        """The same in the contract."""
        return tokenization_pb2.Overlong.Value(f"OVERLONG_{self.name}")


def cut(tokens: int, policy: Overlong, max_length: int) -> Ranges:
    """The ranges [start, end) of a row of so many tokens that remain; none when it is dropped or in error. Of a row
    that is split, every token is in one piece; the first of a piece has no predecessor there and is context alone."""
    if tokens <= max_length:
        return ((0, tokens),)
    match policy:
        case Overlong.TRUNCATE:
            return ((0, max_length),)
        case Overlong.SPLIT:
            return tuple((start, min(start + max_length, tokens)) for start in range(0, tokens, max_length))
        case Overlong.DROP | Overlong.ERROR:
            return ()
