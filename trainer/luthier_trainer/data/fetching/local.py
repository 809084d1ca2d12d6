"""Files of this machine, below the folders that the operator allows."""

import fcntl
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from luthier_trainer.data.fetching.output import Output
from luthier_trainer.data.fetching.reports import Reports
from luthier_trainer.data.fetching.request import FetchError, Request, too_large

_CHUNK = 1 << 20


def fetch(url: str, request: Request, output: Output, reports: Reports) -> str:
    """Copies the file that a `file:` URL names; returns its source. All links are followed before it is decided whether
    the file lies below one of the roots, and it is decided again for the file that was opened. Raises FetchError."""
    path = _path(url)
    roots = [os.path.realpath(root) for root in request.roots]
    resolved = os.path.realpath(path)
    if not _is_below(resolved, roots):
        raise _outside(path, request.roots)
    descriptor = _open(resolved, path)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise FetchError("NOT_A_FILE", f"{path} is not a regular file.", "Name one file; a folder can be zipped.")
        if not _is_below(_name_of(descriptor), roots):
            raise _outside(path, request.roots)
        if status.st_size > request.max_bytes:
            raise too_large(request.max_bytes)
        while chunk := os.read(descriptor, _CHUNK):
            output.write(chunk)
            reports.progress(output.size, status.st_size, "bytes")
    finally:
        os.close(descriptor)
    return "file://" + quote(resolved)


def _path(url: str) -> str:
    parts = urlsplit(url)
    path = unquote(parts.path)
    if (
        parts.netloc not in ("", "localhost")
        or not path.startswith("/")
        or parts.query
        or parts.fragment
        or "\0" in path
    ):
        message = "A local file is named by its absolute path on the server, as in file:///data/shared/train.jsonl."
        raise FetchError("INVALID_URL", message, "Write `?`, `#` and `%` as %3F, %23 and %25.")
    return path


def _open(resolved: str, path: str) -> int:
    try:
        # Never waits for a pipe's other end, and never follows a link that came after the check.
        return os.open(resolved, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except PermissionError as error:
        message = f"The server may not read {path}."
        raise FetchError("NOT_PERMITTED", message, "Ask the operator to make it readable for the server.") from error
    except OSError as error:
        raise FetchError("NOT_FOUND", f"There is no file {path} on the server.", "Check the path.") from error


def _name_of(descriptor: int) -> str:
    """The path of an open file, as the kernel knows it."""
    if hasattr(fcntl, "F_GETPATH"):
        return os.fsdecode(fcntl.fcntl(descriptor, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0"))
    return os.readlink(f"/proc/self/fd/{descriptor}")


def _is_below(path: str, roots: Sequence[str]) -> bool:
    return any(Path(path).is_relative_to(root) and path != root for root in roots)


def _outside(path: str, roots: Sequence[str]) -> FetchError:
    if not roots:
        message = "This server takes no files from its own disks."
        return FetchError("PATH_NOT_ALLOWED", message, "Upload the file, or ask the operator to set import_root.")
    message = f"{path} is not below a folder that this server takes files from."
    return FetchError("PATH_NOT_ALLOWED", message, f"The folders are: {', '.join(sorted(roots))}.")
