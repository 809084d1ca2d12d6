"""Formats of rows, and how each becomes a conversation. Standard library and orjson only.

    messages            {"messages": [{"role": "user", "content": "..."}, ...]}
    prompt_completion   {"prompt": ..., "completion": ...}, both strings, or lists of messages
    instruction         {"instruction": "...", "input": "...", "output": "..."}, and also "system" and "history"

A conversation is a list of `{"role", "content"}`: at most one system turn, first; then user and assistant turns, the
first from the user, and never two assistant turns in a row. Whatever follows the last assistant turn trains nothing.
`"weight": 0` on an assistant turn (OpenAI's word) keeps it as context and trains it not.
"""

import difflib
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import NotRequired, TypedDict

from luthier_trainer.data.rows import Problem, Row, rows, shown

__all__ = ["Conversation", "Format", "Message", "Problem", "Row", "conversations", "convert", "detect", "rows"]


class Format(StrEnum):
    """How a row looks."""

    MESSAGES = "messages"
    PROMPT_COMPLETION = "prompt_completion"
    INSTRUCTION = "instruction"


class Message(TypedDict):
    """One turn. weight: 0 on an assistant turn that is context only; absent otherwise."""

    role: str
    content: str
    weight: NotRequired[int]


Conversation = list[Message]

_ROLES = ("system", "user", "assistant")
_OTHER_ROLES = {
    "tool": 'Tool turns are not supported yet; a turn\'s role is "system", "user" or "assistant".',
    "function": 'Function turns are not supported yet; a turn\'s role is "system", "user" or "assistant".',
    "developer": 'The role "developer" is called "system" here.',
    "human": 'The role "human" is called "user" here.',
    "gpt": 'The role "gpt" is called "assistant" here.',
    "bot": 'The role "bot" is called "assistant" here.',
    "model": 'The role "model" is called "assistant" here.',
}
_EXPECTED = 'expected "messages", or "prompt" and "completion", or "instruction" and "output"'
_KNOWN_KEYS = ("messages", "prompt", "completion", "instruction", "input", "output")
_ROW_NOT_SUPPORTED = ("tools", "functions", "images", "videos", "audios")
_TURN_NOT_SUPPORTED = ("tool_calls", "function_call", "reasoning_content", "thinking", "images")


def conversations(path: Path) -> Iterator[tuple[int, Format | None, Conversation | Problem]]:
    """Yields (line, format, conversation or what is wrong) for each row of the file; lines as in `rows`.

    The first row whose format is known decides for the file. A file without rows yields one Problem at line 0.
    Raises as `rows`.
    """
    decided: Format | None = None
    empty = True
    for row in rows(path):
        empty = False
        if isinstance(row.value, Problem):
            yield row.line, None, row.value
            continue
        found = detect(row.value)
        decided = decided or found
        if found is None:
            yield row.line, None, _unknown_format(row.value)
        elif found is not decided:
            message = f"The row is in the format {found}, the rows before it in {decided}. A file has one format."
            yield row.line, found, Problem("MIXED_FORMATS", message)
        else:
            yield row.line, found, convert(row.value, found)
    if empty:
        yield 0, None, Problem("EMPTY_FILE", "The file has no rows.")


def detect(value: dict[str, object]) -> Format | None:
    """The format of a row by its keys, or None."""
    if "messages" in value:
        return Format.MESSAGES
    if "prompt" in value and "completion" in value:
        return Format.PROMPT_COMPLETION
    if "instruction" in value and "output" in value:
        return Format.INSTRUCTION
    return None


def convert(value: dict[str, object], row_format: Format) -> Conversation | Problem:
    """The conversation of a row in that format, or what is wrong with it. Further keys of the row are ignored, except
    those that would change what is trained (`tools`, `images`, ...): they are refused."""
    for key in _ROW_NOT_SUPPORTED:
        if value.get(key):
            return Problem("NOT_SUPPORTED", f'The row has "{key}", which is not supported yet. Remove it.')
    match row_format:
        case Format.MESSAGES:
            turns = _turns(value["messages"], "messages")
        case Format.PROMPT_COMPLETION:
            turns = _of_prompt(value["prompt"], value["completion"])
        case Format.INSTRUCTION:
            turns = _of_instruction(value)
    return turns if isinstance(turns, Problem) else _problem_of_order(turns) or turns


def _turns(value: object, key: str) -> Conversation | Problem:
    if not isinstance(value, list):
        return Problem("BAD_CONTENT", f'"{key}" must be an array of turns.')
    turns: Conversation = []
    for number, item in enumerate(value, 1):
        if not isinstance(item, dict):
            return Problem("BAD_CONTENT", f'Turn {number} must be an object with "role" and "content".')
        role = item.get("role")
        if role not in _ROLES:
            return _bad_role(number, role, item)
        content = item.get("content")
        if not isinstance(content, str) or "\0" in content:
            return _bad_content(f'"content" of turn {number}', content)
        turn: Message = {"role": role, "content": content}
        if len(item) > 2:
            for name in _TURN_NOT_SUPPORTED:
                if item.get(name):
                    message = (
                        f'Turn {number} has "{name}", which is not supported yet. Put it into "content" or remove it.'
                    )
                    return Problem("NOT_SUPPORTED", message)
            weight = item.get("weight")
            if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
                return Problem("BAD_CONTENT", f'"weight" of turn {number} must be 0 or 1.')
            if weight == 0 and role == "assistant":
                turn["weight"] = 0
        turns.append(turn)
    return turns


