"""Parquet, Arrow and CSV that are broken, odd, or made to take much."""

import datetime
import decimal
import struct
from random import Random
from typing import Any

import pyarrow as pa
from mutations.bases import arrow, bases, parquet, pick
from mutations.damage import flip
from mutations.mutant import File

_TABLES = (".parquet", ".arrow", ".arrows")


def flipped(random: Random) -> File:
    """Changed bytes, most in the metadata."""
    name, content = pick(random, *_TABLES)
    start = max(0, len(content) - 2000) if random.random() < 0.6 else 0
    return File(name, flip(random, content, random.choice((1, 1, 2, 5, 20)), start))


def cut(random: Random) -> File:
    """Footers that are cut off, and what was cut out of the middle."""
    name, content = pick(random, *_TABLES)
    if random.random() < 0.5:
        return File(name, content[: -random.randint(1, min(3000, len(content) - 1))])
    start = random.randrange(len(content))
    return File(name, content[:start] + content[start + random.choice((1, 4, 64, 4096)) :])


def lengths(random: Random) -> File:
    """Lengths that are huge or negative, wherever a length may stand."""
    name, content = pick(random, *_TABLES)
    value = random.choice((0, 1, -1, 2**31 - 1, -(2**31), 2**28, 0x7FFFFFF0, len(content)))
    changed = bytearray(content)
    if name.endswith(".parquet") and random.random() < 0.5:
        at = len(changed) - 8
    else:
        at = random.randrange(0, len(changed) - 8, 4)
    struct.pack_into("<i", changed, at, value)
    if random.random() < 0.3:
        struct.pack_into("<q", changed, at, value << 20)
    return File(name, bytes(changed))


def types(random: Random) -> File:
    """Columns of every type there is, in place of text."""
    columns: tuple[Any, ...] = (
        pa.array([b"\xff\xfe", b"\0"], pa.binary()),
        pa.array([b"ab", b"cd"], pa.binary(2)),
        pa.array([decimal.Decimal("1." + "3" * 37)] * 2, pa.decimal128(38, 37)),
        pa.array([decimal.Decimal("9" * 76)] * 2, pa.decimal256(76, 0)),
        pa.array([2**63 - 1, -(2**63)], pa.timestamp("ns")),
        pa.array([2**62, -(2**62)], pa.timestamp("s", tz="Europe/Nowhere")),
        pa.array([2**31 - 1, -(2**31)], pa.date32()),
        pa.array([datetime.timedelta(days=1)] * 2, pa.duration("us")),
        pa.array([None, None], pa.null()),
        pa.array([float("nan"), float("inf")], pa.float32()),
        pa.array([1, 2], pa.float16()),
        pa.array([2**64 - 1, 0], pa.uint64()),
        pa.array([[("k", "v")], []], pa.map_(pa.string(), pa.string())),
        pa.array([["a"], None], pa.large_list(pa.large_string())),
        pa.array([["a", "b"], ["c", None]], pa.list_(pa.string(), 2)),
        pa.array(["a", None], pa.string_view()),
        pa.array(["a", "b"]).dictionary_encode(),
        pa.array([{"x": {"y": [1]}}, None]),
        pa.array([[{"role": "user", "content": None}], [{"role": 1, "content": "a"}]][:1] * 2),
        pa.array([{"role": ["user"], "content": ["a", "b"]}, {"role": [], "content": None}]),
        pa.RunEndEncodedArray.from_arrays(pa.array([1, 2], pa.int32()), pa.array(["a", "b"])),
        pa.UnionArray.from_sparse(pa.array([0, 1], pa.int8()), [pa.array([1, 2]), pa.array(["a", "b"])]),
        pa.array([(1, 2, 3), None], pa.month_day_nano_interval()),
    )
    chosen = {
        name: random.choice(columns) for name in random.sample(("messages", "prompt", "completion", "text", "id"), 3)
    }
    return _written(random, pa.table(chosen), "types")


def nested(random: Random) -> File:
    """Types in types in types."""
    depth = random.choice((5, 60, 300, 1500))
    value: Any = pa.array(["a"])
    way = random.randrange(3)
    for _ in range(depth):
        if way == 0:
            value = pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), value)
        elif way == 1:
            value = pa.StructArray.from_arrays([value], ["a"])
        else:
            value = pa.DictionaryArray.from_arrays(pa.array([0], pa.int8()), value)
    return _written(random, pa.table({"messages": value}), f"{depth} deep")


