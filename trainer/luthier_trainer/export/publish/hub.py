"""Copies in repositories of the Hugging Face Hub: all files in one commit, so that there is no half of one.

Large files go up one by one before the commit; those that the hub has already, from an attempt that broke off, are not
sent again. A repository that is not there yet is made private unless the export asks for a public one; one that is
there stays as it is, keeps its other files, and its history; one of its files that would be loaded in place of the
export's refuses the export. After the commit, the hub's own record of each file
(SHA-256 of a large one, git's hash of a small one) is compared with what was proven.

The token is the secret's alone. `huggingface_hub` sends files over HTTP when it is given open files, as here, so that
every read can be counted and stopped.
"""

import contextlib
import hashlib
import io
import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from luthier.v1.model_pb2 import ModelFile
from luthier_trainer.durable import MANIFEST
from luthier_trainer.errors import TrainingError
from luthier_trainer.export.publish import credentials
from luthier_trainer.export.publish.contents import Contents, Meter, changed
from luthier_trainer.export.publish.place import Repository
from luthier_trainer.stop import Check, StopRequested

if TYPE_CHECKING:
    from huggingface_hub import HfApi

ENDPOINT = "https://huggingface.co"
_CHUNK = 1 << 20
_PATHS = 500  # the hub tells of so many files at once
_TAKEN_INSTEAD = {
    "model.safetensors": ("model.safetensors.index.json", "adapter_config.json"),
    "model.safetensors.index.json": ("model.safetensors", "adapter_config.json"),
}
"""Files of an export, and what transformers or other loaders take in their place where it lies beside them."""


def publish(
    place: Repository, contents: Contents, public: bool, secret: str, secret_name: str, meter: Meter, check: Check
) -> str:
    """Copies the export; returns its URI with the commit. Raises TrainingError DESTINATION_FAILED, StopRequested."""
    from huggingface_hub import HfApi

    token = credentials.token(secret, secret_name)
    api = HfApi(endpoint=(os.environ.get("HF_ENDPOINT") or ENDPOINT).rstrip("/"), token=token, library_name="luthier")
    try:
        with _quiet():
            return _perform(api, place, contents, public, meter, check)
    except (TrainingError, StopRequested):
        raise
    except Exception as error:
        for cause in _causes(error):
            if isinstance(cause, (TrainingError, StopRequested)):  # raised while a file was read, and wrapped
                raise cause from None
        # Neither the text nor the cause is kept: they may hold signed addresses.
        raise _failed(error, place, secret_name) from None


def _perform(api: "HfApi", place: Repository, contents: Contents, public: bool, meter: Meter, check: Check) -> str:
    from huggingface_hub import CommitOperationAdd

    check()
    api.create_repo(place.id, repo_type="model", private=not public, exist_ok=True)
    _require_alone(api, place, contents)
    with contextlib.ExitStack() as files:
        operations: list[CommitOperationAdd] = []
        for file in contents.files:
            check()
            stream = files.enter_context(_Watched(contents.opened(file), check))
            operation = CommitOperationAdd(file.path, stream)
            if (operation.upload_info.size, operation.upload_info.sha256.hex()) != (file.size_bytes, file.sha256):
                raise changed(file.path)
            end = meter.done + file.size_bytes
            stream.count(meter)
            api.preupload_lfs_files(place.id, [operation], repo_type="model", free_memory=False)
            stream.count(None)
            meter.reach(end)
            operations.append(operation)
        operations.append(CommitOperationAdd(MANIFEST, io.BytesIO(contents.manifest)))
        check()
        commit = api.create_commit(
            place.id, operations, commit_message=f"Export {contents.export} by Luthier", repo_type="model"
        )
    _verify(api, place, contents, commit.oid, check)
    return f"{place}@{commit.oid}"


def _require_alone(api: "HfApi", place: Repository, contents: Contents) -> None:
    """Raises TrainingError for a repository with a file that would be loaded instead of the export."""
    own = {file.path for file in contents.files}
    instead = sorted({each for path in own for each in _TAKEN_INSTEAD.get(path, ())} - own)
    found = api.get_paths_info(place.id, instead, repo_type="model") if instead else []
    if found:
        message = f"{place} has a {found[0].path}, which would be loaded in place of what is exported."
        hint = "Name another repository, or delete that file there first."
        raise TrainingError("DESTINATION_FAILED", message, hint)


