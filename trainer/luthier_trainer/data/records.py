"""What a row means, whatever its format: a record, and the passages of it that become tokens.

Chat        a conversation to learn from: messages, prompt and completion, instruction, ShareGPT
Text        raw text
Preference  two answers to one prompt
Unpaired    one answer, and whether it is wanted
Prompt      a prompt alone, with fields for a reward to refer to
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict


class TextPart(TypedDict):
    """Text among other parts. type: `text`."""

    type: str
    text: str


class ImagePart(TypedDict):
    """An image. type: `image`; image: its path in the dataset's archive, or a data URL."""

    type: str
    image: str


class FunctionCall(TypedDict):
    """What a tool call calls. arguments: decoded, never JSON text."""

    name: str
    arguments: Any


class ToolCall(TypedDict):
    """A call that an assistant turn makes. type: `function`."""

    type: str
    function: FunctionCall
    id: NotRequired[str]


class Message(TypedDict):
    """One turn. role: system, user, assistant or tool; content: text, or parts when there are images; weight: 0 on an
    assistant turn that is context only, absent otherwise."""

    role: str
    content: str | list[TextPart | ImagePart]
    weight: NotRequired[int]
    tool_calls: NotRequired[list[ToolCall]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]


Conversation = list[Message]
Tools = tuple[Mapping[str, Any], ...]
"""JSON schemas of functions, each `{"type": "function", "function": {...}}`."""


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation; its assistant turns are trained, but those of weight 0."""

    messages: Conversation
    tools: Tools = ()


@dataclass(frozen=True, slots=True)
class Text:
    """Raw text; all of it is trained."""

    text: str


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to a prompt; each is one or more turns."""

    prompt: Conversation
    chosen: Conversation
    rejected: Conversation
    tools: Tools = ()


@dataclass(frozen=True, slots=True)
class Unpaired:
    """A conversation whose last assistant turns are the answer that is judged (the others have weight 0)."""

    messages: Conversation
    label: bool
    tools: Tools = ()


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is to be answered, and the row's other fields."""

    messages: Conversation
    reference: Mapping[str, Any]
    tools: Tools = ()


Record = Chat | Text | Preference | Unpaired | Prompt


@dataclass(frozen=True, slots=True)
class Passage:
    """What becomes one sequence of tokens. name: as in `luthier.v1.PreviewSequence`; exactly one of messages and text
    is given; to_answer: it ends with the generation prompt, and nothing of it is trained."""

    name: str = ""
    messages: Conversation | None = None
    text: str | None = None
    tools: Tools = ()
    to_answer: bool = False


def passages(record: Record) -> tuple[Passage, ...]:
    """What of a record becomes tokens: one passage, or chosen and rejected."""
    match record:
        case Chat():
            return (Passage(messages=record.messages, tools=record.tools),)
        case Text():
            return (Passage(text=record.text),)
        case Preference():
            prompt = context(record.prompt)
            return (
                Passage("chosen", prompt + record.chosen, tools=record.tools),
                Passage("rejected", prompt + record.rejected, tools=record.tools),
            )
        case Unpaired():
            return (Passage("desired" if record.label else "undesired", record.messages, tools=record.tools),)
        case Prompt():
            return (Passage("prompt", record.messages, tools=record.tools, to_answer=True),)


def context(turns: Conversation) -> Conversation:
    """The turns with none of them trained."""
    return [{**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in turns]


def plain(message: Message) -> str:
    """A turn's content as text, an image as `<image>`."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] if part["type"] == "text" else "<image>" for part in content)  # type: ignore[typeddict-item]


def images(conversation: Conversation) -> list[str]:
    """The images of a conversation, in order."""
    return [
        part["image"]  # type: ignore[typeddict-item]
        for turn in conversation
        if not isinstance(turn["content"], str)
        for part in turn["content"]
        if part["type"] == "image"
    ]
