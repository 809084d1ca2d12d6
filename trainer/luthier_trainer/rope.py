"""Rotary embeddings that depend on how long the rows of a forward are.

`longrope` (Phi-3 with a long context) has two sets of frequencies, and transformers takes the long one for everything
that goes through the model together once its longest row passes the original length. So documents on either side of
that border must not share a micro-batch: each would else be computed as if it were as long as the longest.
`dynamic` frequencies change only past `max_position_embeddings`, and no row is longer than that.
"""

from collections.abc import Iterator
from typing import Any


def borders(config: Any, longest: int) -> tuple[int, ...]:
    """The lengths, in tokens and ascending, at which the model's frequencies change, as far as rows of at most
    `longest` tokens pass them. A row of just so many tokens is still on the lower side."""
    found = {
        int(each["original_max_position_embeddings"])
        for each in _parameters(config)
        if each.get("rope_type") == "longrope"
    }
    return tuple(sorted(each for each in found if each < longest))


def _parameters(config: Any) -> Iterator[dict[str, Any]]:
    """The parameters of every kind of layer; most models have one kind."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in parameters:
        yield parameters
    else:
        yield from (each for each in parameters.values() if isinstance(each, dict))
