"""Rendered passages to tokens: one path for training, evaluation, previews and generation.

A passage is rendered to one text (`spans`), and the text is tokenised once, without special tokens added: a template
writes its own start token. A token is trained when it overlaps the characters that are.
"""

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from luthier_trainer.data.masks.sandbox import Span
from luthier_trainer.data.masks.spans import Rendered, render, render_text
from luthier_trainer.data.masks.template import Template, template_of
from luthier_trainer.data.problem import Level, Problem
from luthier_trainer.data.records import Message

__all__ = [
    "Example",
    "Rendered",
    "encode",
    "examples_of",
    "problems",
    "prompt_ids",
    "render",
    "render_text",
    "template_sha256",
    "tokenise",
]

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Roles whose text is none of the model's.
_OTHERS = frozenset({"system", "user", "tool"})


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One tokenised passage. input_ids: int32 [tokens]; trained: bool [tokens], the tokens that the loss counts as
    targets; across: how many of these begin before the text that is trained."""

    input_ids: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]
    _encoding: Any = None
    across: int = 0

    @property
    def offsets(self) -> npt.NDArray[np.int32]:
        """int32 [tokens, 2]: the characters [start, end) of each token in the text; of an example that `tokenise` made.
        Made anew each time, at about half the cost of tokenising."""
        pairs = chain.from_iterable(self._encoding.offsets)
        return np.fromiter(pairs, np.int32, 2 * len(self.input_ids)).reshape(-1, 2)


def template_sha256(tokenizer: "PreTrainedTokenizerBase", template: Template | None = None) -> str:
    """SHA-256 of the template's source, hexadecimal. Raises as `template_of`."""
    return hashlib.sha256((template or template_of(tokenizer)).source.encode(errors="surrogatepass")).hexdigest()


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", template: Template, prompt: str | Sequence[Message]) -> list[int]:
    """Token ids of a conversation up to where the model answers. A string is one user turn; for a model without a chat
    template it is text to go on with. Raises as `Template.render`."""
    if isinstance(prompt, str) and not template.source:
        text = template.frame.start + prompt
    else:
        turns: Sequence[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text, _ = template.render(turns, prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def tokenise(rendered: Sequence[Rendered], tokenizer: "PreTrainedTokenizerBase") -> list[Example]:
    """Tokenises rendered passages in one call, uncut."""
    return examples_of(rendered, encode(rendered, tokenizer))


def encode(rendered: Sequence[Rendered], tokenizer: "PreTrainedTokenizerBase") -> list[Any]:
    """What the tokenizer makes of the texts, for `examples_of`. Python may go on meanwhile, in another thread."""
    backend = tokenizer.backend_tokenizer
    # What a tokenizer's file may ask for, and what earlier calls left behind.
    backend.no_truncation()
    backend.no_padding()
    encodings: list[Any] = backend.encode_batch([row.text for row in rendered], add_special_tokens=False)
    return encodings


def examples_of(rendered: Sequence[Rendered], encodings: Sequence[Any]) -> list[Example]:
    """The passages as tokens."""
    return [_example(encoding, row.spans) for encoding, row in zip(encodings, rendered, strict=True)]


def _example(encoding: Any, spans: tuple[Span, ...]) -> Example:
    """Trains each token from the first that ends after a span's start to the last that begins before its end. (The
    bytes of one character share its offsets; a token whose spaces were trimmed may have an empty one.)"""
    ids = np.array(encoding.ids, dtype=np.int32)
    trained = np.zeros(len(ids), dtype=np.bool_)
    numbers = range(len(ids))
    across = 0
    place = encoding.token_to_chars  # each offset by itself: a list of all of them takes longer to make than to search
    for start, end in spans:
        first = bisect_right(numbers, start, key=lambda number: place(number)[1])
        after = bisect_left(numbers, end, first, key=lambda number: place(number)[0])
        trained[first:after] = True
        across += first < after and place(first)[0] < start
    return Example(ids, trained, encoding, across)


def problems(rendered: Rendered, example: Example, template: Template) -> list[Problem]:
    """What is wrong with a passage as tokens, which were tokenised by the template's tokenizer. Of a passage that is to
    be answered only the tokens are judged."""
    found = []
    ids = example.input_ids
    start, unknown = template.start_id, template.unknown_id
    if start is not None and len(ids) > 1 and ids[0] == start and ids[1] == start:
        message = "The text starts with two start tokens, and the model has only ever seen one."
        fix = "Take one out of the rows, or out of the chat template."
        found.append(Problem("DOUBLE_BOS", message, fix))
    if unknown is not None and (count := np.count_nonzero(ids == unknown)):
        message = f"{count} of {len(ids)} tokens stand for characters that the tokenizer does not know."
        fix = "Take a model whose tokenizer knows the language and the signs of the text."
        found.append(Problem("UNKNOWN_TOKENS", message, fix, Level.WARNING))
    for role in dict.fromkeys(rendered.lost):
        message = f"The chat template leaves out, or rewrites, the content of a {role} turn of this row."
        fix = "See the preview, and take another chat template if the turn matters."
        found.append(Problem("TURN_NOT_RENDERED", message, fix, Level.WARNING))
    found += _control_tokens(rendered, template)
    if rendered.method or rendered.spans:
        found += _problems_of_training(example, rendered)
    return found


def _control_tokens(rendered: Rendered, template: Template) -> list[Problem]:
    """Of what others write and the model answers. What an assistant says is the model's to write, with its tokens for
    thoughts and calls; and raw text has them on purpose."""
    for start, end, role in rendered.roles:
        if role in _OTHERS and (token := template.special.search(rendered.text, start, end)):
            message = f"The text of a {role} turn contains {token[0]}, which the model sees as a token of control."
            fix = "Take it out, or write it otherwise: it ends a turn, or begins one, where there is none."
            return [Problem("CONTROL_TOKEN_IN_TEXT", message, fix, Level.WARNING)]
    return []


def _problems_of_training(example: Example, rendered: Rendered) -> list[Problem]:
    # Nothing predicts the first token.
    if not example.trained[1:].any():
        message = "No token of the row is trained, so the row teaches nothing."
        fix = "Give it an answer that is not of weight 0 and lies within the longest length."
        return [Problem("NOTHING_TRAINED", message, fix, Level.WARNING)]
    if rendered.endless:
        message = "An answer is trained without a token that ends it, so the model may not learn when to stop."
        fix = "Take a chat template that ends turns with a token of the tokenizer, inside its {% generation %} block."
        return [Problem("END_OF_TURN_NOT_TRAINED", message, fix, Level.WARNING)]
    if example.across:
        message = "The first token of an answer begins in the prompt, so the model cannot write it behind a prompt."
        fix = "Let answers not begin with what joins with the end of the prompt, as a space or a new line."
        return [Problem("TOKEN_ACROSS_PROMPT", message, fix, Level.NOTE)]
    return []
