"""A prompt to be answered, `{"prompt": ...}` (a string or turns), and other columns that a reward refers to."""

import math
from collections.abc import Mapping

from luthier_trainer.data.files.row import shown
from luthier_trainer.data.formats.chat import asked
from luthier_trainer.data.formats.conversation import complete
from luthier_trainer.data.formats.fields import MAX_DEPTH, nests_too_deep, required
from luthier_trainer.data.formats.order import check_asks
from luthier_trainer.data.formats.refusal import Refusal
from luthier_trainer.data.formats.tools import tools
from luthier_trainer.data.records import Prompt, context

_NOT_REFERENCE = frozenset(("prompt", "system", "tools", "functions", "images", "image"))


def prompt_only(row: Mapping[str, object]) -> Prompt:
    """Raises Refusal."""
    conversation = complete(context(asked(required(row, "prompt"), "prompt")), row)
    check_asks(conversation)
    if conversation[-1]["content"] == "" or str(conversation[-1]["content"]).isspace():
        raise Refusal("EMPTY_PROMPT", "The prompt is empty: there is nothing to answer.", "Remove the row.")
    reference = {key: value for key, value in row.items() if key not in _NOT_REFERENCE}
    for key, value in reference.items():
        if nests_too_deep(value):
            raise Refusal("TOO_DEEP", f"{shown(key)} nests over {MAX_DEPTH} levels deep.")
        if not _is_json(value):
            message = f"{shown(key)} holds a value that JSON has no word for; a reward could not be given it."
            raise Refusal("BAD_CONTENT", message, "Write it as text or as a number.")
    return Prompt(conversation, reference, tools(row))


def _is_json(value: object) -> bool:
    match value:
        case dict():
            return all(isinstance(key, str) and _is_json(item) for key, item in value.items())
        case list():
            return all(map(_is_json, value))
        case float():
            return math.isfinite(value)
        case _:
            return value is None or isinstance(value, str | int)
