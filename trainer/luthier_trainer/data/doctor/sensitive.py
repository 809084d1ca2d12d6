"""What should not be learnt by heart: secrets and personal data, as far as patterns tell.

Nothing that is found is ever repeated in a finding. A cheap look at a row's bytes comes first, so that rows without
long words, long numbers and @ cost next to nothing; the patterns are linear in the length of the text.
"""

import re
import string
from collections.abc import Callable, Iterator
from itertools import islice, pairwise

from luthier_trainer.data.doctor.texts import texts
from luthier_trainer.data.problem import Level, Problem
from luthier_trainer.data.records import Record

MAX_CANDIDATES = 1_000
"""Places of one kind that are looked at in one text."""

_SECRET_FIX = "Remove it, and revoke it if it is real: a model can repeat what it was trained on."
_PERSONAL_FIX = "Remove it or write something made up in its place, if it is about a real person."

# The shortest key below is 20 of these characters, so is the longest word of a private key; of numbers the shortest has
# 9 digits, however they are grouped.
_WORD = bytes(119 if chr(byte) in string.ascii_letters + string.digits + "_-" else 32 for byte in range(256))
_LONG_WORD = b"w" * 20
# What every assignment of a secret holds, in small letters and without what joins words: see _ASSIGNMENT.
_SMALL = bytes(range(256)).lower()
_ASSIGNED = (b"passw", b"pwd", b"secret", b"apikey", b"token")
_DIGIT = bytes(48 if chr(byte) in string.digits else 32 for byte in range(256))
_LONG_NUMBER = b"0" * 9


def may_be_sensitive(row: bytes) -> bool:
    """Whether a row in canonical JSON may hold anything of the below."""
    return b"@" in row or _has_long_word(row) or _has_long_number(row) or _may_assign(row)


def _may_assign(text: bytes) -> bool:
    small = text.translate(_SMALL, b"_-")
    return any(name in small for name in _ASSIGNED)


def _has_long_word(text: bytes) -> bool:
    return _LONG_WORD in text.translate(_WORD)


def _has_long_number(text: bytes) -> bool:
    return _LONG_NUMBER in text.translate(_DIGIT, b" -.()/")


def sensitive(record: Record) -> Iterator[Problem]:
    """What a row may hold that it should not: one finding for secrets, one for personal data. Each names every kind and
    where it is first."""
    secrets: dict[str, str] = {}
    personal: dict[str, str] = {}
    for place, text in texts(record):
        encoded = text.encode(errors="replace")
        if _has_long_word(encoded):
            for kind, literal, has in _KEYS:
                if kind not in secrets and literal in text and has(text):
                    secrets[kind] = place
        if _PASSWORD not in secrets and "://" in text and _has_url_with_password(text):
            secrets[_PASSWORD] = place
        # A key of a known kind is named as what it is, and not once more for standing in an assignment.
        if not secrets and _may_assign(encoded) and _has_assignment(text):
            secrets[_ASSIGNED_SECRET] = place
        if _EMAIL not in personal and _has_email(text):
            personal[_EMAIL] = place
        if _has_long_number(encoded):
            for kind, has in _NUMBERS:
                if kind not in personal and has(text):
                    personal[kind] = place
    if secrets:
        yield Problem("POSSIBLE_SECRET", f"The row seems to hold {_named(secrets)}.", _SECRET_FIX, Level.WARNING)
    if personal:
        yield Problem("POSSIBLE_PERSONAL_DATA", f"The row seems to hold {_named(personal)}.", _PERSONAL_FIX, Level.NOTE)


def _named(found: dict[str, str]) -> str:
    kinds = [f"{kind} ({place})" for kind, place in found.items()]
    return kinds[0] if len(kinds) == 1 else f"{', '.join(kinds[:-1])} and {kinds[-1]}"


