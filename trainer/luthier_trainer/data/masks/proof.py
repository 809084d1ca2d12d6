"""Where each assistant turn lies in a rendered conversation, from behind the generation prompt to its end.

The spans come from the first of

1. `{% generation %}` blocks in the template, as transformers marks them; where a turn is to be left out, only if they
   are shown to be one a turn;
2. prefixes: the text of the turns before with the generation prompt must be a prefix of the text up to the turn, and
   that of the whole text; the turn is what lies between. For plain conversations the fixed text between contents is
   learned in this way, and found again in each row (`layout`);
3. markers, for templates that render a turn differently when others follow: the turn's content is replaced by two
   different markers, and the span is what lies between the generation prompt and what follows the marker;
4. a template that Luthier brings for the model's family, when it makes the very same text of this conversation: then
   its blocks are right here too.

2 to 4 are proven for every row and turn, or the row is refused with TEMPLATE_UNSUPPORTED: nothing is guessed.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from luthier_trainer.data.masks.markers import MARKERS
from luthier_trainer.data.masks.sandbox import Span
from luthier_trainer.data.masks.template import RowRefused, Template
from luthier_trainer.data.records import Conversation, plain
from luthier_trainer.errors import TrainingError

_SPACE = re.compile(r"\s*")

Tools = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Answers:
    """spans: of the assistant turns, each with the token that ends it; one each if `each`; method: how they are known;
    contents: where the content of each turn lies, if that came with it."""

    spans: tuple[Span, ...]
    method: str
    each: bool
    contents: tuple[Span | None, ...] | None = None


def answers(
    conversation: Conversation, tools: Tools, template: Template, text: str, blocks: list[Span] | None, *, each: bool
) -> Answers:
    """The assistant turns of a conversation with at least one. each: one span for each of them is needed.

    Raises TrainingError TEMPLATE_UNSUPPORTED.
    """
    turns = [index for index, turn in enumerate(conversation) if turn["role"] == "assistant"]
    if blocks is not None:
        marked = [block for block in blocks if block[0] < block[1]]
        if not marked:
            raise _unsupported("its {% generation %} block marks nothing in a conversation with an assistant turn")
        if not each or _one_a_turn(conversation, turns, tools, text, marked, template):
            spans = tuple(_through_turn_end(text, span, template, cut=False) for span in marked)
            return Answers(spans, "generation blocks", len(marked) == len(turns))
    elif not tools and (known := template.layout) is not None:
        placed = known.place(conversation, text)
        if placed is not None:
            closing = len(known.after) if known.closes else 0
            spans = tuple((start, _closed(text, end, closing, template)) for start, end in placed.answers)
            return Answers(spans, "prefixes", True, placed.contents)
    found = _by_prefix(conversation, turns, tools, text, template)
    method = "prefixes"
    if found is None:
        found, method = _by_marker(conversation, turns, tools, text, template), "markers"
    if found is not None:
        return Answers(tuple(_through_turn_end(text, span, template, cut=True) for span in found), method, True)
    found = _by_family(conversation, turns, tools, text, template)
    if found is None:
        why = "it has no {% generation %} block and changes earlier turns when later ones follow"
        if blocks is not None:
            why = "its {% generation %} blocks are not one an assistant turn, so no turn can be left out"
        raise _unsupported(why)
    return Answers(tuple(found), "family template", True)


def _unsupported(why: str) -> TrainingError:
    return TrainingError(
        "TEMPLATE_UNSUPPORTED",
        f"The chat template does not tell which tokens are the assistant's: {why}.",
        "Put {% generation %} and {% endgeneration %} around the assistant's text in it and give it as chat_template, "
        "name one of Luthier's templates, or say with response_template what stands before an answer.",
    )


def _one_a_turn(
    conversation: Conversation,
    turns: Sequence[int],
    tools: Tools,
    text: str,
    blocks: Sequence[Span],
    template: Template,
) -> bool:
    """Whether each turn has one block: their number alone does not tell, as one turn may have two and another none."""
    if len(blocks) != len(turns):
        return False
    if len(turns) == 1 or template.name:  # Luthier's own are written so
        return True
    known = None if tools else template.layout
    placed = None if known is None else known.place(conversation, text)
    if placed is not None:
        contents = [
            span for span, turn in zip(placed.contents, conversation, strict=True) if turn["role"] == "assistant"
        ]
        return all(
            content is not None and block[0] <= content[0] and content[1] <= block[1]
            for block, content in zip(blocks, contents, strict=True)
        )
    for number, index in enumerate(turns[:-1], 1):
        try:
            _, found = template.render(conversation[: index + 1], tools=tools)
        except RowRefused:
            return False
        if found is None or sum(start < end for start, end in found) != number:
            return False
    return True


def _by_prefix(
    conversation: Conversation, turns: Sequence[int], tools: Tools, text: str, template: Template
) -> list[Span] | None:
    """A span for each turn, or None where the text before one is no prefix of the text with it."""
    spans = []
    for index in turns:
        before = _rendered(template, conversation[:index], tools, prompt=True)
        through = text
        if index + 1 < len(conversation):
            through = _rendered(template, conversation[: index + 1], tools) or ""
        if before is None or not (through.startswith(before) and text.startswith(through)):
            return None
        spans.append((len(before), len(through)))
    return spans


def _by_marker(
    conversation: Conversation, turns: Sequence[int], tools: Tools, text: str, template: Template
) -> list[Span] | None:
    """A span for each turn, or None where something else than the turn itself depends on the turn's content."""
    spans = []
    for index in turns:
        first, second = (_rendered(template, _replaced(conversation, index, marker), tools) for marker in MARKERS[:2])
        if first is None or second is None:
            return None
        head, *tails = first.split(MARKERS[0])
        if len(tails) != 1 or second != head + MARKERS[1] + tails[0]:
            return None
        at = _turn_start(conversation[:index], tools, head, tails[0], template)
        end = len(text) - len(tails[0])
        if at is None or at >= end or not text.startswith(head[:at]) or not text.endswith(tails[0]):
            return None
        spans.append((at, end))
    return spans


