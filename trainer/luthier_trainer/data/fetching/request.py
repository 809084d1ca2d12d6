"""What a fetch is asked for, and how it says that the thing cannot be had."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class FetchError(Exception):
    """The file cannot be had. reason: a stable name; message: a sentence to act on; hint: what to try next."""

    def __init__(self, reason: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.hint = hint


@dataclass(frozen=True, slots=True)
class HubSource:
    """A dataset of the hub. Empty: the only or default configuration, the split `train`, the branch `main`."""

    id: str
    config: str = ""
    split: str = ""
    revision: str = ""


@dataclass(frozen=True, slots=True)
class Request:
    """One file to fetch, and what the operator allows.

    source: a URL or a dataset of the hub. max_bytes: the size of the largest file that is taken. hosts, networks,
    buckets, roots: see the settings of the server. sha256: what the file must have, hexadecimal; empty for anything.
    """

    source: str | HubSource
    max_bytes: int
    hosts: tuple[str, ...] = ()
    networks: tuple[str, ...] = ()
    buckets: tuple[str, ...] = ()
    roots: tuple[str, ...] = ()
    sha256: str = ""

    @classmethod
    def from_json(cls, text: str | bytes) -> "Request":
        """The request that the server wrote. Raises ValueError when it is none."""
        try:
            fields: Mapping[str, Any] = json.loads(text)
            hub = fields.get("hub")

            def listed(name: str) -> tuple[str, ...]:
                return tuple(map(str, fields.get(name) or ()))

            return cls(
                source=str(fields["url"])
                if hub is None
                else HubSource(**{key: str(value or "") for key, value in hub.items()}),
                max_bytes=int(fields["max_bytes"]),
                hosts=listed("hosts"),
                networks=listed("networks"),
                buckets=listed("buckets"),
                roots=listed("roots"),
                sha256=str(fields.get("sha256") or "").lower(),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the request is not one: {error}") from error


def shown_size(size: int) -> str:
    """A number of bytes for a message."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 1 << power:
            return f"{size / (1 << power):.1f} {unit}".replace(".0 ", " ")
    return f"{size} bytes"


def too_large(max_bytes: int) -> FetchError:
    """The error of a file that is larger than the server takes."""
    message = f"The file is larger than the {shown_size(max_bytes)} that this server takes."
    return FetchError("TOO_LARGE", message, "Ask the operator to raise max_dataset_bytes, or import less.")
