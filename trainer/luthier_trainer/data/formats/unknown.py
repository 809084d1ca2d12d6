"""What to do about a row whose format is not known: the option that would make it known, where that can be guessed."""

import difflib
import shlex
from collections.abc import Mapping

from luthier_trainer.data.files.row import shown
from luthier_trainer.data.formats.detect import ANSWERS, QUESTIONS
from luthier_trainer.data.problem import Problem

_FIELDS = ("messages", "conversations", "prompt", "completion", "instruction", "output", "text", "chosen", "rejected")
_FORMATS = (
    '"messages", "conversations", "prompt" and "completion", "instruction" and "output", "text", '
    '"prompt" with "chosen" and "rejected", or "prompt" alone'
)
_INPUTS = ("context", "input", "passage", "document")
_CHOSEN = ("chosen", "preferred", "accepted", "chosen_response", "better", "win")
_REJECTED = ("rejected", "dispreferred", "reject", "rejected_response", "worse", "lose")
_TEXTS = ("text", "content", "document", "body", "article", "code", "story")
_MAX_NAME = 64
_NEAR_NAMES = 20


def unknown(row: Mapping[str, object], *, guess: bool = True) -> Problem:
    """The problem of a row in no known format. guess: whether to look for a fix, which takes longer than a row."""
    names = [shown(key) for key in list(row)[:10]]
    more = ", ..." if len(row) > 10 else ""
    has = f"the keys {', '.join(names)}{more}" if row else "no keys"
    message = f"The row has {has}; expected {_FORMATS}."
    return Problem("UNKNOWN_FORMAT", message, fix(row) if guess else "")


def fix(row: Mapping[str, object], otherwise: str = "") -> str:
    """The options that map the row's columns to a format's fields, or the nearest names, or where to begin."""
    names = {key.lower(): key for key in list(row)[:256] if len(key) <= _MAX_NAME and key.isprintable()}
    if mapping := _mapping(row, names):
        options = " ".join(f"--column {shlex.quote(f'{field}={name}')}" for field, name in mapping if field != name)
        if options:
            either = " (or --format prompt_only, when there is nothing to learn)" if mapping[0][1] == "prompt" else ""
            return f"Say which columns they are: {options}{either}"
    if "prompt" in row and ("label" in row or "kto_tag" in row):
        return "Say how the rows are meant: --format prompt_only, or --column completion=COLUMN for the answer judged."
    first = list(names)[:_NEAR_NAMES]
    for field in _FIELDS:
        if field not in row and (near := difflib.get_close_matches(field, first, 1, 0.75)):
            name = names[near[0]]
            # The row no longer tells whether this name stands in the file or a mapping has given it.
            return (
                f"Did you mean {shown(field)} by {shown(name)}? Then say --column {shlex.quote(f'{field}={name}')}"
                f" or, where a --column has made it {shown(name)} (no field of any format), make that {shown(field)}"
            )
    return otherwise or "Say which columns they are, such as --column prompt=COLUMN --column completion=COLUMN"


def _mapping(row: Mapping[str, object], names: Mapping[str, str]) -> list[tuple[str, str]]:
    """Pairs of field and column."""
    if turns := _turns(row):
        return [turns]
    texts = {lower: name for lower, name in names.items() if isinstance(row[name], str)}
    question = _first(QUESTIONS, texts)
    chosen, rejected = _first(_CHOSEN, names), _first(_REJECTED, names)
    if chosen and rejected:
        return [*([("prompt", question)] if question else []), ("chosen", chosen), ("rejected", rejected)]
    answer = _first(ANSWERS, texts) or ""
    if answer and (question or "text" in texts):
        question = question or texts["text"]
        given = _first([name for name in _INPUTS if texts.get(name) not in (question, answer)], texts)
        if given or question == "instruction":
            return [("instruction", question), *([("input", given)] if given else []), ("output", answer)]
        return [("prompt", question), ("completion", answer)]
    alone = _first(_TEXTS, texts)
    return [("text", alone)] if alone and not question and not answer else []


def _turns(row: Mapping[str, object]) -> tuple[str, str] | None:
    """A column that holds turns under another name."""
    for key, value in list(row.items())[:256]:
        if isinstance(value, list) and value and isinstance(value[0], dict) and 0 < len(key) <= _MAX_NAME:
            if "role" in value[0] and "content" in value[0]:
                return "messages", key
            if "from" in value[0] and "value" in value[0]:
                return "conversations", key
    return None


def _first(wanted: tuple[str, ...] | list[str], names: Mapping[str, str]) -> str | None:
    return next((names[name] for name in wanted if name in names), None)
