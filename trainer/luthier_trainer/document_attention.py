"""Causal attention per document on a CPU, over the whole flattened row in one node of the graph.

Each document is computed in one of two ways. *Kernel*: torch's own, `scaled_dot_product_attention` without its node.
*Blocks*: batched products (`document_blocks`). The kernel wins for short documents, where an operation costs more than
its work, and for long ones, for which it has large blocks of its own; between them it runs far below the speed of the
machine's matrix products. Documents, and heads of the long ones, are shared out to threads that compute alone.

What is computed and in which order depends on lengths and threads alone, so a rerun is equal bit by bit.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from luthier_trainer import document_blocks
from luthier_trainer.document_blocks import Heads, Scratch
from luthier_trainer.workers import each_alone

_IN_BLOCKS = range(192, 768)
"""Lengths of documents that are computed in blocks; others only where a window limits what they see. From 768 tokens on
torch's kernel takes 256 rows and more at a time, below at most 64."""

_SMALLEST_ROW = 512
"""Heads times their width below which a document's operations are too small to be worth a hand-written backward."""

_SHORT_IN_KERNEL = 256
"""A bfloat16 document of at most so many tokens runs through the kernel in float32, which is more exact and faster:
forward and backward of 8 heads of 64 take 0.24 ms of one core with AMX for 48 tokens (0.84 in bfloat16) and 3.1 for 200
(3.8); for 400 bfloat16 wins (13.5, 14.6)."""

_WORTH_THREADS = 1e7
"""Multiplications in a product of queries and keys below which handing work to other threads costs more than it brings:
about a millisecond's worth."""

