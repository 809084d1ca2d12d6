"""The texts of a record, each with the name of its place in the row."""

from collections.abc import Iterator

import orjson

from luthier_trainer.data.records import Chat, Conversation, Message, Preference, Prompt, Record, Text, Unpaired

_JSON = orjson.OPT_SORT_KEYS


def conversations(record: Record) -> tuple[tuple[str, Conversation], ...]:
    """The conversations of a record and their names: empty where there is one, `prompt`, `chosen` and `rejected` of a
    preference; none of a text."""
    match record:
        case Chat() | Unpaired() | Prompt():
            return (("", record.messages),)
        case Preference():
            return ("prompt", record.prompt), ("chosen", record.chosen), ("rejected", record.rejected)
        case Text():
            return ()


def texts(record: Record) -> Iterator[tuple[str, str]]:
    """Each text that is to be tokenised and its place (`turn 2, user`); of a tool call its function, as JSON. Images
    are no text."""
    if isinstance(record, Text):
        yield "text", record.text
        return
    for name, conversation in conversations(record):
        for number, turn in enumerate(conversation, 1):
            place = f"{name + ' ' if name else ''}turn {number}, {turn['role']}"
            for text in texts_of(turn):
                yield place, text


def texts_of(turn: Message) -> Iterator[str]:
    """The texts of one turn."""
    content = turn["content"]
    if isinstance(content, str):
        yield content
    else:
        yield from (part["text"] for part in content if part["type"] == "text")  # type: ignore[typeddict-item]
    for call in turn.get("tool_calls", ()):
        yield serialized(call["function"]).decode(errors="replace")


def serialized(value: object) -> bytes:
    """The canonical form of a value made of what rows are made of: equal values give equal bytes. JSON, but for what
    JSON does not hold."""
    try:
        return orjson.dumps(value, repr, _JSON)
    except TypeError:  # nested more than 254 levels, mostly
        return _written_out(value)


def _written_out(value: object) -> bytes:
    """Without recursion, which has its limits: an iterator for each level that is open."""
    written: list[str] = []
    levels: list[Iterator[object]] = [iter((value,))]
    while levels:
        for item in levels[-1]:
            if isinstance(item, dict):
                written.append("{")
                levels.append(iter([part for key in sorted(item, key=repr) for part in (key, item[key])]))
                break
            if isinstance(item, (list, tuple)):
                written.append("[")
                levels.append(iter(item))
                break
            written.append(f"{item!r},")
        else:
            levels.pop()
            written.append("]")
    return "".join(written).encode(errors="replace")
