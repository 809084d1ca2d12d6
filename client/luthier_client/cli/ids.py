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
_NAME = re.compile(r"^[a-z0-9][a-z0-9._-]*$")
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
    """The whole id of a model, or the name of a checkpoint (`job_...:step-200`), whose job may be shortened. Names,
    `name@3` and `name@production` are the server's to resolve: names are lower-case, ids are not."""
    if ":" in text:
        return checkpoint(client, text)
    if text == LATEST:
        return _first((each.id for each in client.list_models(page_size=1)), "model")
    is_name = _NAME.match(text) is not None and not text.startswith("model_")
    if "@" in text or _is_whole(text, "model_") or (is_name and not text.isdigit()):
        return text
    prefix = _prefix(text, "model_")
    found = [each.id for each in islice(client.list_models(id_prefix=prefix, page_size=_SHOWN + 1), _SHOWN + 1)]
    return text if is_name and not found else _only(text, "model", found)


def export(client: "Client", text: str) -> str:
    """The whole id of an export. Raises NotFound, AmbiguousId."""
    if _is_whole(text, "export_"):
        return text
    if text == LATEST:
        return _first((each.id for each in client.list_exports(page_size=1)), "export")
    prefix = _prefix(text, "export_")
    found = client.list_exports(id_prefix=prefix, page_size=_SHOWN + 1)
    return _only(text, "export", [each.id for each in islice(found, _SHOWN + 1)])


def files(client: "Client", text: str) -> str:
    """What can be downloaded: a model, a checkpoint, or an export, which is told by its `export_`."""
    return export(client, text) if text.startswith("export_") else model(client, text)


def job_or_model(client: "Client", text: str) -> str:
    """A job (`job_...`, `@latest`, or a short id) or a model (`model_...`, a name, `name@3`)."""
    named = "@" in text or text.startswith("model_") or (_NAME.match(text) and not text.startswith("job_"))
    if text != LATEST and named and not text.isdigit():
        return model(client, text)
    return job(client, text)


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
