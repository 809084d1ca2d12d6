"""Passages as text, and which of its characters are trained.

Of a conversation these are what the model itself would have to produce: each assistant turn with its tool calls and
with the token that ends it (`proof` says how they are found). As generation stops at that token, a newline behind it
is not trained. Turns of weight 0 are context. Of raw text all is trained, and the token that ends it.

A response template replaces this by a rule about the text alone. Where it occurs outside of what the system, the user
or a tool says, training begins behind it, and goes through the first token that ends a turn; where the next occurrence
comes first, up to that; and where neither comes before the next turn, or ever, to the end of the answer's own content.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING

from luthier_trainer.data.masks.masking import Masking, TrainOn
from luthier_trainer.data.masks.proof import answers
from luthier_trainer.data.masks.sandbox import Span, row_fence
from luthier_trainer.data.masks.template import RowRefused, Template, TextFrame, text_frame
from luthier_trainer.data.problem import Problem
from luthier_trainer.data.records import Conversation, Message, Passage, plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALL_TOKENS = "all tokens"
RESPONSE_TEMPLATE = "response template"
_ASSISTANT = Masking()
# Passages that are compared with each other: what they share is never trained.
_ANSWERS = frozenset({"chosen", "rejected", "desired", "undesired"})
# Where the content of a turn may lie: a single letter has many places in a long text.
_MOST_PLACES = 100

Role = tuple[int, int, str]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A passage as text.

    spans: the characters [start, end) that are trained, in order; method: how these are known, as in
    `luthier.v1.TokenReport.mask_method`, and empty where nothing was to be trained; roles: where the contents of turns
    lie, (start, end, role) in order, of raw text one of the role `text`; lost: roles of turns before the last answer
    whose content is not in the text, in order; endless: how many spans do not end with a token that ends a turn.
    """

    text: str
    spans: tuple[Span, ...]
    method: str = ""
    roles: tuple[Role, ...] = ()
    lost: tuple[str, ...] = ()
    endless: int = 0


def render(passage: Passage, template: Template, masking: Masking = _ASSISTANT) -> Rendered:
    """The passage's text and what of it is trained.

    Raises RowRefused when the template refuses the passage, leaves out tools or images, or when it lacks the response
    template; TrainingError TEMPLATE_UNSUPPORTED when it cannot be shown which tokens are the assistant's, and
    TEMPLATE_TOO_LARGE or TEMPLATE_TOO_SLOW.
    """
    if passage.messages is None:
        return _framed(passage.text or "", template.frame)
    with row_fence(len(passage.messages)):
        return _of_conversation(passage, passage.messages, template, masking)


def _of_conversation(passage: Passage, conversation: Conversation, template: Template, masking: Masking) -> Rendered:
    text, blocks = template.render(conversation, tools=passage.tools, prompt=passage.to_answer)
    if passage.to_answer:
        roles, lost = _roles(conversation, text, template, {})
        return Rendered(text, (), "", roles, lost)
    if masking.response_template:
        roles, lost = _roles(conversation, text, template, {})
        spans = _by_response_template(conversation, masking.response_template, text, roles, template)
        return _rendered(text, spans, RESPONSE_TEMPLATE, roles, lost, template)
    if masking.train_on is TrainOn.ALL_TOKENS and passage.name not in _ANSWERS:
        roles, lost = _roles(conversation, text, template, {})
        return Rendered(text, ((0, len(text)),), ALL_TOKENS, roles, lost)
    turns = [index for index, turn in enumerate(conversation) if turn["role"] == "assistant"]
    if not turns:
        roles, lost = _roles(conversation, text, template, {})
        return Rendered(text, (), "", roles, lost)
    kept = [number for number, index in enumerate(turns) if conversation[index].get("weight") != 0]
    if masking.train_on is TrainOn.LAST_TURN:
        kept = [number for number in kept if number == len(turns) - 1]
    found = answers(conversation, passage.tools, template, text, blocks, each=len(kept) < len(turns))
    if found.contents is not None:
        placed = list(zip(found.contents, conversation, strict=True))
        roles = tuple((*span, turn["role"]) for span, turn in placed if span is not None)
        lost = tuple(turn["role"] for span, turn in placed if span is None)
    else:
        known = dict(zip(turns, found.spans, strict=True)) if found.each else {}
        roles, lost = _roles(conversation, text, template, known)
    chosen = found.spans if len(kept) == len(turns) else tuple(found.spans[number] for number in kept)
    return _rendered(text, chosen, found.method, roles, lost, template)


def render_text(text: str, tokenizer: "PreTrainedTokenizerBase") -> Rendered:
    """Raw text, which needs no template. Raises TrainingError TOKENIZER_UNSUPPORTED."""
    return _framed(text, _frame(tokenizer))


@lru_cache(maxsize=4)
def _frame(tokenizer: "PreTrainedTokenizerBase") -> TextFrame:
    return text_frame(tokenizer)


