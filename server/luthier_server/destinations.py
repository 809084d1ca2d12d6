"""Where a copy of an export may go: judged before a job exists. The trainer judges again, and follows no link."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from luthier.v1.export_task_pb2 import ExportDestination
from luthier_server.errors import Violation
from luthier_server.secrets import Secrets

OBJECT_STORES = ("s3", "gs", "az")
MAX_PREFIX_BYTES = 700  # of the 1024 that a key may have: the names of files follow

_FIELD = "export.destination"
_CREDENTIALS = "LUTHIER_EXPORT_CREDENTIALS"
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,221}", re.ASCII)
_REPOSITORY = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?", re.ASCII)


def check(destination: ExportDestination, roots: Sequence[Path]) -> list[Violation]:
    """What is wrong with a destination; nothing when none was asked for. roots: what `file://` may go below.

    A URI may hold what should have been a secret, so no description repeats it.
    """
    if not destination.uri:
        given = destination.credentials_secret or destination.public
        return [Violation(f"{_FIELD}.uri", "is missing")] if given else []
    return list(_violations(destination, roots))


def credentials(destination: ExportDestination, secrets: Secrets) -> dict[str, str]:
    """The environment that the trainer of an export gets for its destination. Raises NotFound for an unknown secret."""
    name = destination.credentials_secret
    return {_CREDENTIALS: secrets.value(name)} if name else {}


def _violations(destination: ExportDestination, roots: Sequence[Path]) -> Iterator[Violation]:
    scheme, separator, rest = destination.uri.partition("://")
    uri, secret = f"{_FIELD}.uri", f"{_FIELD}.credentials_secret"
    if not separator or scheme not in (*OBJECT_STORES, "file", "hf"):
        yield Violation(uri, "must start with s3://, gs://, az://, file:/// or hf://")
        return
    if scheme == "file":
        yield from (Violation(uri, problem) for problem in _of_folder(destination.uri, roots))
        if destination.credentials_secret:
            yield Violation(secret, "is of no use for a folder of the server")
    else:
        problem = _of_repository(rest) if scheme == "hf" else _of_prefix(scheme, rest)
        if problem:
            yield Violation(uri, problem)
        if not destination.credentials_secret:
            yield Violation(secret, f"is missing: {scheme}:// is written with credentials that the operator keeps")
    if destination.public and scheme != "hf":
        yield Violation(f"{_FIELD}.public", "is said of repositories of the hub alone (hf://)")


def _of_prefix(scheme: str, rest: str) -> str:
    bucket, _, prefix = rest.partition("/")
    parts = prefix.removesuffix("/").split("/")
    if "@" in bucket or not _BUCKET.fullmatch(bucket):
        return f"must name a bucket and nothing before it: {scheme}://BUCKET/PREFIX"
    if parts == [""]:
        return f"must name a prefix of its own for this export: {scheme}://BUCKET/PREFIX"
    if any(part in ("", ".", "..") for part in parts) or not prefix.isprintable() or set("?#\\") & set(prefix):
        return "must have a prefix without empty, `.` and `..` parts and without `?`, `#` and `\\`"
    if len(prefix.encode()) > MAX_PREFIX_BYTES:
        return f"must have a prefix of at most {MAX_PREFIX_BYTES} bytes"
    return ""


def _of_repository(rest: str) -> str:
    parts = rest.split("/")
    names = len(parts) == 2 and all(_REPOSITORY.fullmatch(part) for part in parts)
    if not names or any(each in rest for each in ("--", "..")) or rest.endswith((".git", ".ipynb")):
        return "must name a repository of the hub as hf://OWNER/NAME"
    return ""


def _of_folder(uri: str, roots: Sequence[Path]) -> Iterator[str]:
    shape = "must be the absolute path of a new folder on the server, as in file:///exports/support-bot"
    try:
        parts = urlsplit(uri)
        path = unquote(parts.path, errors="strict")
    except ValueError:
        yield shape
        return
    names = path.removesuffix("/").split("/")[1:]
    if parts.netloc not in ("", "localhost") or not path.startswith("/") or parts.query or parts.fragment:
        yield f"{shape}; write `?`, `#` and `%` as %3F, %23 and %25"
    elif not names or not path.isprintable() or any(name in ("", ".", "..") for name in names):
        yield f"{shape}, without empty, `.` and `..` parts"
    elif names[-1].startswith(".") or len(names[-1].encode()) > 200:
        yield f"{shape}; the name of the folder has at most 200 bytes and starts with no dot"
    elif not roots:
        yield "cannot be a folder: the operator allows none (--export-root)"
    elif not any(_is_below(PurePosixPath(path), PurePosixPath(root.absolute())) for root in roots):
        yield f"must lie below a folder that the operator allows: {', '.join(sorted(str(root) for root in roots))}"


def _is_below(path: PurePosixPath, root: PurePosixPath) -> bool:
    return path != root and path.is_relative_to(root)
