"""One answer, and whether it is wanted: a conversation, or prompt and completion, with `label` (or `kto_tag`)."""

from collections.abc import Mapping

from luthier_trainer.data.files.row import shown
from luthier_trainer.data.formats.chat import question_and_answer
from luthier_trainer.data.formats.conversation import complete, conversation_under
from luthier_trainer.data.formats.fields import required
from luthier_trainer.data.formats.order import Place, check_trained, numbered
from luthier_trainer.data.formats.refusal import Refusal
from luthier_trainer.data.formats.tools import tools
from luthier_trainer.data.records import Conversation, Unpaired, context

_LABELS = {"true": True, "false": False, "1": True, "0": False}


def unpaired(row: Mapping[str, object]) -> Unpaired:
    """Raises Refusal."""
    key = next((key for key in ("messages", "conversations") if row.get(key) is not None), None)
    place: Place = numbered
    if key is None and ("prompt" in row or "completion" in row):
        question, answer = question_and_answer(row)
        conversation = complete(question + answer, row)
    else:
        conversation, place = conversation_under(row, key or "messages")
    check_trained(conversation, place)
    start = _answer(conversation)
    judged = context(conversation[:start]) + conversation[start:]
    check_trained(judged, place)
    return Unpaired(judged, _label(row), tools(row))


def label(row: Mapping[str, object]) -> bool | None:
    """The row's label; None when it has none, or one that says neither true nor false."""
    value = row.get("label")
    if value is None:
        value = row.get("kto_tag")
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float) and value in (0, 1):
        return value == 1
    return _LABELS.get(value.strip().lower()) if isinstance(value, str) and len(value) < 20 else None


def _label(row: Mapping[str, object]) -> bool:
    found = label(row)
    if found is None:
        key = "kto_tag" if row.get("label") is None and "kto_tag" in row else "label"
        value = required(row, key)
        what = f"is {shown(value)}" if isinstance(value, str) else "is null" if value is None else "is something else"
        raise Refusal("BAD_LABEL", f'"{key}" {what}; it must be true or false.')
    return found


def _answer(conversation: Conversation) -> int:
    """Where the judged answer starts: after the user turn that the last assistant turn goes back to."""
    roles = [turn["role"] for turn in conversation]
    last = len(roles) - 1 - roles[::-1].index("assistant")
    return max((index + 1 for index in range(last) if roles[index] == "user"), default=0)
