"""The corpus of `builtin/tiny`: what is trained on, what is held out, and that the second says nothing of the first."""

from __future__ import annotations

import ast
import hashlib
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pretraining.conversations import as_chat, invented_objects
from pretraining.library import Described, as_code, comment_blocks, described_objects, library_sources
from pretraining.packages import PYTHON, Package, pages
from pretraining.pages import pieces

RUN = 12
"""Words in a row that a text must share with a held-out one to be left out of training."""
PIECE = 1200
LONG_PIECE = 4000
"""Characters of a piece of a page: about 350 tokens, and of one page in eight over a thousand, so that the far
positions are trained too."""
SHARE = 180_000
"""Characters that are taken of each package but Python's own: enough of many kinds rather than all of the largest."""


@dataclass(frozen=True)
class Library:
    """The texts of a CPython installation, in a fixed order; those held out share no object with those trained on.

    `sources` are whole modules, one in four, for the tokenizer alone, so that brackets and quotes are cheap.
    """

    documents: list[str]
    chats: list[str]
    heldout_documents: list[str]
    heldout_chats: list[str]
    sources: list[str]


@dataclass(frozen=True)
class Page:
    """A page of a package."""

    package: str
    path: str
    text: str


@dataclass(frozen=True)
class Pages:
    """Whole pages, trained on and held out."""

    trained: list[Page]
    heldout: list[Page]


def held_out(key: str) -> bool:
    """Whether the object or page of this name is held out: about one in fifty, by a hash."""
    return hashlib.sha256(key.encode()).digest()[0] < 5


def read_library(library: Path, seed: int, retellings: int, inventions: int) -> Library:
    """What the standard library at `library` says.

    Every object is retold `retellings` times, and `inventions` conversations are about objects that do not exist.
    """
    topics: dict[str, str] = {}
    for node in ast.parse((library / "pydoc_data" / "topics.py").read_text("utf-8")).body:
        if isinstance(node, ast.Assign):
            topics = ast.literal_eval(node.value)
    entries: list[tuple[str, str, list[str]]] = [(f"topic {name}", text, []) for name, text in topics.items()]
    seen: set[str] = set()
    choose = random.Random(seed)
    sources: list[str] = []
    items: list[Described] = []
    for module, source in library_sources(library):
        sources.append(source)
        for item in described_objects(module, source):
            normal = " ".join(item.text.lower().split())
            if len(normal) < 12 or normal in seen:
                continue
            seen.add(normal)
            items.append(item)
            chats = [as_chat(item, choose) for _ in range(retellings)]
            entries.append((f"{module}:{item.qualname}", as_code(item), chats))
        for text in comment_blocks(source):
            normal = " ".join(text.lower().split())
            if normal not in seen:
                seen.add(normal)
                entries.append((text, text, []))
    for number, item in enumerate(invented_objects(items, inventions, choose)):
        entries.append((f"invention {number}", "", [as_chat(item, choose)]))
    trained = [entry for entry in entries if not held_out(entry[0])]
    tested = [entry for entry in entries if held_out(entry[0])]
    return Library(
        documents=[text for _, text, _ in trained if text],
        chats=[chat for _, _, chats in trained for chat in chats],
        heldout_documents=[text for _, text, _ in tested if text],
        heldout_chats=[chat for _, _, chats in tested for chat in chats],
        sources=sources[::4],
    )


def read_pages(packages: Sequence[Package]) -> Pages:
    """The pages of the packages, in the order of a hash: all of Python's, and SHARE characters of each other."""
    trained: list[Page] = []
    tested: list[Page] = []
    for package in packages:
        every = [Page(package.name, path, text) for path, text in pages(package)]
        every.sort(key=lambda page: hashlib.sha256(f"{page.package}/{page.path}".encode()).digest()[1:])
        left = SHARE
        for page in every:
            if package.name != PYTHON and left <= 0:
                break
            left -= len(page.text)
            (tested if held_out(f"{page.package}/{page.path}") else trained).append(page)
    return Pages(trained, tested)


def runs(text: str) -> Iterable[int]:
    """Hashes of every RUN words in a row, whatever their case and what is between them."""
    words = re.findall(r"\w+", text.lower())
    return (hash(tuple(words[at : at + RUN])) for at in range(len(words) - RUN + 1))


def training_rows(library: Library, found: Pages, say: Callable[[str], None]) -> dict[str, list[str]]:
    """The texts that are trained on, by source, without what a held-out document says in the same words: paragraphs
    of pages, whole documents and conversations of the library. Documents of the library come twice."""
    tested = [*library.heldout_documents, *(page.text for page in found.heldout)]
    known = {run for text in tested for run in runs(text)}

    def clean(text: str) -> bool:
        return known.isdisjoint(runs(text))

    documents = [text for text in library.documents if clean(text)]
    chats = [text for text in library.chats if clean(text)]
    say(f"left out of the library: {len(library.documents) - len(documents)} documents")
    say(f"left out of the conversations: {len(library.chats) - len(chats)}")
    rows = {"library": [*documents, *documents], "conversations": chats}
    lost = 0
    for page in found.trained:
        paragraphs = [each for each in page.text.split("\n\n") if clean(each)]
        kept = "\n\n".join(paragraphs)
        lost += len(page.text) - len(kept)
        long = hashlib.sha256(page.path.encode()).digest()[1] < 32
        rows.setdefault(page.package, []).extend(
            each for each in pieces(kept, LONG_PIECE if long else PIECE) if len(each) >= 80
        )
    say(f"left out of the pages: {lost:,} characters")
    return rows
