"""Images that are none, lie about their size, or stand where nobody may look."""

import base64
import json
import struct
import zlib
from random import Random

from mutations.bases import bases, zipped
from mutations.mutant import MARK, SECRET_PATH, File

_PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAQAAAAECAIAAAAmkwkpAAAAEElEQVR42mO4IycHRwzEcQDTIxGB/NE2PAAAAABJRU5ErkJggg=="
)


def addresses(random: Random) -> File:
    """Where an image is said to be: other files, other machines, data that is broken."""
    encoded = base64.b64encode(_picture(random)).decode()
    addresses = (
        *(
            f"../{SECRET_PATH}",
            f"../../../{SECRET_PATH}",
            "/etc/passwd",
            "file:///etc/passwd",
            f"pictures/../../{MARK}",
        ),
        *(
            "http://169.254.169.254/latest/meta-data",
            "http://127.0.0.1:1/a.png",
            "https://[::1]/a.png",
            "ftp://a/b.png",
        ),
        *("", " ", "\0", "a\0.png", "a" * 100_000, "C:\\a.png", "\\\\host\\share\\a.png", "~/.ssh/id_rsa", "pictures/"),
        *("data:", "data:,", "data:image/png;base64,", "data:image/png;base64,!!!!", "data:image/png,abc"),
        *("data:text/html;base64,PGI+", "data:image/svg+xml;base64,PHN2Zz4=", "data:image/png;base64," + "A" * 99_999),
        *(f"data:image/png;base64,{encoded}", f"data:image/jpeg;base64,{encoded}", f"DATA:IMAGE/PNG;BASE64,{encoded}"),
        f"data:image/png;base64,{encoded[: random.randint(0, len(encoded))]}",
        f"data:image/png;{'charset=utf-8;' * random.choice((1, 10_000))}base64,{encoded}",
    )
    url = random.choice(addresses)
    part = random.choice(
        (
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "image_url", "image_url": url},
            {"type": "image", "image": url},
            {"type": "input_image", "image_url": url},
            {"type": "image"},
        )
    )
    row = {
        "messages": [
            {"role": "user", "content": [part, {"type": "text", "text": "a"}]},
            {"role": "assistant", "content": "b"},
        ]
    }
    if random.random() < 0.3:
        row = {
            "messages": [{"role": "user", "content": "<image>a"}, {"role": "assistant", "content": "b"}],
            "images": [url],
        }
    return _packed(random, json.dumps(row).encode() + b"\n")


def pictures(random: Random) -> File:
    """An archive whose pictures are broken, huge by their headers, or something else."""
    row = {
        "messages": [{"role": "user", "content": "<image>a"}, {"role": "assistant", "content": "b"}],
        "images": ["a.png"],
    }
    members = {"rows.jsonl": json.dumps(row).encode() + b"\n", "a.png": _picture(random)}
    if random.random() < 0.2:
        members["A.PNG"] = b"other"
    return File("a.png", zipped(members))


def _packed(random: Random, rows: bytes) -> File:
    if random.random() < 0.5:
        return File("an address", rows)
    return File("an address in an archive", zipped({"rows.jsonl": rows, "pictures/a.png": _PNG}))


def _picture(random: Random) -> bytes:
    side = random.choice((0, 1, 30_000, 2**31 - 1, 2**32 - 1))
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    lying = (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + b"IHDR"
        + header
        + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    )
    jpeg = b"\xff\xd8\xff\xc0\0\x11\x08\xff\xff\xff\xff\x03" + random.randbytes(200)
    return random.choice(
        (
            *(
                _PNG,
                _PNG[: random.randrange(len(_PNG))],
                lying,
                lying + _PNG[33:],
                jpeg,
                b"",
                b"GIF89a",
                b"BM",
                b"RIFF\0\0\0\0WEBP",
            ),
            *(b"<svg onload='x()'/>", bases()["messages.jsonl"], random.randbytes(1000), bytes(2_000_000)),
        )
    )
