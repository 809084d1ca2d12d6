"""CSV, Parquet and Arrow: their rows are what was written, and each wrong record is said where it begins."""

import base64
import csv
import datetime
import decimal
import io
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from luthier_trainer.data.files import compressed
from luthier_trainer.data.files import rows as rows_module
from luthier_trainer.data.files.rows import Row, open_rows
from luthier_trainer.data.problem import Level, Problem
from luthier_trainer.data.reading import FileFormat, Reading


def read(tmp_path: Path, content: bytes, **reading: Any) -> list[Row]:
    path = tmp_path / "blob"
    path.write_bytes(content)
    with open_rows(path, Reading(**reading)) as file:
        return list(file)


def values(found: list[Row]) -> list[dict[str, object]]:
    assert not problems(found)
    return [row.value for row in found if isinstance(row.value, dict)]


def problems(found: list[Row]) -> list[tuple[int, str]]:
    return [(row.line, row.value.code) for row in found if isinstance(row.value, Problem)]


def as_parquet(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    parquet.write_table(table, sink, **options)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def as_arrow(table: pa.Table, new: Any = pa.ipc.new_stream, batch: int | None = None) -> bytes:
    sink = pa.BufferOutputStream()
    with new(sink, table.schema) as writer:
        writer.write_table(table, batch)
    content: bytes = sink.getvalue().to_pybytes()
    return content


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_csv_is_read_as_it_was_written(tmp_path: Path, delimiter: str, ends: str, mark: bytes) -> None:
    rows = [
        {"prompt": 'say "hi", or; or\tnot', "completion": ""},
        {"prompt": "two\nlines\n\nand more", "completion": "é😀"},
        {"prompt": "", "completion": "x" * 200_000},
    ] * 20
    sink = io.StringIO(newline="")
    writer = csv.DictWriter(sink, ["prompt", "completion"], delimiter=delimiter, lineterminator=ends)
    writer.writeheader()
    writer.writerows(rows)
    assert values(read(tmp_path, mark + sink.getvalue().encode())) == rows


def test_a_header_with_quotes_and_spaces_names_the_columns(tmp_path: Path) -> None:
    content = b'\n"a, ""b""";  Answer  ;\n1;2;\n3;4\n5;6;;\n7;8;x\n9\n'
    expected = [{'a, "b"': "1", "Answer": "2"}, {'a, "b"': "3", "Answer": "4"}, {'a, "b"': "5", "Answer": "6"}]
    found = read(tmp_path, content)
    assert [row.value for row in found if isinstance(row.value, dict)] == expected
    assert problems(found) == [(6, "WRONG_CELL_COUNT"), (7, "WRONG_CELL_COUNT")]


def test_the_line_of_a_csv_record_is_the_one_it_begins_on(tmp_path: Path) -> None:
    content = b'prompt,completion\n"a\nb\nc",d\n\nshort\n"x\ny",1,2\n"bad"quote,1\n\xff,1\n"m\n\xfe",1\nlast,row\n'
    found = read(tmp_path, content)
    assert problems(found) == [
        (6, "WRONG_CELL_COUNT"),
        (7, "WRONG_CELL_COUNT"),
        (9, "NOT_CSV"),
        (10, "NOT_UTF8"),
        (11, "NOT_UTF8"),
    ]
    assert [row.line for row in found if isinstance(row.value, dict)] == [2, 13]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a,b\n1,2\n" + b'"never closed,3\n' + b"4,5\n", [(3, "NOT_CSV")]),
        (b"a,b,a\n1,2,3\n", [(1, "BAD_HEADER")]),
        (b"a,b\n1,2\r3,4\r5,6\n", [(2, "NOT_CSV")]),
        (b"a,b\n", []),
    ],
)
def test_csv_that_is_none_is_a_finding(tmp_path: Path, content: bytes, expected: list[tuple[int, str]]) -> None:
    assert problems(read(tmp_path, content)) == expected


