"""Which format a row has, told by its keys."""

from collections.abc import Mapping, Set

from luthier_trainer.data.formats.unpaired import label
from luthier_trainer.data.reading import Format

QUESTIONS = ("question", "query", "problem", "prompt", "instruction", "input", "user", "human", "request", "context")
ANSWERS = ("answer", "response", "output", "target", "reply", "solution", "summary", "assistant", "completion")
_NOT_BESIDE_PROMPT = ("completion", "chosen", "rejected", "label", "kto_tag", "response", "output")
_NOT_BESIDE_TEXT = frozenset((*QUESTIONS, *ANSWERS, "messages", "conversations", "chosen", "rejected"))


def detect(row: Mapping[str, object]) -> Format | None:
    """The format of a row, or None. A field that is null is not there, unless that leaves no format."""
    keys = row.keys()
    if len(keys) == 1 and row.get("messages") is not None:
        return Format.MESSAGES
    given = keys if None not in row.values() else {key for key, value in row.items() if value is not None}
    return _of(given, row) or (_of(keys, row) if len(given) < len(keys) else None)


def _of(keys: Set[str], row: Mapping[str, object]) -> Format | None:
    if ("chosen" in keys and "rejected" in keys) or ("preferred_output" in keys and "non_preferred_output" in keys):
        return Format.PREFERENCE
    conversation = (
        Format.MESSAGES
        if "messages" in keys
        else Format.SHAREGPT
        if "conversations" in keys
        else Format.PROMPT_COMPLETION
        if "prompt" in keys and "completion" in keys
        else None
    )
    if conversation is not None:
        # Many datasets have a column "label" that means a class; a judgement is true or false.
        return Format.UNPAIRED_PREFERENCE if label(row) is not None else conversation
    if "instruction" in keys and "output" in keys:
        return Format.INSTRUCTION
    # A null completion or label beside a prompt is a hole in another format; a "response" is more likely to be learnt
    # than to be referred to: whoever wants that says so.
    if "prompt" in keys and not any(key in row for key in _NOT_BESIDE_PROMPT):
        return Format.PROMPT_ONLY
    if "text" in keys and isinstance(row["text"], str) and _NOT_BESIDE_TEXT.isdisjoint(keys):
        return Format.TEXT
    return None