def _like(pattern: str, looks: Callable[[str], bool] | None = None) -> Callable[[str], bool]:
    """Whether a text has a match that looks random: placeholders such as sk-your-key-here and AKIA...EXAMPLE do not."""
    compiled = re.compile(rf"(?<![A-Za-z0-9_-])(?:{pattern})(?![A-Za-z0-9])")
    is_random = looks or _looks_random

    def has(text: str) -> bool:
        return any(is_random(match[0]) for match in islice(compiled.finditer(text), MAX_CANDIDATES))

    return has


def _looks_random(key: str) -> bool:
    tail = key[4:]
    return (
        len(set(tail)) > 8
        and any(character.isdigit() for character in tail)
        and any(character.isupper() for character in tail)
        and "EXAMPLE" not in key
    )


def _is_aws_key(key: str) -> bool:
    """Such a key may be of capitals alone."""
    return len(set(key[4:])) > 8 and not any(word in key for word in _MADE_UP_IN_CAPITALS)


def _is_mixed(key: str) -> bool:
    """Whether a key that needs no digits looks random: its letters of both cases are mixed more evenly than in words
    written together."""
    body = key[4:]
    if len(set(body)) <= 8 or any(word in key for word in _MADE_UP_IN_CAPITALS):
        return False
    capitals = sum(character.isupper() for character in body)
    small = sum(character.islower() for character in body)
    digits = len(body) - capitals - small
    # Of 34 random letters fewer than a fifth are of one case once in ten thousand.
    return min(capitals, small) * 5 > len(body) or digits * 10 > len(body)


_MADE_UP_IN_CAPITALS = ("EXAMPLE", "ABCDEFGH", "YOUR", "FAKE", "SAMPLE", "DUMMY", "KEYHERE", "SECRET")
_ASSIGNED_SECRET = "a password or key that is assigned"
_ASSIGNMENT = re.compile(
    r"(?:passw(?:or)?d|pwd|secret|secret[_-]?key|api[_-]?key|(?:access|auth|secret|bearer|refresh|api)[_-]?token)"
    r"\\?[\"']?\s{0,3}(?::=|=>|=|:)\s{0,3}\\?[\"']?([^\s\"'`,;(){}\[\]<>\\]{10,200}+)(?![(\[<{])",
    re.ASCII | re.IGNORECASE,
)
# The words of values that are made up.
_MADE_UP = re.compile(
    r"p[a@4][s$5]{2}|pwd|secret|your|example|sample|dummy|fake|test|demo|change|placeholder|redacted|token|key|admin"
    r"|user|xxx|\*\*|\.\.|1234|4321|abcd|qwert|^[$%*&/~.]|://",
    re.IGNORECASE,
)
_CLASSES = bytes(
    100
    if chr(byte) in string.digits
    else 117
    if chr(byte) in string.ascii_uppercase
    else 108
    if chr(byte) in string.ascii_lowercase
    else 46
    for byte in range(256)
)


def _has_assignment(text: str) -> bool:
    return any(_is_random(match[1]) for match in islice(_ASSIGNMENT.finditer(text), MAX_CANDIDATES))


