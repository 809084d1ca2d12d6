"""Chats of lengths as they occur, made from a seed: the same bytes on every machine."""

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

_SYLLABLES = (
    *("ba", "ce", "di", "fo", "gu", "ha", "je", "ki", "lo", "mu", "na", "pe", "qui", "ro", "su", "ta", "ve", "wi"),
    *("xo", "yu", "za", "bre", "cla", "dri", "flo", "gru", "ster", "ment", "ing"),
)
_ENDS = (". ", ". ", ". ", "? ", "! ", ", ", ", ", ": ", ".\n\n", ";\n    ", ' "', '" ', " (", ") ", " / ", "... 😀 ")
_WORDS = 4000
_BANK = 2_000_000
_MEDIAN, _SPREAD, _LONGEST = 160, 0.9, 12_000


def write(path: Path, rows: int) -> int:
    """Writes so many rows as JSONL, about a kilobyte each; returns the bytes."""
    size = 0
    with open(path, "wb", buffering=1 << 20) as file:
        for row in chats(rows):
            size += file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    return size


def chats(rows: int) -> Iterator[dict[str, Any]]:
    """Conversations of one to six turns, some with a system turn, none like another."""
    random = Random("datasets")
    bank = _bank(random)
    for _ in range(rows):
        messages = []
        if random.random() < 0.3:
            messages.append({"role": "system", "content": _text(random, bank)})
        for _ in range(random.choice((1, 1, 1, 2, 2, 3))):
            messages.append({"role": "user", "content": _text(random, bank)})
            messages.append({"role": "assistant", "content": _text(random, bank)})
        yield {"messages": messages}


def _text(random: Random, bank: str) -> str:
    length = min(_LONGEST, int(random.lognormvariate(0, _SPREAD) * _MEDIAN) + 8)
    start = random.randrange(len(bank) - _LONGEST)
    return bank[start : start + length].strip() or "yes"


def _bank(random: Random) -> str:
    words = ["".join(random.choices(_SYLLABLES, k=random.choice((1, 2, 2, 3)))) for _ in range(_WORDS)]
    words += [str(random.randrange(10_000)) for _ in range(100)] + [
        "größer",
        "café",
        "naïve",
        "東京",
        "don't",
        "x = f(y)",
    ]
    pieces: list[str] = []
    length = 0
    while length < _BANK:
        sentence = " ".join(random.choices(words, k=random.randint(2, 14))) + random.choice(_ENDS)
        pieces.append(sentence)
        length += len(sentence)
    return "".join(pieces)