def _framed(text: str, frame: TextFrame) -> Rendered:
    start = "" if text.startswith(frame.start) else frame.start
    end = "" if frame.end and text.endswith(frame.end) else frame.end
    whole = start + text + end
    roles = ((len(start), len(start) + len(text), "text"),)
    return Rendered(whole, ((0, len(whole)),), ALL_TOKENS, roles, (), 0 if frame.end else 1)


def _rendered(
    text: str, spans: Sequence[Span], method: str, roles: tuple[Role, ...], lost: tuple[str, ...], template: Template
) -> Rendered:
    endless = sum(not text[start:end].rstrip().endswith(template.ends) for start, end in spans)
    return Rendered(text, tuple(spans), method, roles, lost, endless)


def _by_response_template(
    conversation: Conversation, response: str, text: str, roles: Sequence[Role], template: Template
) -> list[Span]:
    said = [(start, end) for start, end, role in roles if role != "assistant"]
    starts = [at + len(response) for at in _occurrences(text, response) if not _inside(at, said)]
    if not starts:
        message = (
            f"The text of the row does not contain the response template {response!r}, so nothing would be trained."
        )
        fix = "Give the text that stands before an answer as the chat template writes it; a preview shows it."
        raise RowRefused(Problem("RESPONSE_TEMPLATE_MISSING", message, fix))
    spans = []
    for start, following in zip(starts, [*(at - len(response) for at in starts[1:]), len(text)], strict=True):
        content = next((role for role in roles if role[2] == "assistant" and start <= role[0] < following), None)
        other = min((at for at, _ in said if at >= start), default=len(text))
        token = template.turn_end.search(text, content[1] if content else start, min(following, other))
        if token:
            end = token.end()
        elif content and following > other:
            end = content[1]
        else:
            end = following
        spans.append((start, end))
    left_out = [turn.get("weight") == 0 for turn in conversation if turn["role"] == "assistant"]
    if any(left_out):
        if len(left_out) != len(spans):
            message = "The response template does not occur once for each answer, so none of weight 0 can be left out."
            raise RowRefused(Problem("RESPONSE_TEMPLATE_MISSING", message, "Give one that stands before each answer."))
        spans = [span for span, out in zip(spans, left_out, strict=True) if not out]
    return spans


def _occurrences(text: str, part: str) -> Iterator[int]:
    at = text.find(part)
    while at >= 0:
        yield at
        at = text.find(part, at + len(part))


def _inside(at: int, spans: Sequence[Span]) -> bool:
    return any(start <= at < end for start, end in spans)


def _roles(
    conversation: Conversation, text: str, template: Template, answers: dict[int, Span]
) -> tuple[tuple[Role, ...], tuple[str, ...]]:
    """Where the contents of turns lie, and the roles of turns that should be there and are not. answers: the spans of
    assistant turns as far as they are known, by index.

    Contents are looked for one behind the other. The system's is looked for last, anywhere else: some templates move it
    into a user turn. Short contents may occur in the template's own text too, so an occurrence before a control token
    goes first.
    """
    found: list[Role] = []
    lost: list[str] = []
    at = 0
    for index, turn in enumerate(conversation):
        role = turn["role"]
        if role == "system":
            continue
        if index in answers:
            start, end = answers[index]
            ended = text[start:end].rstrip()
            token = next((each for each in template.ends if ended.endswith(each)), "")
            found.append((start, start + len(ended) - len(token), role))
            at = end
            continue
        limit = next((answers[later][0] for later in (index + 1, index + 2) if later in answers), len(text))
        for content in _contents(turn):
            span = _find(content, text, at, limit, template)
            if span is not None:
                found.append((*span, role))
                at = span[1]
            elif role != "assistant":
                lost.append(role)
    for turn in conversation:
        if turn["role"] == "system":
            for content in _contents(turn):
                taken = [place[:2] for place in found]
                places = islice(_occurrences(text, content), _MOST_PLACES)
                place = next((each for each in places if not _inside(each, taken)), None)
                if place is None:
                    lost.append("system")
                else:
                    found.append((place, place + len(content), "system"))
    return tuple(sorted(found)), tuple(lost)


def _contents(turn: Message) -> list[str]:
    """The texts of a turn, stripped as most templates do, without those that are empty."""
    content = turn["content"]
    texts = [plain(turn)] if isinstance(content, str) else [plain({"role": "", "content": [part]}) for part in content]
    return [text.strip() for text in texts if text.strip() and text != "<image>"]


def _find(content: str, text: str, at: int, limit: int, template: Template) -> Span | None:
    first = text.find(content, at, limit)
    place = first
    for _ in range(_MOST_PLACES):
        if place < 0:
            break
        end = place + len(content)
        behind = end
        while behind < limit and text[behind].isspace():
            behind += 1
        if template.control.match(text, behind):
            return place, end
        place = text.find(content, place + 1, limit)
    return (first, first + len(content)) if first >= 0 else None
