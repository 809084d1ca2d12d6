"""Text that went through the wrong decoder, or holds characters that no one typed."""

import re
from collections.abc import Iterator

from luthier_trainer.data.doctor.texts import texts
from luthier_trainer.data.problem import Level, Problem
from luthier_trainer.data.records import Record

_WRONG_ENCODING = "text that was decoded with the wrong encoding (such as Ã© for é)"
# UTF-8 read as Windows-1252: quotes and dashes, Latin letters, signs after a stray Â, emoji, and Cyrillic, which needs
# two in a row. No language has these pairs; « and » may follow a capital.
_MISREAD = re.compile(
    "[âÃÂðÐÑ](?:(?<=â)€|(?<=ð)Ÿ|(?<=Â)[\u00a0-\u00aa\u00ac-\u00ba\u00bc-\u00bf]"
    "|(?<=Ã)[\u00a1-\u00aa\u00ac-\u00ba\u00bc-\u00bf\u0152-\u0192\u02c6\u201a\u201e-\u2021\u2030\u20ac]"
    "|(?<=[ÐÑ])[\u0080-\u00bf\u0152-\u02dc\u2013-\u2122][ÐÑ][\u0080-\u00bf\u0152-\u02dc\u2013-\u2122])"
)
_KINDS = (
    ("replacement characters (U+FFFD), where something could not be decoded", re.compile("\ufffd")),
    (
        "backspaces or form feeds, as \\begin and \\frac become when a backslash is not escaped",
        re.compile("[\b\f](?=[a-z])"),
    ),
    ("control characters", re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f]")),
    ("private-use characters, which have no meaning", re.compile("[\ue000-\uf8ff\U000f0000-\U0010ffff]")),
    ("byte order marks or noncharacters (U+FEFF, U+FFFE, U+FFFF)", re.compile("[\ufeff\ufffe\uffff]")),
    (
        "invisible characters that hide text or show it in another order",
        # Overrides of direction; tag characters but in a flag, which begins with the black flag.
        re.compile("[\u202d\u202e\U000e0020-\U000e007f](?<![\U0001f3f4\U000e0020-\U000e007e][\U000e0020-\U000e007f])"),
    ),
)
_ANY_ASCII = re.compile("[\x00-\x08\x0b\f\x0e-\x1f\x7f]")
_ANY_KIND = re.compile(
    "[\x00-\x08\x0b\f\x0e-\x1f\x7f-\x9f\u202d\u202e\ue000-\uf8ff\ufeff\ufffd-\uffff\U000e0020-\U000e007f\U000f0000-\U0010ffff]"
)
_FIX = (
    "Decode the source as what it is (mostly UTF-8, or Windows-1252) and write it anew as UTF-8, or clean these rows."
)
# The same in UTF-8, as far as bytes tell: what passes is looked at again as text.
_ODD_BYTES = re.compile(
    rb"\xef(?:\xbf[\xbd-\xbf]|\xbb\xbf|[\x80-\xa3])|\xee|\xc2[\x80-\x9f]|\xe2\x80[\xad\xae]"
    rb"|\xf3(?:[\xb0-\xbf]|\xa0[\x80\x81])|\xf4"
    rb"|\xc3(?:\x83[\xc2\xc5\xc6\xcb\xe2]|\x82\xc2|\xa2\xe2\x82\xac|\xb0\xc5|[\x90\x91][\xc2\xc5\xc6\xcb\xe2])"
)
_BACKSPACE = re.compile(rb"(?<!\\)\\(?:\\\\)*[bf]")


def may_be_odd(row: bytes) -> bool:
    """Whether a row in canonical JSON may hold anything odd. Costs little for the common row."""
    if b"\\" in row:
        if b"\\u00" in row:
            return True
        if (b"\\b" in row or b"\\f" in row) and _BACKSPACE.search(row):
            return True
    return b"\x7f" in row or (not row.isascii() and _ODD_BYTES.search(row) is not None)


def odd_encoding(record: Record) -> Iterator[Problem]:
    """What is odd about the characters of a row: at most one finding, which names each kind and where it is first."""
    found: dict[str, str] = {}
    for place, text in texts(record):
        is_ascii = text.isascii()
        if _WRONG_ENCODING not in found and not is_ascii and _MISREAD.search(text):
            found[_WRONG_ENCODING] = place
        if (_ANY_ASCII if is_ascii else _ANY_KIND).search(text):
            for kind, pattern in _KINDS:
                if kind not in found and pattern.search(text):
                    found[kind] = place
    if found:
        kinds = "; ".join(f"{kind} ({place})" for kind, place in found.items())
        yield Problem("ODD_ENCODING", f"The row holds {kinds}.", _FIX, Level.WARNING)
