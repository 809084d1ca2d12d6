"""The prose and the examples of an HTML page, as plain text."""

from __future__ import annotations

import re
from html.parser import HTMLParser

_SKIPPED = frozenset({"script", "style", "head", "nav", "footer", "button", "form", "svg"})
_SKIPPED_CLASSES = frozenset(
    {"headerlink", "related", "sphinxsidebar", "linenos", "toctree-wrapper", "footer", "contents", "nosearch"}
)
_BLOCKS = frozenset(
    {
        "p",
        "div",
        "section",
        "ul",
        "ol",
        "dl",
        "dt",
        "dd",
        "li",
        "table",
        "tr",
        "blockquote",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
    }
)
_VOID = frozenset({"br", "img", "hr", "meta", "link", "input", "col", "wbr", "area", "source"})


class _Text(HTMLParser):
    """Collects paragraphs; `main` tells whether one element is the page's own text, and all else its frame."""

    def __init__(self, main: bool) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self._open: list[tuple[str, bool]] = []  # (tag, whether it begins what is left out)
        self._within = 0 if main else 1
        self._main = main
        self._main_depth = 0
        self._left_out = 0
        self._preformatted = 0
        self._text: list[str] = []
        self._mark = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag in _VOID:
            if tag == "br":
                self._text.append("\n" if self._preformatted else " ")
            return
        named = {name: value or "" for name, value in attributes}
        left_out = tag in _SKIPPED or bool(_SKIPPED_CLASSES.intersection(named.get("class", "").split()))
        self._open.append((tag, left_out))
        self._left_out += left_out
        if self._main and named.get("role") == "main":
            self._within += 1
            self._main_depth = len(self._open)
        if tag == "pre":
            self._end_paragraph()
            self._preformatted += 1
        elif tag in _BLOCKS:
            self._end_paragraph()
            if tag not in ("p", "div"):  # a paragraph in a list's item is the item's text
                self._mark = "* " if tag == "li" else ""
        elif tag in ("td", "th"):
            self._text.append("  ")

    def handle_endtag(self, tag: str) -> None:
        if tag not in (each for each, _ in self._open):
            return
        while self._open:
            if self._main_depth == len(self._open):
                self._end_paragraph()
                self._within -= 1
                self._main_depth = 0
            last, left_out = self._open.pop()
            self._left_out -= left_out
            if last == "pre":
                self._end_paragraph()
                self._preformatted -= 1
            elif last in _BLOCKS:
                self._end_paragraph()
            if last == tag:
                break

    def handle_data(self, data: str) -> None:
        if self._within > 0 and not self._left_out:
            self._text.append(data)

    def _end_paragraph(self) -> None:
        text = "".join(self._text)
        self._text = []
        if self._preformatted:
            lines = text.expandtabs(4).strip("\n").rstrip().split("\n")
            text = "\n".join(f"    {line.rstrip()}" if line.strip() else "" for line in lines)
            if text.strip():
                self.paragraphs.append(text)
            return
        text = " ".join(text.replace("\u00b6", "").split())
        if text:
            self.paragraphs.append(self._mark + text)
            self._mark = ""


def page_text(html: str) -> str:
    """The page's own text: paragraphs and list items on lines of their own, examples indented by four spaces."""
    parser = _Text(main=re.search(r"role=[\"']main[\"']", html) is not None)
    parser.feed(html)
    parser.close()
    paragraphs: list[str] = []
    for each in parser.paragraphs:
        if paragraphs and each.startswith("* ") and paragraphs[-1].startswith("* "):
            paragraphs[-1] += "\n" + each  # the items of a list stay together
        else:
            paragraphs.append(each)
    return "\n\n".join(paragraphs)


def pieces(text: str, characters: int) -> list[str]:
    """The text cut between paragraphs into runs of at most so many characters; a longer paragraph stays whole."""
    runs: list[list[str]] = []
    size = 0
    for paragraph in text.split("\n\n"):
        if not runs or size + len(paragraph) > characters:
            runs.append([])
            size = 0
        runs[-1].append(paragraph)
        size += len(paragraph) + 2
    return ["\n\n".join(run).strip("\n") for run in runs]
