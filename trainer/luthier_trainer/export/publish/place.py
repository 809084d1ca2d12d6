"""Where a copy goes, read from its URI. The server looked already; what it said is not relied on."""

import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from luthier_trainer.data.fetching import objects
from luthier_trainer.data.fetching.request import FetchError
from luthier_trainer.errors import TrainingError

_REPOSITORY = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Prefix:
    """Below a prefix of a bucket. scheme: `s3`, `gs` or `az`."""

    scheme: str
    bucket: str
    prefix: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.prefix}"


@dataclass(frozen=True, slots=True)
class Folder:
    """A new folder of this machine. path: absolute, no part of it empty, `.` or `..`; links are not looked at yet."""

    path: str


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository of models of the Hugging Face Hub, `owner/name`."""

    id: str

    def __str__(self) -> str:
        return f"hf://{self.id}"


def place(uri: str) -> Prefix | Folder | Repository:
    """The place that a URI names. Raises TrainingError DESTINATION_FAILED, which does not repeat the URI."""
    scheme, _, rest = uri.partition("://")
    if scheme in objects.SCHEMES:
        return _prefix(uri)
    if scheme == "file":
        return _folder(uri)
    if scheme == "hf":
        names = rest.split("/")
        if len(names) == 2 and all(_REPOSITORY.fullmatch(name) for name in names):
            return Repository(rest)
        raise _unusable("a repository of the hub is named as hf://OWNER/NAME")
    raise _unusable("it must start with s3://, gs://, az://, file:/// or hf://")


def _prefix(uri: str) -> Prefix:
    try:
        scheme, bucket, prefix = objects.parts(uri.removesuffix("/"))
    except FetchError as error:
        raise _unusable("a prefix is named as s3://BUCKET/PREFIX, without empty, `.` and `..` parts") from error
    if set("?#\\") & set(prefix):
        raise _unusable("a prefix has no `?`, `#` and `\\`")
    return Prefix(scheme, bucket, prefix)


def _folder(uri: str) -> Folder:
    try:
        parts = urlsplit(uri)
        path = unquote(parts.path, errors="strict").removesuffix("/")
    except ValueError as error:
        raise _unusable("it cannot be read") from error
    plain = parts.netloc in ("", "localhost") and not parts.query and not parts.fragment
    names = path.split("/")[1:]
    if not plain or not names or not path.isprintable() or any(name in ("", ".", "..") for name in names):
        raise _unusable("a folder is named by its absolute path on the server, as in file:///exports/support-bot")
    return Folder(path)


def _unusable(what: str) -> TrainingError:
    return TrainingError("DESTINATION_FAILED", f"The destination cannot be used: {what}.")