def _is_random(value: str) -> bool:
    """Whether letters and digits alternate as nobody writes them by hand."""
    # What joins words is no sign of chance.
    kinds = value.encode(errors="replace").translate(_CLASSES, b"_.-/")
    changes = sum(before != after for before, after in pairwise(kinds))
    letters = sum(kind in b"ul" for kind in kinds)
    return (
        b"d" in kinds
        and letters >= 3
        and (b"u" in kinds or len(kinds) >= 16)
        and len(set(value)) >= 8
        and changes >= max(4, len(kinds) // 3)
        and _MADE_UP.search(value) is None
    )


_PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----\s*[A-Za-z0-9+/=:\s\\-]{60}")
_PASSWORD = "a URL with a password"
_URL = re.compile(r"://[^\s/:@\"'<>]{1,100}:([^\s/@\"'<>]{3,200})@[A-Za-z0-9\[]")
_NO_PASSWORDS = {"password", "passwd", "pass", "pwd", "secret", "token", "pw", "your_password", "your-password", "xxx"}


def _has_url_with_password(text: str) -> bool:
    for match in islice(_URL.finditer(text), MAX_CANDIDATES):
        password = match[1]
        if password.lower() not in _NO_PASSWORDS and password[0] not in "${*[%" and len(set(password)) > 2:
            return True
    return False


# The name of each kind, a text that every such key holds, and whether a text has one.
_KEYS: tuple[tuple[str, str, Callable[[str], bool]], ...] = (
    ("a private key", "PRIVATE KEY", lambda text: _PRIVATE_KEY.search(text) is not None),
    ("an AWS access key", "AKIA", _like("AKIA[A-Z2-7]{16}", _is_aws_key)),
    ("an AWS session key", "ASIA", _like("ASIA[A-Z2-7]{16}", _is_aws_key)),
    ("a Google API key", "AIza", _like("AIza[0-9A-Za-z_-]{35}")),
    ("a GitHub token", "gh", _like("gh[pousr]_[A-Za-z0-9]{36,251}|github_pat_[A-Za-z0-9_]{22,251}", _is_mixed)),
    ("a GitLab token", "glpat-", _like("glpat-[A-Za-z0-9_-]{20,64}")),
    ("a Slack token", "xox", _like("xox[abeoprs]-[A-Za-z0-9-]{16,250}")),
    ("an Anthropic key", "sk-ant-", _like("sk-ant-[A-Za-z0-9_-]{20,200}")),
    ("an OpenAI key", "sk-", _like("sk-(?!ant-)[A-Za-z0-9_-]{20,200}")),
    ("a Stripe key", "k_live_", _like("[sr]k_live_[A-Za-z0-9]{20,200}")),
    ("a Hugging Face token", "hf_", _like("hf_[A-Za-z0-9]{30,60}", _is_mixed)),
    ("a JSON Web Token", "eyJ", _like(r"eyJ[A-Za-z0-9_-]{10,4000}\.eyJ[A-Za-z0-9_-]{10,8000}\.[A-Za-z0-9_-]{10,2000}")),
)


_EMAIL = "an e-mail address"
_LOCAL_PART = re.compile(r"[A-Za-z0-9._%+-]{1,64}\Z")
_DOMAIN = re.compile(r"(?:[A-Za-z0-9-]{1,63}\.){1,8}([A-Za-z]{2,24})(?![\w-])")
_IN_URL = re.compile(r"://[^\s/]{0,200}\Z")
_NO_PERSONS = re.compile(
    r"git|no-?reply|example|user(?:name)?|email|name|someone|your[._-]?(?:email|name)|(?:john|jane)[._]?doe",
    re.IGNORECASE,
)
# Domains that stand for any: what comes before the top level.
_NO_DOMAINS = re.compile(
    r"(?:.*\.)?(?:example[\w-]*|(?:your|my|the|abc|xyz|some|a)?-?_?(?:company|domain|email|website|organization)|xyz|abc"
    r"|your-?(?:site|mail|school|business|store)|test|sample|placeholder)\.(?:com|org|net|co|io|edu|co\.uk)",
    re.IGNORECASE,
)
_NO_TOP_LEVELS = {
    "example",
    "test",
    "invalid",
    "localhost",
    "png",
    "jpg",
    "jpeg",
    "gif",
    "svg",
    "webp",
    "css",
    "js",
    "py",
}


def _has_email(text: str) -> bool:
    at = -1
    for _ in range(MAX_CANDIDATES):
        at = text.find("@", at + 1)
        if at < 0:
            return False
        domain = _DOMAIN.match(text, at + 1)
        if domain is None or domain[1].lower() in _NO_TOP_LEVELS or _is_made_up(domain[0]):
            continue
        before = text[max(0, at - 200) : at]
        local = _LOCAL_PART.search(before)
        if local is not None and not _NO_PERSONS.fullmatch(local[0]) and not _IN_URL.search(before):
            return True
    return False


def _is_made_up(domain: str) -> bool:
    return domain.lower().startswith("example.") or _NO_DOMAINS.fullmatch(domain) is not None


# What may not stand before a match comes after its first character, so that re looks for that one character fast.
_PHONE = re.compile(
    # International, or North American (555 stands for numbers that are made up).
    r"[+(2-9](?<![\w.+].)(?:(?<=\+)[1-9](?:[ .\-()]{0,2}\d){8,14}"
    r"|(?:(?<=\()[2-9]|(?<=\d))\d\d\)?[ .\-](?!555)[2-9]\d\d[ .\-]\d{4})(?![\w\-]|\.\d)",
    re.ASCII,
)
_CARD = re.compile(r"[2-6](?<![\w.\-].)(?:[ \-]?\d){12,18}(?![\w\-]|\.\d)", re.ASCII)
# Visa, Mastercard, American Express, Diners Club, JCB, Discover: how their numbers begin, and how long they are.
_CARD_ISSUER = re.compile(
    r"4(?:\d{15}|\d{18})|(?:5[1-5]|2[2-7])\d{14}|3[47]\d{13}|3(?:0[0-5]|[68]\d)\d{11}|(?:35|6[05])\d{14}",
    re.ASCII,
)
_IBAN = re.compile(r"[A-Z](?<![A-Za-z0-9].)[A-Z][0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])")
_SSN = re.compile(
    r"[0-8](?<![\w.\-].)\d\d-\d\d-\d{4}(?<!000-.{7})(?<!666-.{7})(?<!00-.{4})(?<!0000)"
    r"(?<!123-45-6789)(?<!078-05-1120)(?![\w\-]|\.\d)",
    re.ASCII,
)


# Numbers that are written without groups: +1 and +7 have ten digits after them, few countries more than 12 with their
# own; 28, 83 and 89 are no codes. Longer ones are terms of a sum.
_UNGROUPED = re.compile(r"[17]\d{10}|(?!28|83|89)[2-689]\d{9,11}|(?:49|55|62|86)\d{11}", re.ASCII)
_LONGEST_GROUP = 11
_DIGITS = re.compile(r"\d+", re.ASCII)
_IN_SUM_BEFORE = re.compile(r"[\d)=]\s?\Z")
_IN_SUM_AFTER = re.compile(r"\s?[=+*/]")


def _has_phone(text: str) -> bool:
    for match in islice(_PHONE.finditer(text), MAX_CANDIDATES):
        number = match[0]
        if number[0] != "+":
            return True
        groups = _DIGITS.findall(number)
        if len(groups) > 1:
            if max(map(len, groups)) <= _LONGEST_GROUP:
                return True
        elif (
            _UNGROUPED.fullmatch(groups[0])
            and not _IN_SUM_BEFORE.search(text[max(0, match.start() - 2) : match.start()])
            and not _IN_SUM_AFTER.match(text, match.end())
        ):
            return True
    return False


def _has_card(text: str) -> bool:
    for match in islice(_CARD.finditer(text), MAX_CANDIDATES):
        digits = match[0].replace(" ", "").replace("-", "")
        if _CARD_ISSUER.fullmatch(digits) and len(set(digits)) > 3 and _luhn(digits):
            return True
    return False


def _luhn(digits: str) -> bool:
    """ISO/IEC 7812-1, annex B."""
    total = sum(int(digit) for digit in digits[-1::-2])
    return (total + sum(sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])) % 10 == 0


def _has_iban(text: str) -> bool:
    for match in islice(_IBAN.finditer(text), MAX_CANDIDATES):
        # What follows an IBAN in capitals is taken for a part of it: whole groups go until the sum is right.
        groups = match[0].split(" ")
        while groups:
            account = "".join(groups)
            if 15 <= len(account) <= 34 and _mod_97(account):
                return True
            groups.pop()
    return False


def _mod_97(account: str) -> bool:
    """ISO 13616: the check digits of an IBAN."""
    return int("".join(str(int(character, 36)) for character in account[4:] + account[:4])) % 97 == 1


_NUMBERS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("a phone number", _has_phone),
    ("a credit card number", _has_card),
    ("an IBAN", _has_iban),
    ("a US social security number", lambda text: _SSN.search(text) is not None),
)
