"""What a chat template can write, found by trying: many leave out silently what they do not know."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from luthier_trainer.data.masks.markers import MARKERS

_ONE, _TWO, _THREE = MARKERS[:3]

Write = Callable[[Sequence[Any], Sequence[Any]], str | None]


@dataclass(frozen=True, slots=True)
class Abilities:
    """tools, calls and images: whether it writes tools, tool calls with their results, and images; parts_only: whether
    it wants content as parts even where that is text alone."""

    tools: bool
    calls: bool
    images: bool
    parts_only: bool


def abilities(write: Write) -> Abilities:
    """Tries a template. `write` renders messages and tools, and returns None where the template refuses them. What it
    refuses is not held against it here: it will refuse the row too, with its own words."""
    parts_only = _parts_only(write)
    return Abilities(_tools(write), _calls(write), _images(write), parts_only)


def _tools(write: Write) -> bool:
    hi = {"role": "user", "content": "Hi"}
    return _any(
        (_ONE,),
        write([hi], [_tool(_ONE)]),
        write([{"role": "system", "content": "Be kind."}, hi], [_tool(_ONE)]),
    )


def _calls(write: Write) -> bool:
    function = {"name": _ONE, "arguments": {"a": "b"}}
    turns = [
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "id": "call12345", "function": function}],
        },
        {"role": "tool", "name": _ONE, "tool_call_id": "call12345", "content": _TWO},
        {"role": "assistant", "content": "Yes"},
    ]
    return _any((_ONE, _TWO), write(turns, [_tool(_THREE)]), write(turns, []))


def _images(write: Write) -> bool:
    """A template that prints the list of parts shows the image's own address."""
    text = {"type": "text", "text": _ONE}
    without = write([{"role": "user", "content": [text]}], [])
    with_image = write([{"role": "user", "content": [{"type": "image", "image": _TWO}, text]}], [])
    if with_image is None:
        return False
    return with_image != without and _ONE in with_image and _TWO not in with_image


def _parts_only(write: Write) -> bool:
    as_text = write([{"role": "user", "content": _ONE}], [])
    if as_text is not None and _ONE in as_text:
        return False
    as_parts = write([{"role": "user", "content": [{"type": "text", "text": _ONE}]}], [])
    # A template that prints the list shows its keys too.
    return as_parts is not None and _ONE in as_parts and "'type'" not in as_parts


def _any(words: Sequence[str], *texts: str | None) -> bool:
    written = [text for text in texts if text is not None]
    return not written or any(all(word in text for word in words) for text in written)


def _tool(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"a": {"type": "string", "description": "A."}}, "required": ["a"]}
    return {"type": "function", "function": {"name": name, "description": "Does it.", "parameters": parameters}}
