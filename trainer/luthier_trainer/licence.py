"""The licence of a base model, as its own files tell: its card's metadata, a model of Luthier's note of its base, or a
licence's own text. Nothing is guessed: what they do not say plainly is unknown."""

import json
import re
from collections.abc import Callable
from pathlib import Path

from luthier.trainer.v1.task_pb2 import BaseModelSource

_MAX_BYTES = 1 << 20
_CARD = "README.md"
_NOTE = "luthier.json"
_TEXTS = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "COPYING")
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)
_FIELD = re.compile(r"^(license|license_name):[ \t]*(.*?)[ \t]*$", re.MULTILINE)
_IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,63}", re.ASCII)
_SPDX = re.compile(r"SPDX-License-Identifier:[ \t]*(\S+)")
# How well-known licences begin, the longer names before those that they contain; identifiers as the Hub writes them.
_BEGINNINGS = (
    (r"Apache License\s+Version 2\.0", "apache-2.0"),
    (r"(The )?MIT License", "mit"),
    (r"BSD 3-Clause", "bsd-3-clause"),
    (r"BSD 2-Clause", "bsd-2-clause"),
    (r"GNU AFFERO GENERAL PUBLIC LICENSE\s+Version 3", "agpl-3.0"),
    (r"GNU LESSER GENERAL PUBLIC LICENSE\s+Version 3", "lgpl-3.0"),
    (r"GNU GENERAL PUBLIC LICENSE\s+Version 3", "gpl-3.0"),
    (r"GNU GENERAL PUBLIC LICENSE\s+Version 2", "gpl-2.0"),
    (r"Mozilla Public License,? Version 2\.0", "mpl-2.0"),
    (r"Attribution-NonCommercial 4\.0 International", "cc-by-nc-4.0"),
    (r"Attribution-ShareAlike 4\.0 International", "cc-by-sa-4.0"),
    (r"Attribution 4\.0 International", "cc-by-4.0"),
    (r"CC0 1\.0 Universal", "cc0-1.0"),
    (r"Gemma Terms of Use", "gemma"),
    (r"LLAMA 2 COMMUNITY LICENSE", "llama2"),
    (r"META LLAMA 3 COMMUNITY LICENSE", "llama3"),
    (r"LLAMA 3\.1 COMMUNITY LICENSE", "llama3.1"),
    (r"LLAMA 3\.2 COMMUNITY LICENSE", "llama3.2"),
    (r"LLAMA 3\.3 COMMUNITY LICENSE", "llama3.3"),
    (r"LLAMA 4 COMMUNITY LICENSE", "llama4"),
)
_BEGINNING_CHARACTERS = 400


def base_licence(source: BaseModelSource, revision: str) -> str:
    """The identifier of a base's licence, in lower case; empty when its files do not tell, or the hub does not give
    them. revision: the commit that was loaded from the hub."""
    if not source.is_hub:
        return licence_in(Path(source.location))
    return _licence(lambda name: _from_hub(source.location, name, revision or source.revision))


def licence_in(directory: Path) -> str:
    """The identifier of the licence of a model's directory, in lower case; empty when its files do not tell."""
    return _licence(lambda name: _read(directory / name))


def _licence(read: Callable[[str], str]) -> str:
    if named := of_card(read(_CARD)):
        return named
    if noted := _of_note(read(_NOTE)):
        return noted
    return next((found for name in _TEXTS if (found := of_text(read(name)))), "")


def of_card(card: str) -> str:
    """What the metadata of a model card names: `license`, or where that is `other` its `license_name`."""
    front = _FRONT_MATTER.match(card)
    if front is None:
        return ""
    fields = {name: value.strip("'\"") for name, value in _FIELD.findall(front[1])}
    if fields.get("license", "").lower() == "other" and fields.get("license_name"):
        return _identifier(fields["license_name"])
    return _identifier(fields.get("license", ""))


def of_text(text: str) -> str:
    """The licence whose text this is, where it begins as a well-known one or says its SPDX identifier."""
    if found := _SPDX.search(text[:_BEGINNING_CHARACTERS]):
        return _identifier(found[1])
    for beginning, identifier in _BEGINNINGS:
        if re.search(beginning, text[:_BEGINNING_CHARACTERS], re.IGNORECASE):
            return identifier
    return ""


def _of_note(note: str) -> str:
    """What a model of Luthier's notes of its own base: a model made of it is bound by the same licence."""
    try:
        base = json.loads(note or "{}").get("base_model", {})
        return _identifier(str(base.get("licence", "")))
    except (ValueError, AttributeError, RecursionError):
        return ""


def _identifier(text: str) -> str:
    return text.lower() if _IDENTIFIER.fullmatch(text) else ""


def _read(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return file.read(_MAX_BYTES).decode(errors="replace")
    except OSError:
        return ""


def _from_hub(repository: str, name: str, revision: str) -> str:
    """A small file of a repository of the hub; empty when it is not there, or cannot be had just now."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if name not in (_CARD, "LICENSE"):  # each is a question over the network
        return ""
    try:
        return _read(Path(hf_hub_download(repository, name, revision=revision or None)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return ""
