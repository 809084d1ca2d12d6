"""Raw text: `{"text": "..."}`."""

from collections.abc import Mapping

from luthier_trainer.data.formats import fields
from luthier_trainer.data.formats.refusal import Refusal
from luthier_trainer.data.records import Text

_NOT_WITH_TEXT = ("tools", "functions", "images", "image", "videos", "video", "audios", "audio")


def raw_text(row: Mapping[str, object]) -> Text:
    """Raises Refusal."""
    found = fields.text(fields.required(row, "text"), '"text"')
    for key in _NOT_WITH_TEXT:
        if row.get(key):
            raise Refusal("NOT_SUPPORTED", f'The row has "{key}" beside "text", which is not supported.', "Remove it.")
    if not found or found.isspace():
        raise Refusal("EMPTY_TEXT", "The text is empty: there is nothing to learn from it.", "Remove the row.")
    return Text(found)
