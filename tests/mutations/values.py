"""JSON whose values are not what they should be."""

import json
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

from mutations.bases import Row, lines, pick, rows
from mutations.mutant import File

_JSON = (".jsonl", ".json")

# A placeholder in the tree becomes text that json would not write.
_PLACE = "\ue000"


def wrong_type(random: Random) -> File:
    """Some fields hold something else."""
    name, many = _rows(random)
    return File(name, _written(random, name, [_changed(random, row, _odd) for row in many]))


def huge_number(random: Random) -> File:
    """Numbers that nothing holds."""
    name, many = _rows(random)
    return File(name, _written(random, name, [_changed(random, row, _number) for row in many]))


def surrogate(random: Random) -> File:
    """Halves of characters, NUL bytes, controls, what turns text around."""
    name, many = _rows(random)
    return File(name, _written(random, name, [_changed(random, row, _string) for row in many]))


def nested(random: Random) -> File:
    """Values in values in values, up to 100,000 of them."""
    name, many = _rows(random)
    many[0] = _changed(random, many[0], _deep)
    return File(name, _written(random, name, many))


def nested_whole(random: Random) -> File:
    """A file that is nothing but depth."""
    depth = random.choice((200, 1100, 10_000, 100_000, 1_000_000))
    opening, closing = random.choice(((b"[", b"]"), (b'{"a":', b"}"), (b'[{"messages":', b"}]")))
    return File("depth", opening * depth + b"1" * random.randint(0, 1) + closing * random.choice((0, 1, depth)))


def missing_key(random: Random) -> File:
    """Keys that are gone, misspelt, or of another format."""
    name, many = _rows(random)
    for _ in range(random.randint(1, 3)):
        holders = [place for place, _, _ in _places(random.choice(many)) if isinstance(place, dict)]
        holder: Row = random.choice(holders)
        if not holder:
            continue
        key = random.choice(list(holder))
        value = holder.pop(key)
        if random.random() < 0.6:
            holder[random.choice((key.upper(), key + " ", " " + key, key + "s", "", "text", "label", "__proto__"))] = (
                value
            )
    return File(name, _written(random, name, many))


def duplicate_key(random: Random) -> File:
    """The same key twice in an object."""
    name, many = _rows(random)
    text = _written(random, name, many).decode()
    key = random.choice(("messages", "role", "content", "prompt", "text", "from", "value", "conversations"))
    value = random.choice(("null", "[]", "1", '"again"', "{}"))
    for _ in range(random.randint(1, 3)):
        at = random.choice([at for at, letter in enumerate(text) if letter == "{"]) + 1
        text = f'{text[:at]}"{key}": {value}, {text[at:]}'
    return File(name, text.encode())


def enormous_key(random: Random) -> File:
    """Keys of a megabyte, of control characters, and tens of thousands of them."""
    name, many = _rows(random)
    row = many[0]
    letter = random.choice(("k", "\u0000", "é", "\\", '"', "\u202e", "😀"))
    if random.random() < 0.5:
        row[letter * random.choice((300, 70_000, 3_000_000))] = 1
    else:
        row |= {f"{letter}{number}": number for number in range(random.choice((1000, 50_000)))}
    return File(name, _written(random, name, many))


def wrong_order(random: Random) -> File:
    """Roles in any order, none, or of anything."""
    name, many = _rows(random)
    for row in many:
        for field in ("messages", "conversations", "chosen", "rejected", "prompt", "completion"):
            turns = row.get(field)
            if isinstance(turns, list):
                way = random.randrange(5)
                if way == 0:
                    random.shuffle(turns)
                elif way == 1:
                    turns.clear()
                elif way == 2:
                    turns *= random.choice((2, 50, 2000))
                elif way == 3:
                    turns.insert(random.randint(0, len(turns)), _odd(random))
                elif turns and isinstance(turn := random.choice(turns), dict):
                    turn["role" if "role" in turn else "from"] = random.choice(_ROLES)
    return File(name, _written(random, name, many))


def mixed(random: Random) -> File:
    """Rows of several formats in one file."""
    many = [row for _ in range(3) for row in rows(*pick(random, *_JSON))]
    random.shuffle(many)
    return File("several", lines(many))


def not_rows(random: Random) -> File:
    """JSON that holds no rows, and JSON with more behind it."""
    name, many = _rows(random)
    text = json.dumps(many).encode()
    whole: tuple[Callable[[], bytes], ...] = (
        lambda: json.dumps({"data": many}).encode(),
        lambda: json.dumps({str(number): row for number, row in enumerate(many)}, indent=2).encode(),
        lambda: text + text,
        lambda: text[:-1] + b",]",
        lambda: text.replace(b"},", b"}", 1),
        lambda: text + b"\n" + lines(many),
        lambda: lines(many) + text,
        lambda: b"[" + text + b"]",
        lambda: b"\n".join(json.dumps(row, indent=2).encode() for row in many),
        lambda: b"\n".join(json.dumps(json.dumps(row)).encode() for row in many),
        lambda: text.replace(b'"', b"'"),
        lambda: b"// a comment\n" + text,
        lambda: b"data = " + text,
    )
    return File(name, random.choice(whole)())