def _verify(api: "HfApi", place: Repository, contents: Contents, commit: str, check: Check) -> None:
    """Raises TrainingError when a file of the commit is not what was proven."""
    from huggingface_hub.hf_api import RepoFile, RepoFolder

    paths = [file.path for file in contents.files]
    found: dict[str, RepoFile | RepoFolder] = {}
    for start in range(0, len(paths), _PATHS):
        check()
        batch = api.get_paths_info(place.id, paths[start : start + _PATHS], repo_type="model", revision=commit)
        found |= {each.path: each for each in batch}
    for file in contents.files:
        entry = found.get(file.path)
        lfs = getattr(entry, "lfs", None)
        whole = getattr(entry, "size", -1) == file.size_bytes and (
            lfs.sha256 == file.sha256 if lfs else getattr(entry, "blob_id", "") == _git_hash(contents, file)
        )
        if not whole:
            message = f"{file.path} of {place} is not what was sent to it."
            raise TrainingError("DESTINATION_FAILED", message, "Try again later.", retryable=True)


def _git_hash(contents: Contents, file: ModelFile) -> str:
    """The name that git gives to a file's bytes."""
    digest = hashlib.sha1(f"blob {file.size_bytes}\0".encode(), usedforsecurity=False)
    for part in contents.parts(file, _CHUNK):
        digest.update(part)
    return digest.hexdigest()


class _Watched(io.BufferedReader):
    """A file whose reading can be stopped, and counted."""

    def __init__(self, file: io.FileIO, check: Check) -> None:
        super().__init__(file)
        self._check = check
        self._meter: Meter | None = None
        self._start = 0

    def count(self, meter: Meter | None) -> None:
        """From now on, what is read counts here; None: it does not count."""
        self._meter = meter
        self._start = meter.done if meter is not None else 0

    def read(self, size: int | None = -1, /) -> bytes:
        self._check()
        data = super().read(size)
        if self._meter is not None:
            self._meter.reach(self._start + self.tell())
        return data


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the library from logging, as its warnings name the signed addresses that it sends files to, and from
    drawing progress into the trainer's log."""
    from huggingface_hub.utils.logging import get_verbosity, set_verbosity
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    level, drawn = get_verbosity(), not are_progress_bars_disabled()
    set_verbosity(logging.CRITICAL)
    if drawn:
        disable_progress_bars()
    try:
        yield
    finally:
        set_verbosity(level)
        if drawn:
            enable_progress_bars()


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _failed(error: Exception, place: Repository, secret_name: str) -> TrainingError:
    """What an error of the library means."""
    from huggingface_hub import errors

    if isinstance(error, ValueError) and str(error).startswith("Invalid metadata in README.md"):
        said = " ".join(str(error).partition("\n")[2].split())[:300]
        message = f"The hub does not take the model's card: {said or 'its metadata is not valid'}."
        return TrainingError(
            "DESTINATION_FAILED", message, "Look at the card (luthier model card), and at its licence."
        )
    response = next((each.response for each in _causes(error) if isinstance(each, errors.HfHubHTTPError)), None)
    if response is not None:
        status = response.status_code
        if status in (401, 403):
            message = f"The token of the secret {secret_name!r} may not write to {place} (HTTP {status})."
            hint = "It needs write access to the repository, or to its owner's repositories to make one."
            return TrainingError("DESTINATION_FAILED", message, hint)
        if status == 404:
            return TrainingError("DESTINATION_FAILED", f"There is no {place}.", "Check the owner and the name.")
        busy = status in (408, 409, 412, 429) or status >= 500
        message = f"The hub did not take {place} (HTTP {status})."
        hint = "The job tries again." if busy else "Look at the owner's plan and limits on the hub."
        return TrainingError("DESTINATION_FAILED", message, hint, retryable=busy)
    if isinstance(error, errors.OfflineModeIsEnabled):
        message = "The server is kept from the hub (HF_HUB_OFFLINE)."
        return TrainingError("DESTINATION_FAILED", message, "Choose another destination, or tell the operator.")
    if isinstance(error, errors.HFValidationError):
        message = f"{place} cannot be the name of a repository."
        return TrainingError("DESTINATION_FAILED", message, "Name one as hf://OWNER/NAME.")
    network = any(
        isinstance(each, (OSError, TimeoutError)) or type(each).__module__.startswith(("httpx", "httpcore"))
        for each in _causes(error)
    )
    message = f"The hub could not be {'reached' if network else 'written to'} ({type(error).__name__})."
    hint = "The job tries again; if it stays, look at the network." if network else "Try again later."
    return TrainingError("DESTINATION_FAILED", message, hint, retryable=network)
