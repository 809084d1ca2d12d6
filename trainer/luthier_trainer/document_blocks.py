"""Causal attention over one document on a CPU, in batched products: block by block of queries against the keys up to
the block's end, so that most of what the causal mask forbids is never computed.

Nothing but the inputs is needed for the backward pass, which computes the weights anew; so scratch memory is bounded by
heads x block x keys. Softmax, its derivative and the products that feed them are in at least 32 bits; the other
products of a longer bfloat16 document are in bfloat16. Their gradients are summed in 32 bits where more than
_NARROW_SUMS blocks add to them.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

_BLOCK_ROWS = {torch.bfloat16: 128, torch.float32: 64, torch.float64: 64}
"""Queries that are computed together. More waste more of the causal half, fewer make the products small."""

_LARGEST_BLOCK = 256

_NARROW_SUMS = 4
"""Blocks whose gradients may be summed in bfloat16."""

_SHORT = 100
"""A bfloat16 document of at most so many tokens is computed in float32: its products are too small to gain from
bfloat16."""


@dataclass(frozen=True)
class _Block:
    """Queries [start, end) of a document against its keys [first, end)."""

    start: int
    end: int
    first: int


def _blocks(length: int, rows: int, window: int | None) -> list[_Block]:
    count = -(-length // rows)
    borders = [index * length // count for index in range(count + 1)]
    return [
        _Block(start, end, 0 if window is None else max(0, start - window + 1))
        for start, end in itertools.pairwise(borders)
    ]


def _block_rows(length: int, dtype: torch.dtype) -> int:
    rows = _BLOCK_ROWS[dtype]
    if dtype == torch.bfloat16 and length > rows * _NARROW_SUMS:
        return min(-(-length // _NARROW_SUMS), _LARGEST_BLOCK)
    return rows


@dataclass
class Scratch:
    """Buffers that one thread uses for all blocks of a call, flat, each as large as the largest that was asked for."""

    flat: dict[tuple[str, torch.dtype], torch.Tensor] = field(default_factory=dict)
    masks: dict[tuple[int, int, int], torch.Tensor] = field(default_factory=dict)

    def take(self, name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """An uninitialised tensor; it is overwritten when its name is taken again."""
        size = torch.Size(shape).numel()
        flat = self.flat.get((name, dtype))
        if flat is None or flat.numel() < size:
            flat = self.flat[name, dtype] = torch.empty(size, dtype=dtype)
        return flat[:size].view(shape)

    def widened(self, name: str, narrow: torch.Tensor) -> torch.Tensor:
        """A copy in 32 bits; the tensor itself where it has at least as many."""
        if narrow.dtype != torch.bfloat16:
            return narrow
        return self.take(name, torch.float32, *narrow.shape).copy_(narrow)

    def mask(self, block: _Block, groups: int, window: int | None) -> torch.Tensor:
        """To be added to a block's scores, [rows, its last keys]: zero where a query may look, else minus infinity.
        Without a window only the square at the diagonal needs one."""
        rows, offset = block.end - block.start, 0 if window is None else block.start - block.first
        key = (rows, offset, groups)
        if key not in self.masks:
            visible = torch.ones(rows, rows + offset, dtype=torch.bool).tril_(offset)
            if window is not None:
                visible.triu_(offset - window + 1)
            mask = torch.zeros(rows, rows + offset).masked_fill_(~visible, float("-inf"))
            self.masks[key] = mask.repeat_interleave(groups, 0)
        return self.masks[key]


@dataclass(frozen=True)
class Heads:
    """What all documents of a model's layer share.

    scale: of the scores. window: how many tokens a token sees, itself among them; None for all before it. groups: heads
    of queries for each head of keys.
    """

    scale: float
    window: int | None
    groups: int

    def folded(self, queries: torch.Tensor) -> torch.Tensor:
        """[heads, t, d] as [key heads, t * groups, d], so that the heads that share a key multiply it together."""
        if self.groups == 1:
            return queries
        heads, length, width = queries.shape
        split = queries.view(heads // self.groups, self.groups, length, width)
        return split.transpose(1, 2).reshape(heads // self.groups, length * self.groups, width)

    def unfold_into(self, target: torch.Tensor, folded: torch.Tensor) -> None:
        """Writes what `folded` made, in the other direction."""
        heads, length, width = target.shape
        split = target.view(heads // self.groups, self.groups, length, width)
        split.copy_(folded.view(heads // self.groups, length, self.groups, width).transpose(1, 2))

    def blocks(self, length: int, dtype: torch.dtype) -> list[_Block]:
        window = self.window if self.window is not None and length > self.window else None
        return _blocks(length, max(_block_rows(length, dtype) // self.groups, 16), window)

    def weights(self, q: torch.Tensor, k: torch.Tensor, block: _Block, scratch: Scratch) -> torch.Tensor:
        """softmax(scale q k' + mask) of a block, [key heads, rows * groups, keys]; q folded, in at least 32 bits."""
        g = self.groups
        shape = (k.shape[0], (block.end - block.start) * g, block.end - block.first)
        scores = scratch.take("scores", q.dtype, *shape)
        queries, keys = q[:, block.start * g : block.end * g], k[:, block.first : block.end].transpose(1, 2)
        torch.baddbmm(scores, queries, keys, beta=0, alpha=self.scale, out=scores)
        windowed = block.first > 0 or (self.window is not None and block.end > self.window)
        mask = scratch.mask(block, g, self.window if windowed else None)
        scores[:, :, shape[2] - mask.shape[1] :].add_(mask)
        weights = scratch.take("weights", q.dtype, *shape)
        torch.ops.aten._softmax.out(scores, -1, False, out=weights)
        return weights


def _narrow_for(weights: torch.Tensor, narrow: bool, scratch: Scratch) -> torch.Tensor:
    return scratch.take("narrow", torch.bfloat16, *weights.shape).copy_(weights) if narrow else weights


def _multiply(target: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, alpha: float = 1.0, add: bool = False) -> None:
    """target = alpha a b, or += with `add`."""
    if target.dtype == a.dtype:
        torch.baddbmm(target, a, b, beta=int(add), alpha=alpha, out=target)
    elif add:
        target.add_(torch.bmm(a, b), alpha=alpha)
    else:
        target.copy_(torch.bmm(a, b).mul_(alpha))


def forward(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    target: torch.Tensor,
    layer: Heads,
    scratch: Scratch,
) -> None:
    """Writes the attention of `queries` [heads, t, d] over `keys`, `values` [key heads, t, d] to `target`."""
    length, dtype, g = keys.shape[1], keys.dtype, layer.groups
    narrow = dtype == torch.bfloat16 and length > _SHORT
    folded = layer.folded(queries)
    wide_q, wide_k = scratch.widened("q", folded), scratch.widened("k", keys)
    factor = values if narrow else scratch.widened("v", values)
    result = target if g == 1 else scratch.take("output", dtype, *folded.shape)
    for block in layer.blocks(length, dtype if narrow else wide_q.dtype):
        weights = _narrow_for(layer.weights(wide_q, wide_k, block, scratch), narrow, scratch)
        _multiply(result[:, block.start * g : block.end * g], weights, factor[:, block.first : block.end])
    if g > 1:
        layer.unfold_into(target, result)


def backward(given: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], layer: Heads, scratch: Scratch) -> None:
    """Writes the gradients of `forward`, with P the weights and dP = dO V': dV = P' dO; dS = P (dP - rowsum(P dP));
    dQ = scale dS K; dK = scale dS' Q.

    `given`: queries, keys, values and the output's gradient; `wanted`: where the gradients of the first three go.
    """
    queries, keys, values, d_output = given
    d_queries, d_keys, d_values = wanted
    length, dtype, g, scale = keys.shape[1], keys.dtype, layer.groups, layer.scale
    narrow = dtype == torch.bfloat16 and length > _SHORT
    folded, d_folded = layer.folded(queries), layer.folded(d_output)
    wide_q, wide_k = scratch.widened("q", folded), scratch.widened("k", keys)
    wide_v, wide_d = scratch.widened("v", values), scratch.widened("d", d_folded)
    of_queries, of_keys, of_output = (folded, keys, d_folded) if narrow else (wide_q, wide_k, wide_d)
    blocks = layer.blocks(length, dtype if narrow else wide_q.dtype)
    several = len(blocks) > 1
    aside = dtype == torch.bfloat16 and (not narrow or len(blocks) > _NARROW_SUMS)
    sum_k = scratch.take("dk", torch.float32, *keys.shape) if aside else d_keys
    sum_v = scratch.take("dv", torch.float32, *values.shape) if aside else d_values
    if several:
        sum_k.zero_()
        sum_v.zero_()
    result = d_queries if g == 1 else scratch.take("output", dtype, *folded.shape)
    for block in blocks:
        rows, seen = slice(block.start * g, block.end * g), slice(block.first, block.end)
        weights = layer.weights(wide_q, wide_k, block, scratch)
        left = _narrow_for(weights, narrow, scratch)
        _multiply(sum_v[:, seen], left.transpose(1, 2), of_output[:, rows], add=several)
        d_weights = scratch.take("scores", weights.dtype, *weights.shape)
        torch.bmm(wide_d[:, rows], wide_v[:, seen].transpose(1, 2), out=d_weights)
        torch.ops.aten._softmax_backward_data.out(d_weights, weights, -1, weights.dtype, grad_input=d_weights)
        left = _narrow_for(d_weights, narrow, scratch)
        _multiply(result[:, rows], left, of_keys[:, seen], alpha=scale)
        _multiply(sum_k[:, seen], left.transpose(1, 2), of_queries[:, rows], alpha=scale, add=several)
    if aside:
        d_keys.copy_(sum_k)
        d_values.copy_(sum_v)
    if g > 1:
        layer.unfold_into(d_queries, result)
