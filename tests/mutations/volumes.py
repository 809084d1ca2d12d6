"""Much of something: rows, one row, one value."""

from random import Random

from mutations.mutant import File

_CHAT = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'


def tiny_rows(random: Random) -> File:
    """Hundreds of thousands of rows that are almost nothing."""
    row = random.choice(
        (b"{}", b"1", b"[]", b"x", b'{"text":"a"}', b"\0", b'{"text":1}', b'{"a":1}', b'"', b"{", _CHAT)
    )
    count = random.choice((1001, 20_000, 300_000))
    if random.random() < 0.3:
        return File("tiny rows of an array", b"[" + b",".join([row] * count) + b"]")
    return File("tiny rows", (row + b"\n") * count)


def long_line(random: Random) -> File:
    """One line of many megabytes, sound or not."""
    size = random.choice((1, 5, 17, 40)) * 1024 * 1024
    ways = (
        lambda: b'{"text": "' + b"a" * size + b'"}\n',
        lambda: b"a" * size,
        lambda: b'{"text": "' + b"a" * size,
        lambda: b'{"text": "b"}\n' + b"\0" * size + b'\n{"text": "c"}\n',
        lambda: b'{"messages": [' + b'{"role": "user", "content": "a"},' * (size // 34) + b"{}]}",
        lambda: b"[" * size,
        lambda: b'{"text": ' + b"1" * size + b"}\n",
        lambda: b'{"text": "' + b"\\u00e9" * (size // 6) + b'"}\n',
    )
    return File("one line", random.choice(ways)())


def many_turns(random: Random) -> File:
    """A conversation of tens of thousands of turns, or parts, or tools."""
    count = random.choice((5000, 50_000))
    turn = b'{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}'
    part = b'{"type": "text", "text": "a"}'
    tool = b'{"type": "function", "function": {"name": "f%d", "parameters": {}}}'
    ways = (
        lambda: b'{"messages": [' + b", ".join([turn] * count) + b"]}\n",
        lambda: b'{"messages": [{"role": "user", "content": [' + b", ".join([part] * count) + b"]}]}\n",
        lambda: b'{"tools": [' + b", ".join(tool % n for n in range(count)) + b"], " + _CHAT[1:] + b"\n",
        lambda: b'{"messages": [{"role": "assistant", "tool_calls": [' + b", ".join([b"{}"] * count) + b"]}]}\n",
    )
    return File("many turns", random.choice(ways)())


def alike(random: Random) -> File:
    """Rows that are all equal, or equal but for a letter; secrets and addresses in each."""
    count = random.choice((3000, 30_000))
    text = random.choice(
        (b"again", b"sk-proj-" + b"a1B2" * 12, b"ann@example.org", b"4111 1111 1111 1111", b"AKIAIOSFODNN7EXAMPLE")
    )
    every = random.choice((0, 1, 7))
    rows = (b'{"prompt": "%s %d", "completion": "b"}\n' % (text, n % every if every else n) for n in range(count))
    return File("alike", b"".join(rows))


def slow_to_scan(random: Random) -> File:
    """Texts on which a careless pattern takes for ever."""
    piece = random.choice(
        (b"a", b"a@", b"a.", b"1-", b"1 ", b"0", b"+1 (", b"-----BEGIN ", b"eyJ", b"::", b"sk-", b"ghp_", b"<|", b"@a.")
    )
    size = random.choice((2000, 50_000, 1_000_000, 8_000_000))
    return File("one long word", b'{"text": "' + piece * (size // len(piece)) + b'!"}\n')
