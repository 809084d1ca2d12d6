"""What is wrong with a text that should be a JSON object: mistakes that people and their programs make, by name."""

import json
import re

from luthier_trainer.data.problem import Problem

_DUMPS = "Write rows with a JSON library (in Python json.dumps), not with str()."
_WORDS = re.compile(r"(True|False|None|undefined)\b")
_NOT_A_NUMBER = re.compile(r"-?(NaN|nan|Infinity|inf)\b")
_KINDS = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}


def not_an_object(value: object) -> Problem:
    """What is wrong with a row that is another value."""
    kind = _KINDS.get(type(value), "a number")
    return Problem("NOT_AN_OBJECT", f"The row is {kind}; each row must be a JSON object in braces.")


def not_utf8(where: str, byte: int) -> Problem:
    """What is wrong with text that has a byte which UTF-8 has not there."""
    return Problem(
        "NOT_UTF8",
        f"{where} is not UTF-8 (byte 0x{byte:02x}). Save the file as UTF-8.",
        "iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW_FILE, if it was saved on Windows.",
    )


def not_json(text: bytes | str, error: json.JSONDecodeError) -> Problem:
    """What is wrong with a text that orjson refused with that error."""
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as encoding:
            return not_utf8("The row", encoding.object[encoding.start])
    what, position = error.msg, error.pos
    if "depth limit" in what or "recursion" in what.lower():
        return Problem("TOO_DEEP", "The row nests objects or arrays more than a thousand levels deep.")
    if "surrogate" in what:
        message = f"The row has half a character: a lone surrogate (column {error.colno}), as of an emoji cut in two."
        return Problem(
            "NOT_UNICODE", message, "Cut texts between characters, or remove the escape from \\ud800 to \\udfff."
        )
    hint, fix = _advice(text, position, what)
    return Problem("NOT_JSON", f"The row is not JSON: {what} (column {error.colno}).{hint and ' '}{hint}", fix)


def _advice(text: str, position: int, what: str) -> tuple[str, str]:
    """A hint for the message, and what to do; empty where there is nothing better to say than the error itself."""
    stripped = text.strip()
    there = text[position : position + 32]
    if stripped in ("{", "[", "[{"):
        return "Write each object on one line, or all of them into one array.", ""
    if what.startswith("unexpected end") or there in ("\n", "\r\n"):
        return (
            "The line ends inside of the object.",
            "Write each object on one line; if this is the last line, the file may be cut off.",
        )
    if what.startswith("trailing comma"):
        return "", "Remove the comma before the closing bracket."
    if what.startswith("unexpected content") and there.startswith(("//", "#", "/*")):
        return "JSON has no comments.", "Remove the comment."
    if what.startswith("unexpected content"):
        return _after_the_object(there)
    if there.startswith("'"):
        return "JSON wants double quotes.", _DUMPS
    if _NOT_A_NUMBER.match(text, position) or _NOT_A_NUMBER.match(text, max(0, position - 1)):
        return "JSON has no NaN and no infinity.", "Write null, or leave the field out."
    if there.startswith(("//", "#", "/*")):
        return "JSON has no comments.", "Remove the comment."
    if word := _WORDS.match(text, position):
        other = {"True": "true", "False": "false"}.get(word[1], "null")
        return f"JSON writes {other} for {word[1]}.", _DUMPS
    if "infinity when parsed" in what:
        return "The number is too large.", "Write it as a string, or leave the field out."
    if "control character" in what:
        return "A tab or another control character stands in a string.", "Escape it (\\t), as a JSON library does."
    if "escaped" in what:
        return "", "Write a backslash twice (\\\\), as a JSON library does."
    if "string key" in what and there[:1].isidentifier():
        return "A key stands without quotes.", "Put keys into double quotes."
    if what.startswith("unexpected character") and there[:1] in ("\u201c", "\u201d", "\u201e", "\u00ab"):
        return "JSON wants straight double quotes.", "Replace the typographic quotes."
    return "", ""


def _after_the_object(there: str) -> tuple[str, str]:
    if there.startswith("{"):
        return "A second object follows on the line.", "Write one object a line."
    if there.startswith(","):
        return "A comma follows the object.", "Remove it: JSONL has one object a line and nothing between them."
    return "", "Write one object a line and nothing else."
