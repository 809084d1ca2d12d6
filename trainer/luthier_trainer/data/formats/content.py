"""What a turn says: text, or parts of text and images."""

from luthier_trainer.data.files.row import shown
from luthier_trainer.data.formats.fields import text
from luthier_trainer.data.formats.images import image
from luthier_trainer.data.formats.refusal import Refusal
from luthier_trainer.data.records import ImagePart, TextPart


def content(value: object, where: str) -> str | list[TextPart | ImagePart]:
    """Text as it is; parts of text alone joined; parts with images as parts, an image without a name as "" until the
    row's images are placed. where: `turn 3`. Raises Refusal."""
    if not isinstance(value, list):
        return text(value, f"The content of {where}")
    parts = [_part(item, where) for item in value]
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)  # type: ignore[typeddict-item]
    return [part for part in parts if part["type"] == "image" or part["text"]]  # type: ignore[typeddict-item]


def _part(value: object, where: str) -> TextPart | ImagePart:
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(value, dict) and kind == "text":
        return {"type": "text", "text": text(value.get("text"), f"A text part of {where}")}
    if isinstance(value, dict) and kind in ("image", "image_url"):
        for key in ("image", "image_url", "url", "path"):
            if value.get(key) is not None:
                return {"type": "image", "image": image(value[key], where)}
        return {"type": "image", "image": ""}
    if isinstance(kind, str):
        message = f"A part of {where} has the type {shown(kind)}, which is not supported."
        raise Refusal("NOT_SUPPORTED", message, 'A part\'s type is "text", "image" or "image_url".')
    message = f'The content of {where} is an array of something else than parts with a "type".'
    raise Refusal("BAD_CONTENT", message, 'Write a string, or parts such as {"type": "text", "text": "..."}.')
