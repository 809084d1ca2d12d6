"""The fields of a row: there or not, text or not, and how deep they nest."""

from collections.abc import Mapping

from luthier_trainer.data.formats.refusal import Refusal

MAX_DEPTH = 64
"""Of tools, arguments and references: they are written as JSON again, and writers give up long before readers do."""


def required(row: Mapping[str, object], key: str) -> object:
    """What the row has under the key; null is something. Raises Refusal."""
    try:
        return row[key]
    except KeyError:
        raise Refusal("MISSING_FIELD", f'The row has no "{key}".') from None


def text(value: object, what: str) -> str:
    """The value, which must be text. Raises Refusal."""
    if isinstance(value, str):
        if "\0" in value:
            raise Refusal("BAD_CONTENT", f"{what} holds a NUL character, which text never does.", "Remove it.")
        return value
    if value is None:
        raise Refusal("BAD_CONTENT", f"{what} is missing or null; it must be a string.")
    if isinstance(value, dict):
        raise Refusal("BAD_CONTENT", f"{what} is an object; it must be a string.", "Write it as JSON text.")
    raise Refusal("BAD_CONTENT", f"{what} is {'an array' if isinstance(value, list) else 'no text'}; write a string.")


def optional_text(row: Mapping[str, object], key: str) -> str:
    """The text under the key, empty when there is none. Raises Refusal."""
    value = row.get(key)
    return "" if value is None else text(value, f'"{key}"')


def nests_too_deep(value: object, levels: int = MAX_DEPTH) -> bool:
    """Whether objects and arrays nest in it more than that many levels deep."""
    if isinstance(value, dict):
        return levels == 0 or any(nests_too_deep(item, levels - 1) for item in value.values())
    if isinstance(value, list):
        return levels == 0 or any(nests_too_deep(item, levels - 1) for item in value)
    return False
