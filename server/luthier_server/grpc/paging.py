"""Page tokens after AIP-158: opaque, and bound to the other arguments of the request."""

import base64
import binascii
import hashlib
from typing import Protocol

from google.protobuf.message import Message

from luthier_server.errors import InvalidArgument, Violation

_DEFAULT = 50
_MOST = 1000


class Paged(Protocol):
    """A request of a list method."""

    page_size: int
    page_token: str


def size(request: Paged) -> int:
    """Entries a page: 0 means 50, more than 1000 means 1000."""
    return min(request.page_size or _DEFAULT, _MOST)


def _seal(request: Message, last_id: str) -> bytes:
    bare = type(request)()
    bare.CopyFrom(request)
    bare.ClearField("page_token")
    bare.ClearField("page_size")
    return hashlib.sha256(bare.SerializeToString(deterministic=True) + last_id.encode()).digest()[:9]


def token(request: Message, last_id: str) -> str:
    """The token of the page that goes on below `last_id`."""
    return base64.urlsafe_b64encode(_seal(request, last_id) + last_id.encode()).decode()


def below(request: Message, page_token: str) -> str:
    """The id below which the page goes on; empty for the first. Raises InvalidArgument for another request's token."""
    if not page_token:
        return ""
    try:
        raw = base64.b64decode(page_token, altchars=b"-_", validate=True)
        last_id = raw[9:].decode("ascii")
    except (binascii.Error, UnicodeDecodeError):
        raw, last_id = b"", ""
    if not last_id or raw[:9] != _seal(request, last_id):
        raise InvalidArgument(
            "page_token does not belong to this request",
            [Violation("page_token", "must be next_page_token of a page with the same other arguments")],
        )
    return last_id
