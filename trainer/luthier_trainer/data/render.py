"""Conversations to tokens: one rendering path for training, evaluation and generation.

A conversation is rendered by the tokenizer's own chat template to one text, and the text is tokenised once, without
special tokens added: a template writes its own start token. Which characters are trained is decided on the text
(`spans`), and a token is trained when it overlaps them.
"""

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from luthier_trainer.data.formats import Conversation, Message
from luthier_trainer.data.spans import Rendered, render
from luthier_trainer.data.template import Span, template_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One tokenised row. input_ids: int32 [tokens]; trained: bool [tokens], the tokens that the loss counts as targets;
    truncated: whether tokens were cut off at the end."""

    input_ids: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]
    truncated: bool


def template_sha256(tokenizer: "PreTrainedTokenizerBase") -> str:
    """SHA-256 of the template's source, hexadecimal. Raises as `template_of`."""
    return hashlib.sha256(template_of(tokenizer).source.encode()).hexdigest()


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation up to where the model answers. Raises as `template_of` and `render`."""
    text, _ = template_of(tokenizer).render(messages, prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def encode(conversation: Conversation, tokenizer: "PreTrainedTokenizerBase", *, max_length: int) -> Example:
    """Renders and tokenises one conversation, cut at the end to max_length tokens.

    Raises as `template_of` and `render`.
    """
    return tokenise([render(conversation, template_of(tokenizer))], tokenizer, max_length=max_length)[0]


def tokenise(rendered: Sequence[Rendered], tokenizer: "PreTrainedTokenizerBase", *, max_length: int) -> list[Example]:
    """Tokenises rendered conversations in one call, each cut at the end to max_length tokens."""
    batch = tokenizer(
        [row.text for row in rendered], add_special_tokens=False, return_attention_mask=False, verbose=False
    )
    return [
        _example(encoding.ids, encoding.offsets, row.spans, max_length)
        for encoding, row in zip(batch.encodings or (), rendered, strict=True)
    ]


def _example(ids: list[int], offsets: list[Span], spans: tuple[Span, ...], max_length: int) -> Example:
    """Trains each token from the first that ends after a span's start to the last that begins before its end. (The
    bytes of one character share its offsets; a token whose spaces were trimmed may have an empty one.)"""
    trained = np.zeros(len(ids), dtype=np.bool_)
    for start, end in spans:
        first = bisect_right(offsets, start, key=_end)
        after = bisect_left(offsets, end, key=_start)
        trained[first:after] = True
    return Example(np.array(ids[:max_length], dtype=np.int32), trained[:max_length], len(ids) > max_length)


def _start(offset: Span) -> int:
    return offset[0]


def _end(offset: Span) -> int:
    return offset[1]
