"""Bytes that were lost, changed, or put in."""

from collections.abc import Callable
from random import Random

from mutations.bases import pick
from mutations.mutant import File


def truncated(random: Random) -> File:
    """The end is missing, often just a few bytes of it."""
    name, content = pick(random)
    left = random.randrange(len(content)) if random.random() < 0.6 else max(0, len(content) - random.randint(1, 12))
    return File(name, content[:left])


def beheaded(random: Random) -> File:
    """The beginning is missing."""
    name, content = pick(random)
    return File(name, content[random.randint(1, min(64, len(content))) :])


def flipped(random: Random) -> File:
    """Some bits are others."""
    name, content = pick(random)
    return File(name, flip(random, content, random.choice((1, 1, 2, 4, 16, 64))))


def inserted(random: Random) -> File:
    """Bytes were put in."""
    name, content = pick(random)
    for _ in range(random.randint(1, 4)):
        at = random.randint(0, len(content))
        content = content[:at] + random.choice(_PIECES)(random) + content[at:]
    return File(name, content)


def moved(random: Random) -> File:
    """A piece is gone, twice there, zeroed, or elsewhere."""
    name, content = pick(random)
    start = random.randrange(len(content))
    end = min(len(content), start + random.choice((1, 8, 64, 512)))
    piece = content[start:end]
    at = random.randint(0, len(content))
    ways = (
        lambda: content[:start] + content[end:],
        lambda: content[:end] + piece * random.choice((1, 10, 1000)) + content[end:],
        lambda: content[:start] + bytes(len(piece)) + content[end:],
        lambda: content[:at] + piece + content[at:],
    )
    return File(name, random.choice(ways)())


def spliced(random: Random) -> File:
    """The beginning of one file and the end of another."""
    (one, first), (other, second) = pick(random), pick(random)
    return File(f"{one} + {other}", first[: random.randint(0, len(first))] + second[random.randint(0, len(second)) :])


def noise(random: Random) -> File:
    """Random bytes, sometimes after the first bytes of a format."""
    name, content = pick(random)
    head = content[: random.choice((0, 4, 8, 16))]
    return File(f"head of {name}", head + random.randbytes(random.choice((1, 7, 100, 5000, 200_000))))


def flip(random: Random, content: bytes, count: int, start: int = 0) -> bytes:
    """The content with so many bytes changed, at or behind `start`."""
    changed = bytearray(content)
    for _ in range(count):
        changed[random.randrange(start, len(changed))] ^= random.randint(1, 255)
    return bytes(changed)


_PIECES: tuple[Callable[[Random], bytes], ...] = (
    lambda random: random.randbytes(random.choice((1, 2, 4, 100, 10_000))),
    lambda random: b"\0" * random.choice((1, 10, 4096)),
    lambda random: b"\xff" * random.choice((1, 8)),
    lambda random: random.choice((b"\n", b"\r", b"\r\n", b"\xe2\x80\xa8", b"\x85", b"\x1a", b"\x1b[31m")),
    lambda random: random.choice((b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\")) * random.choice((1, 3, 1000)),
)
