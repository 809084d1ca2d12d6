"""Copies in folders of this machine, below the roots that the operator allows.

Every part of the path below the root is opened in turn, and a link is never followed, so nothing that another process
does to the folders on the way leads outside. The copy is written aside, `.tmp-NAME-EXPORT`, synced, read back, and
renamed when its manifest is there.
"""

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.parse import quote

from luthier.v1.model_pb2 import ModelFile
from luthier_trainer import durable
from luthier_trainer.durable import ASIDE, MANIFEST
from luthier_trainer.errors import TrainingError
from luthier_trainer.export.publish.contents import Contents, Meter, export_of
from luthier_trainer.export.publish.place import Folder
from luthier_trainer.stop import Check

_CHUNK = 1 << 20
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def publish(place: Folder, contents: Contents, roots: Sequence[str], meter: Meter, check: Check) -> str:
    """Copies the export; returns its URI. Raises TrainingError DESTINATION_FAILED or STORAGE_FULL, and StopRequested:
    nothing stays then."""
    parent, _, name = place.path.rpartition("/")
    try:
        with _opened(parent, roots) as folder:
            _copy(folder, name, contents, meter, check)
    except OSError as error:
        if durable.is_full(error):
            raise durable.storage_full(place.path) from error
        raise _failed(error, place) from error
    return f"file://{quote(place.path)}"


def _copy(parent: int, name: str, contents: Contents, meter: Meter, check: Check) -> None:
    if _exists(parent, name):
        if not _is_complete(parent, name, contents, check):
            message = f"There is something at {name!r} of that folder already."
            raise TrainingError("DESTINATION_FAILED", message, "Name a folder that is not there yet.")
        meter.reach(contents.size)
        return
    aside = f"{ASIDE}{name}-{contents.export}"
    try:
        with _entered(parent, aside) as folder:
            for file in contents.files:
                with _inside(folder, file.path, make=True) as (inner, base):
                    _write(inner, base, file, contents, meter, check)
                    os.fsync(inner)
            _write_manifest(folder, contents.manifest)
            os.fsync(folder)
        os.rename(aside, name, src_dir_fd=parent, dst_dir_fd=parent)
        os.fsync(parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True, dir_fd=parent)
        raise


def _write(folder: int, name: str, file: ModelFile, contents: Contents, meter: Meter, check: Check) -> None:
    """Writes a file and reads it back; one that is whole stays. Raises TrainingError when other bytes come back."""
    done = meter.done + file.size_bytes
    if not _is_whole(folder, name, file, check):
        with _new(folder, name) as stream:
            descriptor = stream.fileno()
            for part in contents.parts(file, _CHUNK):
                check()
                stream.write(part)
                meter.add(len(part))
            stream.flush()
            os.fsync(descriptor)
            if hasattr(os, "posix_fadvise"):  # what is read back shall come from the disk
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        if not _is_whole(folder, name, file, check):
            message = f"{file.path} is not what was written to it."
            raise TrainingError("DESTINATION_FAILED", message, "Have the disk looked at.", retryable=True)
    meter.reach(done)


def _write_manifest(folder: int, manifest: bytes) -> None:
    with _new(folder, MANIFEST) as stream:
        stream.write(manifest)
        stream.flush()
        os.fsync(stream.fileno())


def _new(folder: int, name: str) -> BinaryIO:
    """A new file in place of whatever has its name: bytes that another name leads to are not touched."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)
    stream = open(os.open(name, _NEW_FILE, 0o644, dir_fd=folder), "wb")  # noqa: SIM115 the caller's to close
    os.fchmod(stream.fileno(), 0o644)
    return stream


def _is_complete(parent: int, name: str, contents: Contents, check: Check) -> bool:
    """Whether a folder holds this export: an attempt that ended before it could say so made it."""
    try:
        with _inside(parent, f"{name}/{MANIFEST}", make=False) as (folder, base):
            with open(os.open(base, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder), "rb") as stream:
                manifest = stream.read()
            if export_of(manifest) != contents.export or manifest != contents.manifest:
                return False
            for file in contents.files:
                with _inside(folder, file.path, make=False) as (inner, inner_name):
                    if not _is_whole(inner, inner_name, file, check):
                        return False
            return True
    except OSError:
        return False


def _is_whole(folder: int, name: str, file: ModelFile, check: Check) -> bool:
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError:
        return False
    with open(descriptor, "rb") as stream:
        if os.fstat(descriptor).st_size != file.size_bytes:
            return False
        digest = hashlib.sha256()
        while part := stream.read(_CHUNK):
            check()
            digest.update(part)
    return digest.hexdigest() == file.sha256


@contextlib.contextmanager
def _opened(path: str, roots: Sequence[str]) -> Iterator[int]:
    """The folder at a path, made below its root where it is missing. Raises TrainingError when it lies below none."""
    for root in sorted(map(os.path.abspath, roots), key=len, reverse=True):
        if PurePosixPath(path).is_relative_to(root):
            break
    else:
        message = f"{path} is not a folder below which this server writes exports."
        hint = f"The folders are: {', '.join(sorted(roots)) or 'none'} (--export-root)."
        raise TrainingError("DESTINATION_FAILED", message, hint)
    descriptor = os.open(Path(root).resolve(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with _descended(descriptor, PurePosixPath(path).relative_to(root).parts, make=True) as folder:
            yield folder
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _inside(folder: int, path: str, make: bool) -> Iterator[tuple[int, str]]:
    """The folder that a path below a folder leads to, and the last part of the path."""
    *folders, name = PurePosixPath(path).parts
    with _descended(folder, folders, make) as inner:
        yield inner, name


@contextlib.contextmanager
def _descended(folder: int, names: Sequence[str], make: bool) -> Iterator[int]:
    """The folder that is reached by these names, one below the other; no link is one of them."""
    with contextlib.ExitStack() as stack:
        for name in names:
            folder = stack.enter_context(_entered(folder, name, make))
        yield folder


@contextlib.contextmanager
def _entered(folder: int, name: str, make: bool = True) -> Iterator[int]:
    if make:
        try:
            os.mkdir(name, 0o755, dir_fd=folder)
            os.fsync(folder)
        except FileExistsError:
            pass
    descriptor = os.open(name, _DIRECTORY, dir_fd=folder)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _exists(folder: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _failed(error: OSError, place: Folder) -> TrainingError:
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        message = f"A part of {place.path} is a link or a file; only folders lead to a destination."
        return TrainingError("DESTINATION_FAILED", message, "Name a path without links below the operator's folder.")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        message = f"The server may not write to {place.path}."
        return TrainingError("DESTINATION_FAILED", message, "Ask the operator to make it writable for the server.")
    name = errno.errorcode.get(error.errno or 0, "error")
    message = f"{place.path} cannot be written ({name})."
    return TrainingError("DESTINATION_FAILED", message, "The operator's log says more.", retryable=True)
