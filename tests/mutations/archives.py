"""Zip archives that lie, lead elsewhere, or blow up. They are written by hand: no library would."""

import struct
import zlib
from dataclasses import dataclass
from functools import lru_cache
from random import Random

from mutations.bases import bases, pick, zipped
from mutations.damage import flip
from mutations.mutant import MARK, SECRET_PATH, File

_MIB = 1024 * 1024
_LINK, _FILE, _FIFO, _DEVICE, _FOLDER = 0o120777, 0o100644, 0o010644, 0o020666, 0o040755


@dataclass(frozen=True)
class _Member:
    """A member as its headers say it is. None: as it is."""

    name: bytes
    data: bytes
    method: int = 0
    flags: int = 0
    mode: int = _FILE
    crc: int | None = None
    size: int | None = None
    packed: int | None = None
    extra: bytes = b""


def _local(member: _Member) -> bytes:
    size = len(member.data) if member.size is None else member.size
    packed = len(member.data) if member.packed is None else member.packed
    crc = zlib.crc32(member.data) if member.crc is None else member.crc
    return (
        struct.pack(
            "<4sHHHHHIIIHH",
            *(b"PK\x03\x04", 20, member.flags, member.method, 0, 0x5A21, crc),
            *(min(packed, 2**32 - 1), min(size, 2**32 - 1), len(member.name), len(member.extra)),
        )
        + member.name
        + member.extra
        + member.data
    )


def _central(member: _Member, offset: int) -> bytes:
    size = len(member.data) if member.size is None else member.size
    packed = len(member.data) if member.packed is None else member.packed
    crc = zlib.crc32(member.data) if member.crc is None else member.crc
    return (
        struct.pack(
            "<4sHHHHHHIIIHHHHHII",
            *(b"PK\x01\x02", 0x31E, 20, member.flags, member.method, 0, 0x5A21, crc),
            *(min(packed, 2**32 - 1), min(size, 2**32 - 1), len(member.name), len(member.extra), 0, 0, 0),
            *(member.mode << 16, min(offset, 2**32 - 1)),
        )
        + member.name
        + member.extra
    )


def _archive(members: list[_Member], *, entries: int | None = None, overlap: bool = False, shift: int = 0) -> bytes:
    """overlap: every entry of the directory means the first member's bytes; shift: the directory is elsewhere."""
    body = bytearray()
    offsets = []
    for number, member in enumerate(members):
        offsets.append(0 if overlap else len(body))
        if number == 0 or not overlap:
            body += _local(member)
    directory = b"".join(_central(member, offset) for member, offset in zip(members, offsets, strict=True))
    count = min(len(members) if entries is None else entries, 0xFFFF)
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, count, count, len(directory), (len(body) + shift) % 2**32, 0)
    return bytes(body) + directory + end


def _rows() -> _Member:
    return _Member(b"rows.jsonl", bases()["messages.jsonl"])


def escaping(random: Random) -> File:
    """Names that lead out of the archive, and links."""
    name = random.choice(
        (
            *(f"../{MARK}.jsonl", f"../../../{MARK}.jsonl", f"/tmp/{MARK}.jsonl", f"a/../../{MARK}.jsonl", f"/{MARK}"),
            *(
                f"..\\..\\{MARK}.jsonl",
                f"C:\\{MARK}.jsonl",
                f"C:{MARK}.jsonl",
                f"//host/{MARK}.jsonl",
                f"./../{MARK}.jsonl",
            ),
            *(
                f"....//{MARK}.jsonl",
                f"%2e%2e/{MARK}.jsonl",
                f"{MARK}\0.jsonl",
                f"~/{MARK}.jsonl",
                f"a/./b/../{MARK}.jsonl",
            ),
            *("", ".", "..", "/", "\0", "CON", "rows.jsonl/", f"{MARK}\n.jsonl", "a" * 60_000, "\u202elnosj.swor"),
        )
    ).encode()
    links = (SECRET_PATH, f"../{SECRET_PATH}", f"../../../{SECRET_PATH}", "/etc/passwd", "/dev/zero", "rows.jsonl", ".")
    ways = (
        lambda: [_Member(name, _rows().data)],
        lambda: [_rows(), _Member(name, b"escaped")],
        lambda: [_Member(b"rows.jsonl", random.choice(links).encode(), mode=_LINK)],
        lambda: [
            _Member(b"images", random.choice(links).encode(), mode=_LINK),
            _Member(b"images/rows.jsonl", _rows().data),
        ],
        lambda: [_rows(), _Member(b"a.png", random.choice(links).encode(), mode=_LINK)],
        lambda: [_Member(b"rows.jsonl", _rows().data, mode=random.choice((_FIFO, _DEVICE, _FOLDER, 0o177777, 0)))],
    )
    return File(f"escaping by {name[:40]!r}", _archive(random.choice(ways)()))