def _turn_start(before: Conversation, tools: Tools, head: str, tail: str, template: Template) -> int | None:
    """Where a turn begins in `head`, the text up to its content: behind the generation prompt. A template may prompt
    for more than it renders later (an opened `<think>`); then the turn begins where the two part, in the prompt."""
    prompt = _rendered(template, before, tools, prompt=True)
    if prompt is None:
        return None
    if head.startswith(prompt):
        return len(prompt)
    without = _rendered(template, before, tools)
    if without is None or not prompt.startswith(without) or not template.turn_end.match(tail.lstrip()):
        return None
    header = prompt[len(without) :]
    candidates = []
    said = plain(before[-1]).strip() if before else ""
    if said and said in prompt and (asked := prompt[prompt.rfind(said) :]) in head:
        candidates.append(head.rfind(asked) + len(asked))
    if header in head:
        candidates.append(head.rfind(header) + len(header))
    common = _common_prefix(prompt, head)
    if common > len(without):
        cut = (token.start() for token in template.control.finditer(head) if token.start() < common < token.end())
        candidates.append(next(cut, common))
    return next((at for at in candidates if not template.turn_end.search(head, at)), None)


def _common_prefix(one: str, other: str) -> int:
    """How many characters two texts share from their start."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((number for number, (a, b) in pairs if a != b), min(len(one), len(other)))


def _replaced(conversation: Conversation, index: int, content: str) -> Conversation:
    changed = list(conversation)
    changed[index] = {"role": "assistant", "content": content}
    return changed


def _by_family(
    conversation: Conversation, turns: Sequence[int], tools: Tools, text: str, template: Template
) -> list[Span] | None:
    """The blocks of a template that Luthier brings and that makes the same text of the conversation."""
    for relative in template.relatives:
        try:
            same, blocks = relative.render(conversation, tools=tools)
        except RowRefused:
            continue
        if same == text and blocks is not None and len(blocks) == len(turns):
            return blocks
    return None


def _rendered(template: Template, conversation: Conversation, tools: Tools, *, prompt: bool = False) -> str | None:
    """The text; None where the template refuses the conversation: a part of one, or one with a marker in it."""
    try:
        return template.render(conversation, tools=tools, prompt=prompt)[0]
    except RowRefused:
        return None


def _through_turn_end(text: str, span: Span, template: Template, *, cut: bool) -> Span:
    """The span up to and including the token that ends its turn: cut behind it, if asked for, when only space or
    further such tokens follow; extended over it when the turn stops short of it; and left alone when the template ends
    turns with plain text."""
    start, end = span
    solid = start + len(text[start:end].rstrip())
    ended = last = 0
    for token in template.turn_end.finditer(text, start, solid):
        if not ended or text[ended : token.start()].strip():
            ended = token.end()
        last = token.end()
    if ended and last == solid:
        return start, ended if cut else end
    return start, _over_turn_end(text, end, template)


def _closed(text: str, at: int, closing: int, template: Template) -> int:
    """The end of an answer whose content ends at `at`, behind which the template writes `closing` characters: behind
    the token that ends it, or where there is none, behind all of them."""
    end = _over_turn_end(text, at, template)
    return end if end > at else at + closing


def _over_turn_end(text: str, at: int, template: Template) -> int:
    """Behind the token that ends a turn, if but space lies between it and `at`; else `at`."""
    space = _SPACE.match(text, at)
    match = template.turn_end.match(text, space.end() if space else at)
    return match.end() if match else at
