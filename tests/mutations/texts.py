"""Text that is none, of another encoding, or empty."""

import codecs
from random import Random

from mutations.bases import pick
from mutations.mutant import File

_TEXTS = (".jsonl", ".json", ".csv")


def empty(random: Random) -> File:
    """Nothing, or nothing to see."""
    space = random.choice((b"", b"\n", b"\r\n", b" ", b"\t", b"\0", b"\xef\xbb\xbf", b"\x0c", b"\r", b"\n \n"))
    return File("blank", space * random.choice((1, 2, 1000, 100_000)))


def crumbs(random: Random) -> File:
    """A few bytes that begin something."""
    pieces = (
        *(b"{", b"[", b"[]", b"{}", b"null", b"0", b'"', b"[[", b"{}{}", b"[{}", b"[{},", b"a", b",", b";", b"a,b"),
        *(
            b"\x1f\x8b",
            b"\x1f\x8b\x08",
            b"\x28\xb5\x2f\xfd",
            b"PK",
            b"PK\x03\x04",
            b"PK\x05\x06",
            b"PK\x05\x06" + bytes(18),
        ),
        *(b"PAR1", b"PAR1PAR1", b"PAR1" + bytes(4) + b"PAR1", b"ARROW1", b"ARROW1\0\0", b"\xff\xff\xff\xff"),
        *(
            b"\xff\xff\xff\xff\xff\xff\xff\x7f",
            b"\xff\xfe",
            b"\xfe\xff\0{",
            b"\xff\xfe\0\0",
            b"\x89PNG\r\n\x1a\n",
            b"%PDF-",
        ),
        *(b"\x80\x04\x95", b"BZh9", b"\xfd7zXZ\0", b"7z\xbc\xaf\x27\x1c", b"Rar!", b"#!/bin/sh\n", b"<?xml", b"---\n"),
    )
    return File("crumbs", random.choice(pieces) * random.choice((1, 1, 1, 3)))


def other_encoding(random: Random) -> File:
    """UTF-16, UTF-32, Latin-1 or worse, with a mark or without."""
    name, content = pick(random, *_TEXTS)
    text = content.decode()
    encoding = random.choice(("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "latin-1", "cp037", "utf-7"))
    encoded = text.encode(encoding, "replace")
    if random.random() < 0.3:
        encoded = encoded[: -random.randint(1, 3)]
    return File(f"{name} in {encoding}", encoded)


def marked(random: Random) -> File:
    """Byte order marks where they belong, and elsewhere."""
    name, content = pick(random, *_TEXTS)
    mark = random.choice((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_LE))
    at = random.choice((0, 0, content.find(b"\n") + 1, len(content)))
    return File(name, content[:at] + mark * random.choice((1, 1, 2, 100)) + content[at:])


def line_ends(random: Random) -> File:
    """Line ends of other systems, mixed, and none at all."""
    name, content = pick(random, ".jsonl", ".csv")
    end = random.choice((b"\r\n", b"\r", b"\n\r", b"\n\n", b"", b"\0\n", b"\x0b", b"\xe2\x80\xa9", b",\n", b"\x1e"))
    return File(name, content.replace(b"\n", end))


def bad_utf8(random: Random) -> File:
    """Bytes inside of the text that are no UTF-8: cut off, too long, surrogates, beyond the last character."""
    name, content = pick(random, *_TEXTS)
    bad = random.choice(
        (
            b"\xff",
            b"\xc3",
            b"\xe2\x82",
            b"\xc0\x80",
            b"\xed\xa0\x80",
            b"\xf4\x90\x80\x80",
            b"\xf8\x88\x80\x80\x80",
            b"\x80",
        )
    )
    letters = [at for at, byte in enumerate(content) if chr(byte).isalpha()]
    for at in sorted(random.sample(letters, random.choice((1, 1, 5))), reverse=True):
        content = content[:at] + bad + content[at:]
    return File(name, content)
