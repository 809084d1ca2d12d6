"""What the errors of the hub's libraries mean to whoever asked for a dataset."""

import re

from luthier_trainer.data.fetching.request import FetchError, HubSource


def translated(error: Exception, source: HubSource, endpoint: str, has_token: bool) -> FetchError | None:
    """What an error of the libraries means to the user; None for one that nobody expected."""
    import pyarrow as pa
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import errors

    text = str(error)
    token_hint = "Check that the token is valid for it." if has_token else "A private one needs a token: token_secret."
    if isinstance(error, errors.GatedRepoError):
        message = f"{source.id} is gated: its owner gives access one by one."
        hint = f"Ask for access on {endpoint}/datasets/{source.id}, and name the secret of your token by token_secret."
        return FetchError("NOT_PERMITTED", message, hint)
    if isinstance(error, errors.RevisionNotFoundError):
        message = f"{source.id} has no revision {source.revision or 'main'!r}."
        return FetchError("NOT_FOUND", message, "Name a branch, a tag or a whole commit.")
    if isinstance(error, (errors.RepositoryNotFoundError, DatasetNotFoundError)):
        return FetchError("NOT_FOUND", f"There is no dataset {source.id} on the hub.", f"Check the id. {token_hint}")
    if isinstance(error, errors.HFValidationError):
        return FetchError("NOT_FOUND", f"{source.id!r} is not the id of a dataset.", "Write it as in openai/gsm8k.")
    if isinstance(error, FileNotFoundError):
        message = f"{source.id} has no data files that can be read."
        return FetchError("NOT_SUPPORTED", message, "Import one of its files by URL.")
    if isinstance(error, MemoryError):
        message = f"The rows of {source.id} take more memory than an import may."
        return FetchError("TOO_LARGE", message, "Import one of its files by URL.")
    if isinstance(error, ImportError):
        message = f"The files of {source.id} need software that this server does not have ({error.name or text[:80]})."
        return FetchError("NOT_SUPPORTED", message, "Zip the images with a file of rows, and upload it.")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return FetchError("UNAVAILABLE", "The server is kept from the hub (HF_HUB_OFFLINE).", "Upload the file.")
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return FetchError("NOT_PERMITTED", f"The hub does not give {source.id} out (HTTP {status}).", token_hint)
        return FetchError("UNAVAILABLE", f"The hub answered with HTTP {status}.", "Try again later.")
    if isinstance(error, ValueError) and (
        found := re.search(r"onfig.*(?:available configs|Available): (\[.*?\])", text, re.S)
    ):
        names = found[1].strip("[]").replace("'", "")
        missing = f"no configuration {source.config!r}" if source.config else "several configurations"
        reason = "NOT_FOUND" if source.config else "CONFIG_NEEDED"
        return FetchError(reason, f"{source.id} has {missing}. It has: {names}.", "Name one of them.")
    if isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.startswith(("httpx", "httpcore")):
        return FetchError("UNAVAILABLE", f"The hub cannot be reached ({type(error).__name__}).", "Try again later.")
    if isinstance(error, (pa.ArrowException, ValueError, UnicodeError)):
        message = f"The files of {source.id} cannot be read ({type(error).__name__})."
        return FetchError("UNREADABLE", message, "Import one of its files by URL: its findings then say what is wrong.")
    return None
