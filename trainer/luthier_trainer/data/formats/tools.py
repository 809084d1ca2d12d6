"""Tools that a row offers, and the calls that its assistant makes.

    a tool   {"type": "function", "function": {"name", "description", "parameters"}}, or the inner object alone
    a call   {"type": "function", "function": {"name", "arguments"}}, or the inner object alone

The arguments of a call are an object, or JSON text of one. Tools are an array, or JSON text of one.
"""

from collections.abc import Mapping
from typing import Any

import orjson

from luthier_trainer.data.formats.fields import MAX_DEPTH, nests_too_deep, text
from luthier_trainer.data.formats.refusal import Refusal
from luthier_trainer.data.records import ToolCall, Tools

_A_TOOL = 'A tool is {"type": "function", "function": {"name": ..., "parameters": {...}}}.'
_A_CALL = 'A call is {"type": "function", "function": {"name": ..., "arguments": {...}}}.'


def tools(row: Mapping[str, object]) -> Tools:
    """The tools under `tools`, or `functions` as they were called once. Raises Refusal."""
    for key in ("tools", "functions"):
        value = row.get(key)
        if value:
            return _tools(value, key)
    return ()


def calls(value: object, where: str) -> list[ToolCall]:
    """The calls under `tool_calls` of a turn. Raises Refusal."""
    if not isinstance(value, list):
        raise Refusal("BAD_TOOL_CALL", f"The tool calls of {where} must be an array.", _A_CALL)
    return [call(item, where) for item in value]


def call(value: object, where: str) -> ToolCall:
    """One call. Raises Refusal."""
    if not isinstance(value, dict):
        raise Refusal("BAD_TOOL_CALL", f"A tool call of {where} is no object.", _A_CALL)
    if value.get("type") not in (None, "function"):
        raise Refusal("BAD_TOOL_CALL", f'A tool call of {where} has a "type" other than "function".', _A_CALL)
    function = value["function"] if value.get("function") is not None else value
    if not isinstance(function, dict) or not isinstance(name := function.get("name"), str) or not name:
        raise Refusal("BAD_TOOL_CALL", f"A tool call of {where} has no name of a function.", _A_CALL)
    text(name, f"The name of a function that {where} calls")
    made: ToolCall = {"type": "function", "function": {"name": name, "arguments": _arguments(function, where)}}
    if isinstance(id := value.get("id"), str) and id:
        made["id"] = text(id, f"The id of a call of {where}")
    return made


def calls_of_text(value: object, where: str) -> list[ToolCall]:
    """The calls of a `function_call` turn: an object or an array of them, or JSON text of either. Raises Refusal."""
    found = _decoded(value, where) if isinstance(value, str) else value
    made = [call(item, where) for item in (found if isinstance(found, list) else [found])]
    if not made:
        raise Refusal("BAD_TOOL_CALL", f"The function call of {where} calls nothing.", _A_CALL)
    return made


def _arguments(function: dict[str, Any], where: str) -> Any:
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _decoded(arguments, where) if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise Refusal("BAD_TOOL_CALL", f"The arguments of a tool call of {where} must be an object.", _A_CALL)
    if nests_too_deep(arguments):
        raise Refusal("BAD_TOOL_CALL", f"The arguments of a tool call of {where} nest over {MAX_DEPTH} levels deep.")
    return arguments


def _decoded(value: str, where: str) -> object:
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError as error:
        message = f"A tool call of {where} is not JSON: {error.msg} (character {error.pos + 1})."
        fix = (
            "JSON wants double quotes." if value.lstrip().startswith(("{'", "[{'")) else "Correct it or remove the row."
        )
        raise Refusal("BAD_TOOL_CALL", message, fix) from None


def _tools(value: object, key: str) -> Tools:
    if isinstance(value, str):
        if not value.strip():
            return ()
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            message = f'"{key}" is text, and not JSON: {error.msg} (character {error.pos + 1}).'
            raise Refusal("BAD_TOOLS", message, "Write an array of tools, or its JSON text.") from None
        if value is None:
            return ()
    if not isinstance(value, list):
        raise Refusal("BAD_TOOLS", f'"{key}" must be an array of tools.', _A_TOOL)
    if nests_too_deep(value):
        raise Refusal("BAD_TOOLS", f'"{key}" nests over {MAX_DEPTH} levels deep.')
    return tuple(_tool(item, f'Tool {number} of "{key}"') for number, item in enumerate(value, 1))


def _tool(value: object, what: str) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise Refusal("BAD_TOOLS", f"{what} is text, and not JSON: {error.msg}.", _A_TOOL) from None
        if nests_too_deep(value):
            raise Refusal("BAD_TOOLS", f"{what} nests over {MAX_DEPTH} levels deep.")
    if not isinstance(value, dict):
        raise Refusal("BAD_TOOLS", f"{what} is no object.", _A_TOOL)
    if value.get("type") not in (None, "function") and "function" in value:
        raise Refusal("BAD_TOOLS", f'{what} has a "type" other than "function".', _A_TOOL)
    function = value["function"] if value.get("function") is not None else value
    if not isinstance(function, dict) or not isinstance(name := function.get("name"), str) or not name:
        raise Refusal("BAD_TOOLS", f"{what} has no name.", _A_TOOL)
    text(name, f"The name of {what[0].lower()}{what[1:]}")
    return {"type": "function", "function": function}
