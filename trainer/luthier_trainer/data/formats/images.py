"""Images of a row: files of its archive, or data URLs.

They are named by parts of a turn, or by the row:

    {"type": "image", "image": "a.png"}    a part; also with "url" or "path", or OpenAI's "image_url"
    "images": ["a.png"]                    of the row: each takes the place of an `<image>` in the text of its turns, or
                                           of a part {"type": "image"} that names none, in order

Nothing is fetched.
"""

import binascii
from collections.abc import Callable, Mapping

from luthier_trainer.data.files.row import shown
from luthier_trainer.data.formats.refusal import Refusal
from luthier_trainer.data.problem import Problem
from luthier_trainer.data.records import (
    Chat,
    Conversation,
    ImagePart,
    Message,
    Preference,
    Prompt,
    Record,
    Text,
    TextPart,
    Unpaired,
    images,
)

PLACEHOLDER = "<image>"
MAX_IMAGE_BYTES = 16 * 1024 * 1024
_MAX_PATH = 4096
_TYPES = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg", b"GIF87a": "gif", b"GIF89a": "gif"}
_KINDS = "PNG, JPEG, WebP or GIF"


def image(value: object, where: str) -> str:
    """The path or data URL of an image given as one of them, or as `{"bytes": base64, "path"}`. Raises Refusal."""
    if isinstance(value, dict):
        encoded, value = value.get("bytes"), value.get("path") or value.get("url")
        if isinstance(encoded, str) and encoded:
            return f"data:image/{_type(encoded, where)};base64,{encoded}"
    if not isinstance(value, str) or not value or "\0" in value:
        raise Refusal("BAD_IMAGE", f"An image of {where} is neither a path nor a data URL.")
    if value[:5].lower() == "data:":
        return _data_url(value, where)
    if value[:8].lower().startswith(("http://", "https://")):
        message = f"An image of {where} is a web address ({shown(value)}); nothing is fetched while a dataset is read."
        fix = "Put the images into a folder beside the rows and name their paths."
        raise Refusal("IMAGE_NOT_INCLUDED", message, fix)
    if len(value) > _MAX_PATH:
        raise Refusal("BAD_IMAGE", f"The path of an image of {where} is longer than {_MAX_PATH:,} characters.")
    return value


def placed(conversation: Conversation, row: Mapping[str, object]) -> Conversation:
    """The conversation with the row's images where their placeholders are. Raises Refusal."""
    given = row.get("images")
    if given is None:
        given = row.get("image")
    if not given:
        if _has_parts(conversation) and "" in images(conversation):
            raise Refusal("IMAGE_COUNT", 'A part {"type": "image"} names no image, and the row has no "images".')
        return conversation
    names = [image(item, "the row") for item in (given if isinstance(given, list) else [given])]
    left = iter(names)
    found = 0

    def next_image() -> ImagePart:
        nonlocal found
        found += 1
        return {"type": "image", "image": next(left, "")}

    result = [_filled(turn, next_image) for turn in conversation]
    if found != len(names):
        message = f'The row has {_counted(len(names))} in "images", and places for {found} in its turns.'
        raise Refusal("IMAGE_COUNT", message, f"Write {PLACEHOLDER} into the turns once for each image, in order.")
    return result


def missing(record: Record, has_image: Callable[[str], bool]) -> Problem | None:
    """What is wrong when the record names an image that did not come with the rows."""
    for conversation in _conversations(record):
        for name in images(conversation) if _has_parts(conversation) else ():
            if not name.startswith("data:") and not has_image(name):
                message = f"The row names the image {shown(name)}, which did not come with the rows."
                fix = (
                    "Upload the folder that holds the rows and the images, or name the folder of the images: "
                    "luthier dataset upload rows.json --images DIR"
                )
                return Problem("IMAGE_MISSING", message, fix)
    return None


def _conversations(record: Record) -> tuple[Conversation, ...]:
    match record:
        case Chat() | Unpaired() | Prompt():
            return (record.messages,)
        case Preference():
            return (record.prompt, record.chosen, record.rejected)
        case Text():
            return ()


def _has_parts(conversation: Conversation) -> bool:
    """Whether there may be images; a loop, since nearly every row takes this way twice."""
    for turn in conversation:  # noqa: SIM110
        if type(turn["content"]) is list:
            return True
    return False


def _filled(turn: Message, next_image: Callable[[], ImagePart]) -> Message:
    content = turn["content"]
    if isinstance(content, str) and PLACEHOLDER not in content:
        return turn
    parts: list[TextPart | ImagePart] = []
    for part in [TextPart(type="text", text=content)] if isinstance(content, str) else content:
        if part["type"] == "image":
            parts.append(part if part["image"] else next_image())  # type: ignore[typeddict-item]
            continue
        for number, piece in enumerate(part["text"].split(PLACEHOLDER)):  # type: ignore[typeddict-item]
            if number:
                parts.append(next_image())
            if piece:
                parts.append({"type": "text", "text": piece})
    return {**turn, "content": parts}


def _data_url(url: str, where: str) -> str:
    head, comma, encoded = url.partition(",")
    if not comma or not head.lower().startswith("data:image/") or not head.lower().endswith(";base64"):
        message = f"A data URL of {where} is no base64 of an image ({shown(head)})."
        raise Refusal("BAD_IMAGE", message, "Write data:image/png;base64, and the image.")
    return f"data:image/{_type(encoded, where)};base64,{encoded}"


def _type(encoded: str, where: str) -> str:
    """What the image is by its first bytes, whatever it is called. Raises Refusal."""
    if len(encoded) > MAX_IMAGE_BYTES * 4 // 3 + 4:
        raise Refusal("BAD_IMAGE", f"An image of {where} is larger than {MAX_IMAGE_BYTES // 1024**2} MiB.")
    try:
        head = binascii.a2b_base64(encoded.encode("ascii"), strict_mode=True)[:12]
    except ValueError:
        raise Refusal("BAD_IMAGE", f"An image of {where} is not base64.") from None
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "webp"
    for magic, name in _TYPES.items():
        if head.startswith(magic):
            return name
    raise Refusal("BAD_IMAGE", f"An image of {where} is not {_KINDS}.", f"Save it as {_KINDS}.")


def _counted(number: int) -> str:
    return f"{number} image{'' if number == 1 else 's'}"