_ROLES: tuple[Any, ...] = (
    *("", " ", "User", "ASSISTANT", "bot", "function", "tool", "developer", "observation", "system", "ipython"),
    *("assistant\u0000", "user" * 10_000, None, 1, True, [], {}, ["user"], "__class__", "<|im_start|>"),
)


def _rows(random: Random) -> tuple[str, list[Row]]:
    name, content = pick(random, *_JSON)
    return name, rows(name, content)


def _places(value: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Every (holder, key, value) of a tree, and the tree as a holder of nothing."""
    if isinstance(value, dict):
        yield value, None, None
        for key, each in value.items():
            yield value, key, each
            yield from _places(each)
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield value, index, each
            yield from _places(each)


def _changed(random: Random, row: Row, make: Callable[[Random], Any]) -> Row:
    places = [(holder, key) for holder, key, _ in _places(row) if key is not None]
    if places and random.random() < 0.9:
        holder, key = random.choice(places)
        holder[key] = make(random)
    else:
        row[random.choice(("messages", "prompt", "weight", "tools", "label", "extra"))] = make(random)
    return row


def _raw(text: str) -> str:
    return f"{_PLACE}{text}{_PLACE}"


def _written(random: Random, name: str, many: list[Any]) -> bytes:
    ascii_only = random.random() < 0.5
    if name.endswith(".json"):
        text = json.dumps(many, ensure_ascii=ascii_only)
    else:
        text = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in many)
    place = json.dumps(_PLACE, ensure_ascii=ascii_only)[1:-1]
    pieces = text.split(place)
    # Every second piece was written by `_raw`, inside of quotes, and escaped by json.
    for at in range(1, len(pieces), 2):
        pieces[at - 1] = pieces[at - 1].removesuffix('"')
        pieces[at] = json.loads(f'"{pieces[at]}"')
        if at + 1 < len(pieces):
            pieces[at + 1] = pieces[at + 1].removeprefix('"')
    return "".join(pieces).encode("utf-8", "surrogatepass")


def _odd(random: Random) -> Any:
    made: tuple[Callable[[], Any], ...] = (
        lambda: random.choice(
            (None, True, False, 0, -1, 1.5, 2**53, "", " ", "\n", [], {}, [None], [[]], [{}], {"": None})
        ),
        lambda: random.choice(("text", "system", "0", "null", "<|im_end|>", "</s>", "{{ 1 }}", "${x}", "%s", "\u202e")),
        lambda: {"type": random.choice(("text", "image", "image_url", "video", "", None, 3)), "text": _string(random)},
        lambda: [{"type": "text", "text": random.choice((None, 1, "a", [])), "image_url": {"url": 5}}],
        lambda: "word " * random.choice((10, 1000, 200_000)),
        lambda: [_odd(random) for _ in range(random.choice((1, 3)))],
        lambda: _number(random),
        lambda: _string(random),
        lambda: [0] * random.choice((10, 100_000)),
        lambda: {
            "function": {"name": random.choice(("", None, 1)), "arguments": random.choice(("{", "[]", None, {"a": 1}))}
        },
    )
    return random.choice(made)()


def _number(random: Random) -> Any:
    texts = (
        *("1e999", "-1e999", "1e-999", "1" + "0" * 5000, "-" + "9" * 100_000, "0." + "0" * 100_000 + "1", "1E400"),
        *("NaN", "Infinity", "-Infinity", "-0", "-0.0", "01", "+1", "1.", ".5", "0x10", "1_000", "1e", "--1"),
        *(
            "9223372036854775807",
            "9223372036854775808",
            "-9223372036854775809",
            "18446744073709551616",
            "1e308",
            "5e-324",
        ),
    )
    return _raw(random.choice(texts))


def _string(random: Random) -> Any:
    texts = (
        *(
            '"\\ud800"',
            '"\\udc00\\ud800"',
            '"a\\ud83d"',
            '"\\u0000"',
            '"\\u0000" ',
            '"\\ufffe\\uffff"',
            '"\\u202e\\u200b"',
        ),
        *('"\\x41"', '"\\u12"', '"\\"', '"\\u{41}"', "'single'", '"' + "\\u0000" * 10_000 + '"', '"\x01\x02"', '"\t"'),
        '"' + "\u0301" * 50_000 + '"',
        '"' + "\\\\" * 50_000 + '"',
        '"\ud800"',
    )
    return _raw(random.choice(texts))


def _deep(random: Random) -> Any:
    depth = random.choice((60, 130, 300, 1030, 5000, 100_000))
    opening, closing = random.choice(
        (
            ("[", "]"),
            ('{"a":', "}"),
            ('[{"type":"text","text":', "}]"),
            ('{"content":[', "]}"),
            ('{"function":{"x":', "}}"),
        )
    )
    return _raw(opening * depth + "null" + closing * depth)