def wide(random: Random) -> File:
    """Thousands of columns, none, the same one twice, no rows, names that are none."""
    made: tuple[Any, ...] = (
        pa.table({f"c{number}": ["a"] for number in range(random.choice((1000, 20_000)))}),
        pa.table({"": ["a"], "\0": ["b"], "n" * 100_000: ["c"]}),
        pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]),
        pa.table({"text": pa.array([], pa.string())}),
        pa.table({}),
        pa.table({"text": ["a"]}).replace_schema_metadata(
            {"pandas": "{", "huggingface": "[" * 100_000, "k": "v" * 1_000_000}
        ),
        pa.table({"text": pa.array(["a"] * 3)}, metadata={"ARROW:extension:name": "arrow.py_extension_type"}),
        pa.table([pa.array(["a"])], schema=pa.schema([pa.field("text", pa.string(), metadata=_PICKLED)])),
    )
    return _written(random, random.choice(made), "wide")


def repeated(random: Random) -> File:
    """Little that becomes much: one long text in every row of a dictionary, compressed zeros, rows of nothing."""
    text = "word " * random.choice((1000, 200_000))
    rows = random.choice((1000, 30_000, 1_000_000))
    many = pa.Array.from_buffers(pa.int32(), rows, [None, pa.py_buffer(bytes(4 * rows))])
    way = random.randrange(4)
    if way == 0:
        table = pa.table({"text": pa.DictionaryArray.from_arrays(many, pa.array([text]))})
        return File(f"{rows} times {len(text)}", parquet(table, compression=random.choice(("zstd", "snappy", "none"))))
    if way == 1:
        table = pa.table({"text": pa.DictionaryArray.from_arrays(many, pa.array([text]))})
        return File(f"{rows} times {len(text)}", arrow(table, stream=random.random() < 0.5))
    if way == 2:
        return _written(random, pa.table({"text": pa.nulls(rows, pa.string())}), "nulls")
    return File("runs", parquet(pa.table({"text": pa.array(["a"] * min(rows, 30_000))}), compression="gzip"))


def dictionaries(random: Random) -> File:
    """Indices that lie outside of their dictionary, or are none."""
    indices = random.choice(([5, 0], [-1, 0], [None, None], [127, -128]))
    array = pa.DictionaryArray.from_arrays(pa.array(indices, pa.int8()), pa.array(["a", "b"]), safe=False)
    return File("indices", arrow(pa.table({"text": array}), stream=random.random() < 0.5))


def csv(random: Random) -> File:
    """Quotes that never close, huge cells, thousands of columns, odd separators."""
    name, content = pick(random, ".csv")
    size = random.choice((10, 1000, 100_000))
    ways = (
        lambda: content.replace(b'"', b"", 1),
        lambda: content + b'"open,\n' + b"a,b\n" * size,
        lambda: b"prompt,completion\n" + b'"' + b"a" * (size * 100) + b'",b\n',
        lambda: b"prompt,completion\n" + b"a," * size + b"b\n",
        lambda: b",".join(b"c%d" % n for n in range(size)) + b"\n" + b"," * (size - 1) + b"\n",
        lambda: b"prompt,prompt\na,b\n",
        lambda: b"p" * size + b",completion\na,b\n",
        lambda: b"prompt,completion\n" + b'a,"b"c"d"\n' * size,
        lambda: b"prompt,completion\n" + b'""""""""""""' * size + b"\n",
        lambda: b"prompt,completion\n" + b"\0,\0\n" * size,
        lambda: b"prompt|completion\na|b\n",
        lambda: b"prompt;completion,x\ta\n1;2,3\t4\n",
        lambda: b"prompt,completion\r" + b"a,b\r" * size,
        lambda: b"\n" * size + content,
        lambda: b"prompt,completion\n=cmd|' /C calc'!A0,@SUM(1)\n",
        lambda: b'"prompt\n' * size,
        lambda: b"sep=;\nprompt;completion\na;b\n",
        lambda: b'messages\n"[{""role"": ""user"", ""content"": ""a""}]"\n',
    )
    return File(name, random.choice(ways)())


_PICKLED = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": b"\x80\x04cos\nsystem\n."}


def _written(random: Random, table: pa.Table, what: str) -> File:
    """The table in a format that takes it; what no format takes becomes a sound one."""
    for kind in random.sample(("parquet", "arrow", "arrows"), 3):
        try:
            content = parquet(table) if kind == "parquet" else arrow(table, stream=kind == "arrows")
        except (pa.ArrowException, RecursionError):
            continue
        return File(f"{what} in {kind}", content)
    return File("messages.parquet", bases()["messages.parquet"])