def twice(random: Random) -> File:
    """The same name twice, alike but for their case, and several files of rows."""
    names = random.choice(
        (
            *((b"rows.jsonl", b"rows.jsonl"), (b"rows.jsonl", b"ROWS.JSONL"), (b"a/rows.jsonl", b"a//rows.jsonl")),
            *(
                (b"rows.jsonl", b"./rows.jsonl"),
                (b"a.json", b"b.csv"),
                (b"rows.jsonl", b"rows.jsonl/"),
                (b"a.jsonl", b"b.jsonl"),
            ),
        )
    )
    return File("twice", _archive([_Member(name, pick(random, ".jsonl", ".json", ".csv")[1]) for name in names]))


def lying(random: Random) -> File:
    """Sizes, checksums, offsets and counts that are not so; encryption, unknown methods, zip64."""
    rows = bases()["messages.jsonl"]
    packed = _deflated(rows)
    huge = random.choice((2**31, 2**32 - 1, 2**40, 2**62))
    zip64 = struct.pack("<HHQQQ", 1, 24, random.choice((huge, 5, 2**64 - 1)), huge, random.choice((0, 2**63)))
    name = b"rows.jsonl"
    ways = (
        lambda: _archive([_Member(name, rows, size=huge)]),
        lambda: _archive([_Member(name, packed, method=8, size=huge, crc=zlib.crc32(rows))]),
        lambda: _archive([_Member(name, packed, method=8, size=3)]),
        lambda: _archive([_Member(name, rows, packed=huge, size=huge)]),
        lambda: _archive([_Member(name, rows, crc=random.randrange(2**32))]),
        lambda: _archive([_Member(name, rows, flags=1)]),
        lambda: _archive([_Member(name, random.randbytes(400), method=8)]),
        lambda: _archive([_Member(name, rows, method=random.choice((1, 6, 9, 12, 14, 93, 97, 99, 0xFFFF)))]),
        lambda: _archive([_Member(name, rows, flags=random.choice((8, 0x40, 0x800, 0x2000, 0xFFFF)))]),
        lambda: _archive([_Member(name, rows, size=2**32 - 1, packed=2**32 - 1, extra=zip64)]),
        lambda: _archive([_Member(name, rows, extra=struct.pack("<HH", 1, random.choice((0, 8, 60_000))))]),
        lambda: _archive([_rows()], shift=random.choice((-1, 1, -(2**31), 2**31, 1000))),
        lambda: _archive([_rows()], entries=random.choice((0, 2, 0xFFFF))),
        lambda: b"junk" * random.choice((1, 100_000)) + _archive([_rows()]),
        lambda: _archive([_rows()]) + b"junk" * random.choice((1, 20_000)),
        lambda: _archive([_Member(b"\xff\xfe\x80.jsonl", rows, flags=random.choice((0, 0x800)))]),
    )
    return File("lying", random.choice(ways)())


def bomb(random: Random) -> File:
    """Gigabytes in a member, members that share their bytes, archives in archives."""
    fill = random.choice((b"\0", b"\n", b'{"text": "a"}\n', b'{"text": "' + b"a" * 100_000 + b'"}\n'))
    size = random.choice((64, 256, 1024)) * _MIB
    kernel = _kernel(fill, size)
    declared = random.choice((size, 10, 2**32 - 1))
    name = random.choice((b"rows.jsonl", b"rows.json", b"rows.csv", b"rows.parquet"))
    member = _Member(name, kernel, method=8, size=declared)
    inner = _archive([member])
    ways = (
        lambda: _archive([member]),
        lambda: _archive([_Member(b"%d.jsonl" % n, kernel, method=8, size=size) for n in range(500)], overlap=True),
        lambda: _archive(
            [_rows(), *(_Member(b"%d.png" % n, kernel, method=8) for n in range(2000))][::-1], overlap=True
        ),
        lambda: zipped({f"{number}.zip": inner for number in range(10)}),
        lambda: zipped({"rows.jsonl": zipped({"rows.jsonl": inner})}),
        lambda: zipped({"rows.jsonl.gz": _gzipped(kernel, size)}),
    )
    return File(f"{size // _MIB} MiB", random.choice(ways)())


def many_members(random: Random) -> File:
    """A directory of tens of thousands of members."""
    count = random.choice((1000, 20_000, 100_000))
    nothing = [_Member(b"images/%d.png" % number, b"") for number in range(count)]
    return File(f"{count} members", _archive([_rows(), *nothing], overlap=random.random() < 0.3))


def broken(random: Random) -> File:
    """A sound archive with changed bytes, most in its directory."""
    content = bases()["images.zip"]
    start = content.find(b"PK\x01\x02") if random.random() < 0.7 else 0
    return File("images.zip", flip(random, content, random.choice((1, 2, 8)), start))


@lru_cache(maxsize=16)
def _kernel(fill: bytes, size: int) -> bytes:
    # A block that is flushed in full stands alone, so the same bytes may follow each other.
    pack = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = pack.compress(fill * (16 * _MIB // len(fill))) + pack.flush(zlib.Z_FULL_FLUSH)
    return block * (size // (16 * _MIB)) + pack.flush()


def _gzipped(kernel: bytes, size: int) -> bytes:
    return b"\x1f\x8b\x08" + bytes(7) + kernel + struct.pack("<II", 0, size % 2**32)


def _deflated(data: bytes) -> bytes:
    pack = zlib.compressobj(9, zlib.DEFLATED, -15)
    return pack.compress(data) + pack.flush()
