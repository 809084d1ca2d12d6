"""Which characters of a rendered conversation are trained.

They are what the model itself would have to produce: each assistant turn, with the token that ends it. As generation
stops at that token, a newline behind it is not trained. The spans come from the first of

1. `{% generation %}` blocks in the template, as transformers marks them;
2. prefixes: the text of the turns before with the generation prompt must be a prefix of the text up to the turn, and
   that of the whole text; the turn is what lies between;
3. markers, for templates that render a turn differently when others follow: the turn's content is replaced by two
   different markers, and the span is what lies between the generation prompt and what follows the marker.

2 and 3 are proven for every row and turn, or the row is refused with TEMPLATE_UNSUPPORTED: nothing is guessed.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from luthier_trainer.data.formats import Conversation
from luthier_trainer.data.template import Span, Template
from luthier_trainer.errors import TrainingError

_MARKERS = ("Zqx7vLuthierKw", "Hjw3gMarkerYz")
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text, and the character spans [start, end) that are trained, in order."""

    text: str
    spans: tuple[Span, ...]


def render(conversation: Conversation, template: Template) -> Rendered:
    """The conversation's text and what of it is trained.

    Raises TrainingError: DATASET_INVALID when the template refuses the conversation, TEMPLATE_UNSUPPORTED when it
    cannot be shown which tokens are the assistant's.
    """
    turns = [index for index, turn in enumerate(conversation) if turn["role"] == "assistant"]
    text, blocks = template.render(conversation)
    if template.marks_turns:
        spans: list[Span] | None = [block for block in blocks if block[0] < block[1]]
        if not spans:
            raise _unsupported("its {% generation %} block marks nothing in a conversation with an assistant turn")
    else:
        spans = _by_prefix(conversation, turns, text, template) or _by_marker(conversation, turns, text, template)
        if spans is None:
            raise _unsupported("it has no {% generation %} block and changes earlier turns when later ones follow")
    context = {number for number, index in enumerate(turns) if conversation[index].get("weight") == 0}
    if context and len(spans) != len(turns):
        raise _unsupported("its {% generation %} blocks are not one an assistant turn, so no turn can be left out")
    kept = [_through_turn_end(text, span, template) for n, span in enumerate(spans) if n not in context]
    return Rendered(text, tuple(kept))


def _unsupported(why: str) -> TrainingError:
    return TrainingError(
        "TEMPLATE_UNSUPPORTED",
        f"The model's chat template does not tell which tokens are the assistant's: {why}.",
        "Put {% generation %} and {% endgeneration %} around the assistant's text in the model's chat template.",
    )


def _by_prefix(conversation: Conversation, turns: Sequence[int], text: str, template: Template) -> list[Span] | None:
    """A span for each turn, or None where the text before one is no prefix of the text with it."""
    spans = []
    for index in turns:
        before, _ = template.render(conversation[:index], prompt=True)
        through = text if index + 1 == len(conversation) else template.render(conversation[: index + 1])[0]
        if not (through.startswith(before) and text.startswith(through)):
            return None
        spans.append((len(before), len(through)))
    return spans


def _by_marker(conversation: Conversation, turns: Sequence[int], text: str, template: Template) -> list[Span] | None:
    """A span for each turn, or None where something else than the turn itself depends on the turn's content."""
    spans = []
    for index in turns:
        first, second = (template.render(_replaced(conversation, index, marker))[0] for marker in _MARKERS)
        head, *tails = first.split(_MARKERS[0])
        if len(tails) != 1 or second != head + _MARKERS[1] + tails[0]:
            return None
        at = _turn_start(conversation[:index], head, tails[0], template)
        end = len(text) - len(tails[0])
        if at is None or at >= end or not text.startswith(head[:at]) or not text.endswith(tails[0]):
            return None
        spans.append((at, end))
    return spans


def _turn_start(before: Conversation, head: str, tail: str, template: Template) -> int | None:
    """Where a turn begins in `head`, the text up to its content: behind the generation prompt. A template may prompt
    for more than it renders later (an opened `<think>`); then the turn begins where the two part, in the prompt."""
    prompt, _ = template.render(before, prompt=True)
    if head.startswith(prompt):
        return len(prompt)
    without, _ = template.render(before)
    if not prompt.startswith(without) or not template.turn_end.match(tail.lstrip()):
        return None
    header = prompt[len(without) :]
    candidates = []
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


def _through_turn_end(text: str, span: Span, template: Template) -> Span:
    """The span up to and including the token that ends its turn: cut behind it when only space or further such tokens
    follow (blocks of the template are left as they are), extended over it when the turn stops short of it, and left
    alone when the template ends turns with plain text."""
    start, end = span
    solid = start + len(text[start:end].rstrip())
    ended = 0
    for token in template.turn_end.finditer(text, start, solid):
        if not ended or text[ended : token.start()].strip():
            ended = token.end()
            last = ended
        else:
            last = token.end()
    if ended and last == solid:
        return start, end if template.marks_turns else ended
    space = _SPACE.match(text, end)
    match = template.turn_end.match(text, space.end() if space else end)
    return start, match.end() if match else end