def _of_prompt(prompt: object, completion: object) -> Conversation | Problem:
    """User and assistant turns; of lists of messages only the completion is trained, as the format's name says."""
    before: Conversation | Problem
    if isinstance(prompt, list):
        before = _turns(prompt, "prompt")
        if isinstance(before, Problem):
            return before
        for turn in before:
            if turn["role"] == "assistant":
                turn["weight"] = 0
    elif isinstance(prompt, str) and "\0" not in prompt:
        before = [{"role": "user", "content": prompt}]
    else:
        return _bad_content('"prompt"', prompt)
    if isinstance(completion, list):
        after = _turns(completion, "completion")
        return after if isinstance(after, Problem) else before + after
    if isinstance(completion, str) and "\0" not in completion:
        return [*before, {"role": "assistant", "content": completion}]
    return _bad_content('"completion"', completion)


def _of_instruction(value: dict[str, object]) -> Conversation | Problem:
    """System, the pairs of history, then instruction and input as one user turn, separated by a blank line."""
    texts: dict[str, str] = {}
    for key in ("instruction", "input", "output", "system"):
        text = value.get(key)
        if text is None and key in ("input", "system"):
            text = ""
        if not isinstance(text, str) or "\0" in text:
            return _bad_content(f'"{key}"', text)
        texts[key] = text
    turns: Conversation = [{"role": "system", "content": texts["system"]}] if texts["system"] else []
    history = value.get("history") or []
    if not isinstance(history, list):
        return Problem("BAD_CONTENT", '"history" must be an array of [question, answer] pairs.')
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(t, str) and "\0" not in t for t in pair):
            return Problem("BAD_CONTENT", '"history" must be an array of [question, answer] pairs of strings.')
        turns.append({"role": "user", "content": pair[0]})
        turns.append({"role": "assistant", "content": pair[1]})
    question = texts["instruction"] + ("\n\n" + texts["input"] if texts["input"] else "")
    turns.append({"role": "user", "content": question})
    turns.append({"role": "assistant", "content": texts["output"]})
    return turns


def _problem_of_order(turns: Conversation) -> Problem | None:
    if not turns:
        return Problem("EMPTY_CONVERSATION", "The conversation has no turns.")
    before = ""
    trained = False
    for number, turn in enumerate(turns, 1):
        role = turn["role"]
        if role == "system":
            if number > 1:
                return Problem("ROLES_OUT_OF_ORDER", f"Turn {number} is a system turn; only the first turn may be one.")
        elif role == "assistant":
            if before != "user":
                after = f"follows a turn of the {before}" if before else "is the first"
                return Problem("ROLES_OUT_OF_ORDER", f"Assistant turn {number} {after}; it must answer a user turn.")
            if not turn["content"].strip():
                return Problem(
                    "EMPTY_ASSISTANT", f"Assistant turn {number} is empty: there is nothing to learn from it."
                )
            trained = trained or turn.get("weight") != 0
        before = role
    if not trained:
        return Problem("NO_ASSISTANT_TURN", "The conversation has no assistant turn to train on.")
    return None


def _bad_role(number: int, role: object, turn: dict[str, object]) -> Problem:
    known = '"system", "user" or "assistant"'
    if role is None:
        hint = ' ("from" is called "role" here, and "value" "content")' if "from" in turn else ""
        return Problem("BAD_ROLE", f"Turn {number} has no role; it must be {known}{hint}.")
    if not isinstance(role, str):
        return Problem("BAD_ROLE", f"The role of turn {number} must be {known}.")
    if role in _OTHER_ROLES:
        return Problem("BAD_ROLE", f"Turn {number}: {_OTHER_ROLES[role]}")
    near = difflib.get_close_matches(role[:40].strip().lower(), _ROLES, 1)
    hint = f" Did you mean {shown(near[0])}?" if near else ""
    return Problem("BAD_ROLE", f"The role of turn {number} is {shown(role)}; it must be {known}.{hint}")


def _bad_content(what: str, value: object) -> Problem:
    if isinstance(value, str):
        return Problem("BAD_CONTENT", f"{what} holds a NUL character, which text never does. Remove it.")
    if value is None:
        return Problem("BAD_CONTENT", f"{what} is missing or null; it must be a string.")
    if isinstance(value, list):
        return Problem("BAD_CONTENT", f"{what} is an array; content in parts is not supported yet, write one string.")
    return Problem("BAD_CONTENT", f"{what} must be a string.")


def _unknown_format(value: dict[str, object]) -> Problem:
    keys = ", ".join(shown(key) for key in list(value)[:10]) + (", ..." if len(value) > 10 else "")
    message = f"The row has {'the keys ' + keys if value else 'no keys'}; {_EXPECTED}."
    return Problem("UNKNOWN_FORMAT", message + _format_hint(value))


def _format_hint(value: dict[str, object]) -> str:
    if "conversations" in value:
        return ' This looks like ShareGPT: call it "messages", "from" "role" and "value" "content".'
    if "chosen" in value and "rejected" in value:
        return " This looks like preference data, which is not supported yet."
    if "question" in value and "answer" in value:
        return ' Call "question" "prompt" and "answer" "completion".'
    if "text" in value:
        return " Plain text is not supported yet."
    for key in list(value)[:20]:
        near = difflib.get_close_matches(key[:40].lower(), _KNOWN_KEYS, 1, 0.75)
        if near and near[0] not in value:
            return f" Did you mean {shown(near[0])} by {shown(key)}?"
    return ""