def test_a_quote_that_never_closes_takes_a_record_and_not_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "MAX_LINE_BYTES", 10_000)
    content = b'a,b\n"open,1\n' + b"1,2\n" * 5_000 + b"x" * 20_000 + b"\n3,4\n"
    found = read(tmp_path, content)
    assert problems(found) == [(2, "NOT_CSV"), (5003, "LINE_TOO_LONG")]
    assert found[-1] == Row(5004, {"a": "3", "b": "4"})


def test_bytes_of_windows_in_a_csv_header_are_named(tmp_path: Path) -> None:
    assert problems(read(tmp_path, b"pr\xfcfung,b\n1,2\n")) == [(0, "NOT_UTF8")]


@pytest.mark.parametrize("write", [as_parquet, as_arrow, lambda table: as_arrow(table, pa.ipc.new_file)])
def test_tables_become_what_json_has(tmp_path: Path, write: Any) -> None:
    table = pa.table(
        {
            "messages": pa.array(
                [[{"role": "user", "content": "hi", "name": None}, {"role": "assistant", "content": "é", "name": "x"}]]
                * 2,
            ),
            "when": pa.array([datetime.datetime(2024, 5, 1, 12, 30), None], pa.timestamp("us")),
            "zone": pa.array([0, 1], pa.timestamp("s", "UTC")),
            "day": pa.array([datetime.date(2024, 5, 1), None]),
            "price": pa.array([decimal.Decimal("1.50"), None]),
            "score": pa.array([1.5, float("nan")]),
            "half": pa.array([1.5, None], pa.float16() if write is not as_parquet else pa.float32()),
            "label": pa.array([True, None]),
            "kind": pa.array(["a", None]).dictionary_encode(),
            "raw": pa.array([b"text", b"\xff\x00"]),
            "image": pa.array([{"bytes": b"\x89PNG", "path": None}, None]),
            "images": pa.array([[{"bytes": None, "path": "a.png"}], []]),
            "tags": pa.array([["x", None], None], pa.list_(pa.large_string())),
            "map": pa.array([[("k", 1.0)], None], pa.map_(pa.string(), pa.float64())),
            "deep": pa.array([{"a": {"b": [datetime.date(2024, 5, 1)]}}, {"a": None}]),
            "nothing": pa.nulls(2),
        }
    )
    first, second = values(read(tmp_path, write(table)))
    assert first["messages"] == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "é", "name": "x"}]
    assert str(first["when"]).startswith("2024-05-01 12:30:00")
    assert "1970-01-01 00:00:00" in str(first["zone"])
    assert (first["day"], first["price"], first["score"], first["half"]) == ("2024-05-01", "1.50", 1.5, 1.5)
    assert (first["label"], first["kind"], first["raw"]) == (True, "a", "text")
    assert first["image"] == {"bytes": base64.b64encode(b"\x89PNG").decode(), "path": None}
    assert first["images"] == [{"bytes": None, "path": "a.png"}]
    assert (first["tags"], first["map"]) == (["x", None], {"k": 1.0})
    assert first["deep"] == {"a": {"b": ["2024-05-01"]}}
    assert second["raw"] == {"bytes": base64.b64encode(b"\xff\x00").decode(), "path": None}
    assert second["deep"] == {}
    assert second["images"] == []
    others = {"when", "day", "price", "score", "half", "label", "kind", "image", "tags", "map", "nothing"}
    assert {name for name, value in second.items() if value is None} == others


def test_a_struct_of_lists_is_a_conversation_where_that_is_certain(tmp_path: Path) -> None:
    turns = {"role": ["user", "assistant"], "content": ["a", "b"], "name": [None, "x"]}
    uneven = {"role": ["user"], "content": ["a", "b"], "name": []}
    found = read(tmp_path, as_parquet(pa.table({"messages": [turns, uneven], "other": [turns, turns]})))
    expected = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "x"}]
    assert values(found) == [{"messages": expected, "other": turns}, {"messages": uneven, "other": turns}]
    found = read(tmp_path, as_parquet(pa.table({"dialog": [turns]})), columns={"messages": "dialog"})
    assert values(found) == [{"messages": expected}]


def test_columns_of_tables_are_mapped_and_missed(tmp_path: Path) -> None:
    content = as_parquet(pa.table({"question": ["q"], "answer": ["a"]}))
    assert values(read(tmp_path, content, columns={"prompt": "question"})) == [{"answer": "a", "prompt": "q"}]
    found = read(tmp_path, content, columns={"prompt": "querstion"})
    assert problems(found) == [(0, "COLUMN_MISSING")]


