"""Where copies of exports may go: what can be said of a destination without reaching it."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from luthier.v1.export_task_pb2 import ExportDestination
from luthier_server.errors import Violation

_SCHEMES = ("s3", "gs", "az", "file", "hf")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}", re.ASCII)
# As huggingface_hub validates repository ids, with an owner.
_REPOSITORY = re.compile(r"(?=.{1,96}\Z)\w(?:[\w.-]*\w)?/\w(?:[\w.-]*\w)?", re.ASCII)


def destination_violations(destination: ExportDestination, roots: Sequence[Path], path: str) -> Iterator[Violation]:
    """What is wrong with a destination; `roots` are the folders that `file://` may go below, `path` its field."""
    problem = _problem(destination.uri, roots)
    if problem:
        yield Violation(f"{path}.uri", problem)
    if destination.public and not destination.uri.startswith("hf://"):
        yield Violation(f"{path}.public", "is a setting of hf:// destinations alone")


def _problem(uri: str, roots: Sequence[Path]) -> str:
    if not uri.isprintable() or any(each in uri for each in "?#\\ "):
        return "holds characters that no destination has; credentials are a secret's name, never in the URI"
    try:
        parts = urlsplit(uri)
    except ValueError:
        return "is no URI"
    if parts.scheme not in _SCHEMES:
        return f"must begin with {', '.join(f'{each}://' for each in _SCHEMES[:-1])} or {_SCHEMES[-1]}://"
    if "@" in parts.netloc:
        return "must hold no credentials: name a secret in credentials_secret"
    if ".." in unquote(parts.path).split("/"):
        return "must not hold '..'"
    if parts.scheme == "file":
        return _file_problem(parts.netloc, parts.path, roots)
    if parts.scheme == "hf":
        repository = uri.removeprefix("hf://").rstrip("/")
        wrong = not _REPOSITORY.fullmatch(repository) or ".." in repository or "--" in repository
        return "must name a repository of the Hub as hf://owner/name" if wrong else ""
    return "" if _BUCKET.fullmatch(parts.netloc) else f"must name a bucket, as {parts.scheme}://bucket/prefix"


def _file_problem(host: str, path: str, roots: Sequence[Path]) -> str:
    if host or not path.startswith("/"):
        return "must be an absolute path, as file:///directory"
    if not roots:
        return "no folder is allowed for exports here: the operator sets --export-root"
    # Whoever writes there may or may not take %20 for a space: neither way may lead out.
    for each in {path, unquote(path)}:
        try:
            resolved = Path(each).resolve()
        except (OSError, ValueError, RuntimeError):
            return "cannot be resolved"
        if not any(resolved.is_relative_to(root.resolve()) for root in roots):
            return "lies outside the folders that the operator allows for exports (--export-root)"
    return ""
