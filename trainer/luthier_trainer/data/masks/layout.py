"""How a template lays plain conversations out, learned once from examples, so that a row needs one rendering.

Most templates write fixed text between the contents of turns. It is learned by rendering markers. A row's layout is
then put together from it and the row's contents, and it says where each turn lies only if it EQUALS what the template
made of the row; so nothing of it is taken on trust. Templates and rows that do not fit it take the longer proofs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from luthier_trainer.data.masks.markers import MARKERS
from luthier_trainer.data.masks.sandbox import Span
from luthier_trainer.data.records import Message

_SHAPES = (("user", "assistant"), ("user", "assistant") * 2)

# The text of a conversation, with the generation prompt or without; None where the template refuses it.
Write = Callable[[Sequence[Message], bool], str | None]


@dataclass(frozen=True, slots=True)
class Placed:
    """Where the turns of a row lie in its text: contents, one for each turn, None for one that the template leaves out;
    answers, one for each assistant turn, from behind the generation prompt to the end of its content."""

    contents: tuple[Span | None, ...]
    answers: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """before: the text before a turn's content, by (role before it or "", its role, whether it is the last turn);
    after: the text behind the last turn, which is behind each answer if it `closes`; prompt: the generation prompt
    behind a user's content; stripped: roles whose content is stripped; dropped: roles whose turns are left out."""

    before: dict[tuple[str, str, bool], str]
    after: str
    prompt: str
    stripped: frozenset[str]
    dropped: frozenset[str]
    closes: bool

    def place(self, messages: Sequence[Message], text: str) -> Placed | None:
        """Where the turns lie; None where the text is not laid out so."""
        parts: list[str] = []
        contents: list[Span | None] = []
        answers: list[Span] = []
        at = 0
        previous = ""
        last = len(messages) - 1
        for number, turn in enumerate(messages):
            role, content = turn["role"], turn["content"]
            if role in self.dropped:
                contents.append(None)
                continue
            before = self.before.get((previous, role, number == last))
            if before is None or not isinstance(content, str) or "tool_calls" in turn:
                return None
            if role in self.stripped:
                content = content.strip()
            start = at + len(before)
            end = start + len(content)
            parts += (before, content)
            contents.append((start, end))
            if role == "assistant":
                answers.append((at + len(self.prompt), end))
            at, previous = end, role
        parts.append(self.after)
        return Placed(tuple(contents), tuple(answers)) if "".join(parts) == text else None


def learn(write: Write) -> Layout | None:
    """The layout of a template's conversations that end with an answer; None where it has no fixed one."""
    stripped = frozenset(role for role in ("system", "user", "assistant") if _strips(role, write))
    before: dict[tuple[str, str, bool], str] = {}
    afters: set[str] = set()
    prompts: set[str] = set()
    for shape in _SHAPES:
        if not _learn_shape(shape, write, before, afters, prompts):
            return None
    with_system = dict(before)
    dropped: frozenset[str] = frozenset()
    if _drops_system(write):
        dropped = frozenset({"system"})
    elif all(_learn_shape(("system", *shape), write, with_system, afters, prompts) for shape in _SHAPES):
        before = with_system
    if len(afters) != 1 or len(prompts) != 1:
        return None
    prompt = prompts.pop()
    answers = [text for (_, role, _), text in before.items() if role == "assistant"]
    if not all(text.startswith(prompt) for text in answers):
        return None
    after = afters.pop()
    closes = all(text.startswith(after) for (previous, _, _), text in before.items() if previous == "assistant")
    return Layout(before, after, prompt, stripped, dropped, closes)


def _learn_shape(
    shape: Sequence[str],
    write: Write,
    before: dict[tuple[str, str, bool], str],
    afters: set[str],
    prompts: set[str],
) -> bool:
    """Adds what one shape of conversation shows; False where it shows something else than what was known."""
    turns: list[Message] = [
        {"role": role, "content": marker} for role, marker in zip(shape, MARKERS[: len(shape)], strict=True)
    ]
    text = write(turns, False)
    if text is None:
        return False
    previous = ""
    for number, turn in enumerate(turns):
        glue, marker, text = text.partition(str(turn["content"]))
        key = (previous, turn["role"], number == len(turns) - 1)
        if not marker or before.setdefault(key, glue) != glue:
            return False
        previous = turn["role"]
    afters.add(text)
    for number, turn in enumerate(turns):
        if turn["role"] == "assistant":
            asked = write(turns[:number], True)
            if asked is None:
                return False
            prompts.add(asked.rpartition(str(turns[number - 1]["content"]))[2])
    return not any(marker in text for marker in MARKERS)


def _drops_system(write: Write) -> bool:
    turns: list[Message] = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    return write([{"role": "system", "content": MARKERS[0]}, *turns], False) == write(turns, False)


def _strips(role: str, write: Write) -> bool:
    turns: list[Message] = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    marked: Message = {"role": role, "content": f" \n{MARKERS[0]} \n"}
    turns = [marked, *turns] if role == "system" else [marked if turn["role"] == role else turn for turn in turns]
    text = write(turns, False)
    return text is not None and str(marked["content"]) not in text
