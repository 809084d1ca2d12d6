"""gzip and zstd that are broken, lie, or blow up."""

import gzip
import zlib
from functools import lru_cache
from random import Random

import zstandard
from mutations.bases import bases, pick
from mutations.damage import flip
from mutations.mutant import File

_MIB = 1024 * 1024
_PLAIN = (".jsonl", ".json", ".csv", ".parquet")
_FILLS = (b"\0", b"\n", b"a", b"[", b'{"text": "a"}\n', b'{"text": "' + b"a" * 100_000 + b'"}\n', b"a,b\n", b" ")


def broken(random: Random) -> File:
    """A compressed file with changed, missing or added bytes."""
    name, content = pick(random, ".gz", ".zst")
    ways = (
        lambda: content[: random.randrange(len(content))],
        lambda: flip(random, content, random.choice((1, 3, 20))),
        lambda: flip(random, content, 1, max(0, len(content) - 8)),
        lambda: flip(random, content[:12], random.choice((1, 2))) + content[12:],
        lambda: content + random.randbytes(random.choice((1, 100))),
        lambda: content + bytes(random.choice((1, 512, 100_000))),
    )
    return File(name, random.choice(ways)())


def joined(random: Random) -> File:
    """Several members one after the other, of both kinds, and empty ones by the thousand."""
    (one, first), (other, second) = pick(random, ".gz", ".zst"), pick(random, ".gz", ".zst")
    nothing = random.choice((gzip.compress(b"", mtime=0), zstandard.compress(b"")))
    ways = (
        lambda: first + second,
        lambda: first + second[: random.randrange(len(second))],
        lambda: nothing * random.choice((1, 1000, 200_000)),
        lambda: nothing * 1000 + first,
        lambda: first * random.choice((2, 500)),
        lambda: first + b"PK\x03\x04" + second,
    )
    return File(f"{one} + {other}", random.choice(ways)())


def layered(random: Random) -> File:
    """Compressed again and again, and what no one packs: an archive, or something else by its name."""
    name, content = pick(random, *_PLAIN, ".zip", ".arrow", ".arrows")
    for _ in range(random.choice((1, 2, 3, 30))):
        content = random.choice((lambda x: gzip.compress(x, 1, mtime=0), zstandard.compress))(content)
    return File(name, content)


def headers(random: Random) -> File:
    """Headers with odd flags, huge windows, dictionaries, sizes that are not so."""
    content = bases()["messages.jsonl"]
    ways = (
        lambda: b"\x1f\x8b\x08" + random.randbytes(7) + zlib.compress(content)[2:-4],
        lambda: b"\x1f\x8b\x08\x08" + bytes(6) + b"n" * random.choice((10, 5_000_000)) + gzip.compress(content)[10:],
        lambda: b"\x1f\x8b\x08\x04" + bytes(6) + b"\xff\xff" + random.randbytes(1000),
        lambda: zstandard.ZstdCompressor(write_content_size=False, write_checksum=True).compress(content),
        lambda: (
            b"\x28\xb5\x2f\xfd" + bytes([random.randrange(256) for _ in range(14)]) + zstandard.compress(content)[6:]
        ),
        lambda: b"\x28\xb5\x2f\xfd\xe0" + b"\xff" * 8 + zstandard.compress(content)[6:],
        lambda: b"\x28\xb5\x2f\xfd\x00\xf8" + zstandard.compress(content)[6:],
        lambda: b"\x50\x2a\x4d\x18" + b"\xff\xff\xff\xff" + content,
        lambda: (b"\x50\x2a\x4d\x18" + b"\x04\0\0\0" + b"skip") * 1000 + zstandard.compress(content),
        lambda: zstandard.ZstdCompressor(
            compression_params=zstandard.ZstdCompressionParameters(window_log=random.choice((10, 27, 30)))
        ).compress(content),
    )
    return File("odd headers", random.choice(ways)())


def bomb(random: Random) -> File:
    """Gigabytes in kilobytes; also in layers."""
    fill = random.randrange(len(_FILLS))
    kind = random.choice(("gzip", "zstd"))
    # What may come out grows with what is stored, and so does the time: gzip packs 16 MiB in 32 KiB, zstd in 2.
    times = random.choice((1, 10, 30) if kind == "gzip" else (1, 20, 100, 500))
    content = _packed(kind, fill) * times
    layers = random.choice((0, 0, 1, 2))
    for _ in range(layers):
        content = gzip.compress(content, 1, mtime=0) if random.random() < 0.5 else zstandard.compress(content)
    return File(f"{times * 16} MiB in {kind} and {layers} layers more", content)


@lru_cache(maxsize=32)
def _packed(kind: str, fill: int) -> bytes:
    data = _FILLS[fill] * (16 * _MIB // len(_FILLS[fill]))
    return gzip.compress(data, 9, mtime=0) if kind == "gzip" else zstandard.compress(data, 19)