def test_many_small_batches_and_row_groups_are_numbered_through(tmp_path: Path) -> None:
    table = pa.table({"text": [str(n) for n in range(5000)]})
    for content in (as_parquet(table, row_group_size=77), as_arrow(table, batch=13)):
        found = read(tmp_path, content)
        assert [row.line for row in found] == list(range(1, 5001))
        assert [row["text"] for row in values(found)] == table["text"].to_pylist()


def test_text_that_is_none_costs_its_own_row(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"\xff", None, b"\xc3\xa9"])
    table = pa.table({"text": raw.view(pa.string()), "n": [1, 2, 3, 4]})
    for content in (as_parquet(table), as_arrow(table)):
        found = read(tmp_path, content)
        assert problems(found) == [(2, "NOT_UTF8")]
        rest = [row.value for row in found if isinstance(row.value, dict)]
        assert rest == [{"text": "good", "n": 1}, {"text": None, "n": 3}, {"text": "é", "n": 4}]


def test_a_column_that_json_has_nothing_for_is_left_out_and_said(tmp_path: Path) -> None:
    union = pa.UnionArray.from_sparse(pa.array([0, 0], pa.int8()), [pa.array([1, 2])])
    found = read(tmp_path, as_arrow(pa.table({"text": ["a", "b"], "u": union})))
    assert problems(found) == [(0, "COLUMN_NOT_READ")]
    assert isinstance(found[0].value, Problem) and found[0].value.level is Level.WARNING
    assert [row.value for row in found[1:]] == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.99])
def test_tables_that_are_cut_off_are_a_finding(tmp_path: Path, share: float) -> None:
    table = pa.table({"text": [str(n) * 10 for n in range(5000)]})
    for content in (as_parquet(table), as_arrow(table, pa.ipc.new_file)):
        cut = content[: max(8, int(len(content) * share))]
        assert problems(read(tmp_path, cut)) == [(0, "BROKEN_FILE")]


def test_rows_of_nothing_without_end_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed, "RATIO_FROM", 64 * 1024)
    monkeypatch.setattr(compressed, "RATIO", 2)
    found = read(tmp_path, as_parquet(pa.table({"nothing": pa.nulls(100_000)})))
    assert problems(found) == [(0, "FILE_TOO_LARGE")]
    assert len(found) < 2000


def test_one_long_value_for_every_row_ends_at_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed, "RATIO_FROM", 1024**2)
    indices = pa.array([0], pa.int32()).take(pa.array([0] * 200_000))
    table = pa.table({"text": pa.DictionaryArray.from_arrays(indices, ["x" * 10_000])})
    for content in (as_parquet(table), as_arrow(table)):
        monkeypatch.setattr(compressed, "RATIO", 2 * 1024**2 / len(content))
        found = read(tmp_path, content)
        assert problems(found) == [(0, "FILE_TOO_LARGE")]
        assert len(found) < 1000


def test_a_table_takes_the_memory_of_a_few_rows(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    path.write_bytes(as_parquet(pa.table({"text": [str(n) * 1000 for n in range(20_000)]})))
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        with open_rows(path) as file:
            assert file.file_format is FileFormat.PARQUET
            peak = 0
            for _ in file:
                peak = max(peak, pa.total_allocated_bytes() - before)
        assert tracemalloc.get_traced_memory()[1] < 32 * 1024**2
        assert peak < 64 * 1024**2
    finally:
        tracemalloc.stop()


def test_text_is_read_without_loading_pyarrow() -> None:
    code = (
        "import sys, pathlib, tempfile\n"
        "from luthier_trainer.data.files.rows import open_rows\n"
        "with tempfile.NamedTemporaryFile() as file:\n"
        "    file.write(b'a,b\\n1,2\\n'); file.flush()\n"
        "    assert len(list(open_rows(pathlib.Path(file.name)))) == 1\n"
        "heavy = {'pyarrow', 'numpy', 'pandas', 'torch'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
