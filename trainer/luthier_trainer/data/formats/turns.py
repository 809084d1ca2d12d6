"""Lists of turns, by either vocabulary: `role` and `content`, or ShareGPT's `from` and `value`.

`weight` (OpenAI), `loss` and `train` say of an assistant turn whether it is trained. ShareGPT's `function_call` turns
become tool calls of the assistant turn before them, or of one of their own.
"""

import difflib
import functools
from collections.abc import Mapping
from typing import Any

import orjson

from luthier_trainer.data.files.row import shown
from luthier_trainer.data.formats.content import content
from luthier_trainer.data.formats.fields import text
from luthier_trainer.data.formats.refusal import Refusal
from luthier_trainer.data.formats.tools import call, calls, calls_of_text
from luthier_trainer.data.records import Conversation, Message

_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("tool", "function", "ipython", "observation", "function_response"), "tool"),
}
_KNOWN = '"system", "user", "assistant" or "tool"'
_CALL = "function_call"
_WEIGHTS = ("weight", "loss", "train")
_NOT_SUPPORTED = ("reasoning_content", "reasoning", "thinking", "images", "videos", "audio", "audios")


def turns(value: object, key: str, numbers: list[int] | None = None) -> Conversation:
    """The turns under a row's key. numbers: gets the place of each in the row, from 1 (they differ where calls are
    joined). Raises Refusal."""
    if not isinstance(value, list):
        what = "missing or null" if value is None else "not an array"
        raise Refusal("BAD_CONTENT", f'"{key}" is {what}; it must be an array of turns.')
    result: Conversation = []
    for number, item in enumerate(value, 1):
        # Nearly all turns are two strings: they take the short way.
        if type(item) is dict and len(item) == 2:
            said = item.get("content")
            role = item.get("role")
            if type(said) is str and type(role) is str and role in _ROLES and "\0" not in said:
                result.append({"role": _ROLES[role], "content": said})
                if numbers is not None:
                    numbers.append(number)
                continue
        where = f"turn {number}" if key in ("messages", "conversations") else f'turn {number} of "{key}"'
        made = turn(item, where)
        if isinstance(item, dict) and item.get("from") == _CALL and result and _takes(result[-1], made, where):
            result[-1] = {**result[-1], "tool_calls": result[-1].get("tool_calls", []) + made["tool_calls"]}
            continue
        result.append(made)
        if numbers is not None:
            numbers.append(number)
    return result


def decoded(value: object, key: str) -> object:
    """The value, of JSON text what it says: a CSV file has no other way to hold turns. Raises Refusal."""
    if not isinstance(value, str):
        return value
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError as error:
        message = f'"{key}" is text, and not JSON: {error.msg} (character {error.pos + 1}).'
        quotes = value.lstrip().startswith(("[{'", "{'"))
        fix = "JSON wants double quotes." if quotes else "Write an array of turns, or its JSON text."
        raise Refusal("BAD_CONTENT", message, fix) from None


def turn(item: object, where: str) -> Message:
    """One turn. where: `turn 3`. Raises Refusal."""
    if not isinstance(item, dict):
        raise Refusal("BAD_CONTENT", f'{_capital(where)} must be an object with "role" and "content".')
    sharegpt = item.get("role") is None and "from" in item
    called = item["from"] if sharegpt else item.get("role")
    if sharegpt and called == _CALL:
        found: Message = {"role": "assistant", "content": "", "tool_calls": calls_of_text(item.get("value"), where)}
        return _weighed(found, item, where)
    role = _ROLES.get(called) if isinstance(called, str) else None
    if role is None:
        raise _bad_role(called, where)
    for key in _NOT_SUPPORTED:
        if item.get(key):
            message = f'{_capital(where)} has "{key}", which is not supported.'
            raise Refusal("NOT_SUPPORTED", message, 'Put it into "content" or remove it.')
    made: Message = {"role": role, "content": ""}
    if role == "assistant":
        if item.get("tool_calls"):
            made["tool_calls"] = calls(item["tool_calls"], where)
        elif item.get("function_call"):
            made["tool_calls"] = [call(item["function_call"], where)]
    said = item.get("value" if sharegpt else "content")
    if said is not None or "tool_calls" not in made:
        made["content"] = content(said, where)
    if role == "tool":
        for key in ("tool_call_id", "name"):
            if item.get(key) is not None:
                made[key] = text(item[key], f'The "{key}" of {where}')  # type: ignore[literal-required]
    if role == "assistant" and not isinstance(made["content"], str):
        raise Refusal(
            "NOT_SUPPORTED", f"{_capital(where)} is the assistant's and holds an image; images are not learnt."
        )
    return _weighed(made, item, where)


def with_system(conversation: Conversation, row: Mapping[str, object]) -> Conversation:
    """The conversation after the row's own `system`, if it has one. Raises Refusal."""
    value = row.get("system")
    if not value:
        return conversation
    system: Message = {"role": "system", "content": text(value, '"system"')}
    if conversation and conversation[0]["role"] == "system":
        if conversation[0]["content"] == value:
            return conversation
        raise Refusal("ROLES_OUT_OF_ORDER", 'The row has a "system" and a system turn of other words.', "Keep one.")
    return [system, *conversation]


def _weighed(made: Message, item: dict[str, Any], where: str) -> Message:
    for key in _WEIGHTS:
        weight = item.get(key)
        if weight is None:
            continue
        if weight not in (0, 1) or (key == "weight" and isinstance(weight, bool)):
            wanted = "0 or 1" if key == "weight" else "true or false"
            raise Refusal("BAD_CONTENT", f'"{key}" of {where} must be {wanted}.')
        if not weight and made["role"] == "assistant":
            made["weight"] = 0
    return made


def _takes(before: Message, made: Message, where: str) -> bool:
    """Whether a function_call belongs to the turn before it."""
    if before["role"] != "assistant":
        return False
    if before.get("weight") != made.get("weight"):
        raise Refusal(
            "BAD_CONTENT", f"{_capital(where)} belongs to the turn before it; both must have the same weight."
        )
    return True


def _bad_role(role: object, where: str) -> Refusal:
    if role is None:
        return Refusal("BAD_ROLE", f"{_capital(where)} has no role; it must be {_KNOWN}.")
    if not isinstance(role, str):
        return Refusal("BAD_ROLE", f"The role of {where} must be {_KNOWN}.")
    return Refusal("BAD_ROLE", f"The role of {where} is {shown(role)}; it must be {_KNOWN}.", _near(role[:40]))


@functools.lru_cache(maxsize=256)
def _near(role: str) -> str:
    """What may be meant; with little to compare, as a million rows may have a role wrong."""
    role = role.strip().lower()
    near = difflib.get_close_matches(role, [known for known in _ROLES if known[0] == role[:1]], 1)
    return f"Did you mean {shown(near[0])}?" if near else ""


def _capital(where: str) -> str:
    return where[0].upper() + where[1:]
