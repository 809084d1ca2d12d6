"""Ids as people write them: whole, `@latest`, or any beginning that is unique."""

import re
from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING

from luthier_client.errors import LuthierError, NotFound

if TYPE_CHECKING:
    from luthier_client.client import Client

LATEST = "@latest"
_ULID = re.compile(r"^[0-9A-HJKMNP-TV-Z]{26}$", re.IGNORECASE)
_STEP = re.compile(r"^step-[0-9]+$")
_SHOWN = 8


class AmbiguousId(LuthierError):
    """Several ids begin like this."""


def job(client: "Client", text: str) -> str:
    """The whole id of a job. Raises NotFound, AmbiguousId."""
    if _is_whole(text, "job_"):
        return text
    if text == LATEST:
        return _first((each.id for each in client.list_jobs(page_size=1)), "job")
    prefix = _prefix(text, "job_")
    found = client.list_jobs(id_prefix=prefix, page_size=_SHOWN + 1)
    return _only(text, "job", [each.id for each in islice(found, _SHOWN + 1)])


def model(client: "Client", text: str) -> str:
    """The whole id of a model, or the name of a checkpoint (`job_...:step-200`), whose job may be shortened."""
    if ":" in text:
        return checkpoint(client, text)
    if _is_whole(text, "model_"):
        return text
    if text == LATEST:
        return _first((each.id for each in client.list_models(page_size=1)), "model")
    prefix = _prefix(text, "model_")
    found = client.list_models(id_prefix=prefix, page_size=_SHOWN + 1)
    return _only(text, "model", [each.id for each in islice(found, _SHOWN + 1)])


def checkpoint(client: "Client", text: str) -> str:
    """The whole name of a checkpoint, whose job may be shortened. Raises NotFound, AmbiguousId, ValueError."""
    head, _, step = text.partition(":")
    if not _STEP.match(step):
        raise ValueError(f"{text!r} is no checkpoint; write JOB:step-N, as `luthier job checkpoints JOB` lists them")
    return f"{job(client, head)}:{step}"


def dataset(client: "Client", text: str) -> str:
    """The whole id of a dataset; names and `name@3` are the server's to resolve."""
    if text == LATEST:
        return _first((each.id for each in client.list_datasets(page_size=1)), "dataset")
    if not text.startswith("ds_") or _is_whole(text, "ds_"):
        return text
    found = client.list_datasets(id_prefix=text, page_size=_SHOWN + 1)
    return _only(text, "dataset", [each.id for each in islice(found, _SHOWN + 1)])


def _is_whole(text: str, kind: str) -> bool:
    return text.startswith(kind) and _ULID.match(text.removeprefix(kind)) is not None


def _prefix(text: str, kind: str) -> str:
    # `01J8` is as good as `job_01J8`.
    return text if text.startswith(kind) else kind + text


def _first(ids: Iterable[str], what: str) -> str:
    for each in ids:
        return each
    raise NotFound(f"there is no {what} yet", reason="NOTHING_YET")


def _only(text: str, what: str, ids: list[str]) -> str:
    if text in ids:
        return text
    if not ids:
        raise NotFound(f"no {what} begins with {text!r}", reason="NOT_FOUND")
    if len(ids) > 1:
        shown = [(each, "") for each in ids[:_SHOWN]]
        more = " and more" if len(ids) > _SHOWN else ""
        raise AmbiguousId(
            f"{text!r} is the beginning of several {what}s{more}", reason="AMBIGUOUS_ID", violations=shown
        )
    return ids[0]