_DTYPES = (torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class _Row:
    """A flattened row. `in_blocks`: whether documents of middling length are computed in blocks."""

    lengths: tuple[int, ...]
    layer: Heads
    in_blocks: bool

    def uses_kernel(self, length: int) -> bool:
        """Whether a document of this length runs through torch's kernel."""
        if self.layer.window is not None and length > self.layer.window:
            return False
        return not self.in_blocks or length not in _IN_BLOCKS

    def documents(self, *rows: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        """The parts [1, heads, t, d] of rows [1, heads, T, d] that belong to each document."""
        return zip(*(torch.split(each, list(self.lengths), 2) for each in rows), strict=True)


@dataclass(frozen=True)
class _Part:
    """A document and those heads of its keys that one thread computes."""

    document: int
    first: int
    last: int

    def keys(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The part's heads [1, heads, t, d] of tensors with the keys' heads."""
        return self._cut(tensors, 1)

    def queries(self, row: _Row, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The part's heads of tensors with the queries' heads."""
        return self._cut(tensors, row.layer.groups)

    def _cut(self, tensors: tuple[torch.Tensor, ...], groups: int) -> tuple[torch.Tensor, ...]:
        first, last = self.first * groups, self.last * groups
        if last - first == tensors[0].shape[1]:
            return tensors
        return tuple(each[:, first:last] for each in tensors)


def _parts(row: _Row, key_heads: int) -> list[_Part]:
    """The longest first. A document that is much of all the work is divided by heads."""
    threads = torch.get_num_threads()
    fair = sum(length**2 for length in row.lengths) / (2 * threads)
    parts: list[_Part] = []
    for index in sorted(range(len(row.lengths)), key=lambda each: -row.lengths[each]):
        heads = -(-key_heads // threads) if row.lengths[index] ** 2 > fair else key_heads
        parts += [_Part(index, first, min(first + heads, key_heads)) for first in range(0, key_heads, heads)]
    return parts


def _share_out(work: Callable[[Iterable[_Part]], None], row: _Row, query: torch.Tensor, key: torch.Tensor) -> None:
    parts = _parts(row, key.shape[1])
    is_small = query.shape[1] * query.shape[3] * sum(length**2 for length in row.lengths) < _WORTH_THREADS
    if is_small or _get_current_dispatch_mode() is not None:  # a trace sees this thread alone
        work(parts)
    else:
        each_alone(work, parts)


def _empty_like_rows(like: torch.Tensor) -> torch.Tensor:
    """[1, heads, T, d] as a view of [1, T, heads, d], which is what the projections before and after want."""
    batch, heads, length, width = like.shape
    return like.new_empty(batch, length, heads, width).transpose(1, 2)


def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, row: _Row) -> tuple[torch.Tensor, torch.Tensor]:
    """(the output, the log of the sum of exponentials [1, heads, T, 1] of documents that ran through the kernel)."""
    output = _empty_like_rows(q)
    log_sums = q.new_empty(*q.shape[:3], 1, dtype=torch.promote_types(q.dtype, torch.float32))
    documents = list(row.documents(q, k, v, output, log_sums))

    def work(parts: Iterable[_Part]) -> None:
        scratch = Scratch()
        for part in parts:
            queries, keys, values, target, sums = documents[part.document]
            queries, target, sums = part.queries(row, queries, target, sums)
            keys, values = part.keys(keys, values)
            if row.uses_kernel(keys.shape[2]):
                _forward_kernel(queries, keys, values, target, sums, row.layer)
            else:
                document_blocks.forward(queries[0], keys[0], values[0], target[0], row.layer, scratch)

    _share_out(work, row, q, k)
    return output, log_sums


def _backward(
    gradient: torch.Tensor, saved: tuple[torch.Tensor, ...], row: _Row
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`saved`: queries, keys, values, output, log sums."""
    results = _empty_like_rows(saved[0]), _empty_like_rows(saved[1]), _empty_like_rows(saved[2])
    documents = list(row.documents(gradient, *saved, *results))

    def work(parts: Iterable[_Part]) -> None:
        scratch = Scratch()
        for part in parts:
            d_output, queries, keys, values, output, sums, d_queries, d_keys, d_values = documents[part.document]
            queries, d_output, output, sums, d_queries = part.queries(row, queries, d_output, output, sums, d_queries)
            keys, values, d_keys, d_values = part.keys(keys, values, d_keys, d_values)
            given, wanted = (queries, keys, values, d_output), (d_queries, d_keys, d_values)
            if row.uses_kernel(keys.shape[2]):
                _backward_kernel(*given, output, sums, wanted, row.layer)
            else:
                inputs, targets = [each[0] for each in given], [each[0] for each in wanted]
                document_blocks.backward(inputs, targets, row.layer, scratch)

    _share_out(work, row, saved[0], saved[1])
    return results


def _for_kernel(layer: Heads, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """As torch's kernel wants them: with as many heads of keys as of queries, which are the first of the tensors."""
    heads, length = tensors[0].shape[1:3]
    if tensors[0].dtype == torch.bfloat16 and length <= _SHORT_IN_KERNEL:
        tensors = tuple(each.float() for each in tensors)
    return [each if each.shape[1] == heads else each.repeat_interleave(layer.groups, 1) for each in tensors]


def _forward_kernel(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    target: torch.Tensor,
    log_sums: torch.Tensor,
    layer: Heads,
) -> None:
    q, k, v = _for_kernel(layer, queries, keys, values)
    found, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=layer.scale)
    target.copy_(found)
    log_sums.copy_(sums.unsqueeze(-1))


def _backward_kernel(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    d_output: torch.Tensor,
    output: torch.Tensor,
    log_sums: torch.Tensor,
    targets: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    layer: Heads,
) -> None:
    q, k, v, given, out = _for_kernel(layer, queries, keys, values, d_output, output)
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        given, q, k, v, out, log_sums.squeeze(-1), 0.0, True, scale=layer.scale
    )
    for target, gradient in zip(targets, found, strict=True):
        heads = target.shape[1]
        target.copy_(gradient if gradient.shape[1] == heads else gradient.unflatten(1, (heads, -1)).sum(2))


class _DocumentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, row: _Row) -> torch.Tensor:
        output, log_sums = _forward(q, k, v, row)
        ctx.save_for_backward(q, k, v, output, log_sums)
        ctx.row = row
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *_backward(gradients[0], ctx.saved_tensors, ctx.row), None


def computes(query: torch.Tensor, value: torch.Tensor, longest: int, window: int | None, *, in_blocks: bool) -> bool:
    """Whether `attend` computes attention of such tensors, with a longest document of `longest` tokens, and fast."""
    return (
        query.device.type == "cpu"
        and query.dtype in _DTYPES
        and query.shape[-1] == value.shape[-1]
        and query.shape[1] * query.shape[3] >= _SMALLEST_ROW
        and (in_blocks or window is None or longest <= window)
    )


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
    scale: float,
    window: int | None,
    *,
    in_blocks: bool,
) -> torch.Tensor:
    """Causal attention within each document, [1, heads, T, d], differentiable once.

    `query` [1, heads, T, d]; `key`, `value` [1, key heads, T, d], key heads dividing heads; `lengths` sum to T. With a
    window a token sees itself and the `window - 1` tokens before it. `in_blocks`: long documents and those that a
    window limits are computed in blocks; else all run through torch's kernel.
    """
    row = _Row(lengths, Heads(scale, window, query.shape[1] // key.shape[1]), in_blocks)
    if not torch.is_grad_enabled():
        return _forward(query, key, value, row)[0]
    result: torch.Tensor = _DocumentAttention.apply(query, key, value, row)  # type: ignore[no-untyped-call]
    return result
