"""What all formats of conversations share: the row's own system text and images, and numbers of turns for messages."""

from collections.abc import Mapping

from luthier_trainer.data.formats.fields import required
from luthier_trainer.data.formats.images import placed
from luthier_trainer.data.formats.order import Place
from luthier_trainer.data.formats.refusal import Refusal
from luthier_trainer.data.formats.turns import decoded, turns, with_system
from luthier_trainer.data.records import Conversation

_OTHER_MEDIA = ("videos", "video", "audios", "audio")


def conversation_under(row: Mapping[str, object], key: str) -> tuple[Conversation, Place]:
    """The conversation under a key of the row, and how its turns are called. Raises Refusal."""
    value = decoded(required(row, key), key)
    conversation = complete(turns(value, key), row)

    def place(index: int) -> str:
        numbers: list[int] = []
        before = len(conversation) - len(turns(value, key, numbers))
        return f"turn {numbers[index - before]}"

    return conversation, place


def complete(conversation: Conversation, row: Mapping[str, object]) -> Conversation:
    """The conversation with the row's `system` before it and its images in place. Raises Refusal."""
    if len(row) > 1:
        for key in _OTHER_MEDIA:
            if row.get(key):
                raise Refusal("NOT_SUPPORTED", f'The row has "{key}", which is not supported.', "Remove it.")
        conversation = with_system(conversation, row)
    return placed(conversation, row)
