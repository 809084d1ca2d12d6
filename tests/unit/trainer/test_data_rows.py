"""Text files of rows: what they are is told from their bytes, and what is wrong with a line is said where it is."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from luthier_trainer.data.files import rows as rows_module
from luthier_trainer.data.files.rows import Row, open_rows
from luthier_trainer.data.problem import Problem
from luthier_trainer.data.reading import FileFormat, Reading

GOOD = b'{"prompt": "a", "completion": "b"}\n'


def read(tmp_path: Path, content: bytes, **reading: Any) -> tuple[FileFormat, list[Row]]:
    path = tmp_path / "blob"
    path.write_bytes(content)
    with open_rows(path, Reading(**reading)) as file:
        return file.file_format, list(file)


def values(found: list[Row]) -> list[dict[str, object]]:
    problems = [row for row in found if isinstance(row.value, Problem)]
    assert not problems
    return [row.value for row in found if isinstance(row.value, dict)]


def problems(found: list[Row]) -> list[tuple[int, str]]:
    return [(row.line, row.value.code) for row in found if isinstance(row.value, Problem)]


def the_problem(found: list[Row]) -> Problem:
    [problem] = [row.value for row in found if isinstance(row.value, Problem)]
    assert problem.message.endswith((".", "?"))
    assert problem.message.isprintable()
    assert problem.fix.isprintable()
    return problem


@pytest.mark.parametrize(
    ("content", "file_format"),
    [
        (GOOD, FileFormat.JSONL),
        (b"\xef\xbb\xbf\r\n " + GOOD, FileFormat.JSONL),
        (b"", FileFormat.JSONL),
        (b"[" + GOOD + b"]", FileFormat.JSON),
        (b"\xef\xbb\xbf\n[\n" + GOOD + b"]", FileFormat.JSON),
        (b"[1]\n[2]\n", FileFormat.JSONL),
        (b"oops\n" + GOOD, FileFormat.JSONL),
        (b"// made by me, yesterday\n" + GOOD, FileFormat.JSONL),
        (b"prompt,completion\na,b\n", FileFormat.CSV),
        (b"text\nhello\n", FileFormat.CSV),
    ],
)
def test_what_a_text_file_is_is_told_from_its_bytes(tmp_path: Path, content: bytes, file_format: FileFormat) -> None:
    assert read(tmp_path, content)[0] is file_format


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"BZh91AY&SY....", "bzip2"),
        (b"\xfd7zXZ\0\0", "xz"),
        (b"7z\xbc\xaf\x27\x1c\0", "7z"),
        (b"%PDF-1.7\n", "PDF"),
        (b"SQLite format 3\0", "SQLite"),
        (b"a" + b"\0" * 256 + b"ustar\x0000", "tar"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\x80\x04\x95\x10\0\0\0", "pickle"),
        (b"Once upon a time there was a king.\nHe had three sons, two of them wise.\n", "Once upon a time"),
        (b"# Notes, and more\n\n| a | b |\n", "neither JSON nor CSV"),
        (bytes(range(1, 200)), "no kind"),
    ],
)
def test_another_kind_of_file_is_named_once_with_a_way_out(tmp_path: Path, content: bytes, word: str) -> None:
    problem = the_problem(read(tmp_path, content + b"\xff\n" * 30)[1])
    assert problem.code == "UNKNOWN_FILE_FORMAT"
    assert word in problem.message
    assert "JSONL" in problem.message


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_wide_encodings_are_named_with_and_without_a_mark(tmp_path: Path, encoding: str) -> None:
    problem = the_problem(read(tmp_path, GOOD.decode().encode(encoding))[1])
    assert problem.code == "NOT_UTF8"
    assert encoding[:6].upper() in problem.message
    assert "iconv" in problem.fix


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        (b'{"a": 1,}', "NOT_JSON", "comma"),
        (b"{'a': 1}", "NOT_JSON", "double quotes"),
        (b'{"a": None}', "NOT_JSON", "null"),
        (b'{"a": True}', "NOT_JSON", "true"),
        (b'{"a": NaN}', "NOT_JSON", "NaN"),
        (b'{"a": -Infinity}', "NOT_JSON", "infinity"),
        (b'{"a": 1e999}', "NOT_JSON", "too large"),
        (b'{"a": 1' + b"0" * 400 + b"}", "NOT_JSON", "too large"),
        (b'{"a": 1} // why', "NOT_JSON", "comment"),
        (b"# why", "NOT_JSON", "comment"),
        (b'{"a": 1} {"a": 2}', "NOT_JSON", "second object"),
        (b'{"a": 1},', "NOT_JSON", "comma follows"),
        (b'{"a": "x', "NOT_JSON", "ends inside"),
        (b'{"a": "x\ty"}', "NOT_JSON", "control character"),
        (b'{"a": "C:\\x"}', "NOT_JSON", "backslash twice"),
        (b"{a: 1}", "NOT_JSON", "without quotes"),
        ("{“a”: 1}".encode(), "NOT_JSON", "straight"),
        (b'{"a": "\\ud83d"}', "NOT_UNICODE", "surrogate"),
        (b'{"a": "\\ude00"}', "NOT_UNICODE", "surrogate"),
        (b'{"a": "\xfc"}', "NOT_UTF8", "0xfc"),
        (b'{"a": "\xed\xa0\x80"}', "NOT_UTF8", "0xed"),
        (b'{"a":' * 5000, "TOO_DEEP", "deep"),
        (b'"a"', "NOT_AN_OBJECT", "a string"),
        (b"17", "NOT_AN_OBJECT", "a number"),
    ],
)
@pytest.mark.parametrize("as_array", [False, True])
def test_a_mistake_is_named_and_costs_its_own_row(
    tmp_path: Path, line: bytes, code: str, words: str, as_array: bool
) -> None:
    if as_array:
        # What orjson alone refuses does not end an array; what has no end does.
        if code in ("NOT_JSON", "TOO_DEEP", "NOT_UTF8") and not words.startswith(("NaN", "infinity", "too large")):
            return
        _, found = read(tmp_path, b"[" + GOOD + b"," + line + b"," + GOOD + b"]")
    else:
        _, found = read(tmp_path, GOOD + line + b"\n" + GOOD)
    problem = the_problem(found)
    assert (len(found), problems(found)) == (3, [(2, code)])
    assert words in problem.message + problem.fix


def test_objects_over_several_lines_are_one_finding_and_not_one_a_line(tmp_path: Path) -> None:
    content = "\n".join(json.dumps({"n": n, "text": "x" * 100}, indent=2) for n in range(20_000)).encode()
    assert len(content) > 2 * 1024**2
    _, found = read(tmp_path, content)
    assert problems(found) == [(1, "NOT_JSON")]
    assert "Write each object on one line" in the_problem(found).message


def test_a_good_file_that_ends_inside_of_an_object_loses_the_last_row_only(tmp_path: Path) -> None:
    _, found = read(tmp_path, GOOD * 3 + GOOD[:-10])
    assert (len(found), problems(found)) == (4, [(4, "NOT_JSON")])
    assert "cut off" in the_problem(found).fix


@pytest.mark.parametrize("pad", [0, 1, 7, 1024 * 1024 - 30, 1024 * 1024 - 3])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_the_same_wherever_the_windows_on_it_end(tmp_path: Path, pad: int, indent: int | None) -> None:
    rows = [{"n": n, "text": f'é😀\\"]}},{{[ {n}', "number": -12345.678e3} for n in range(40_000)]
    rows[7]["text"] = "long" * 1_000_000
    content = b" " * pad + json.dumps(rows, indent=indent, ensure_ascii=False).encode()
    file_format, found = read(tmp_path, content)
    assert file_format is FileFormat.JSON
    assert values(found) == rows
    assert [row.line for row in found] == list(range(1, len(rows) + 1))


def test_an_array_takes_the_memory_of_a_window(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    path.write_bytes(b"[" + b",".join([GOOD.strip()] * 100_000) + b"]")
    tracemalloc.start()
    try:
        with open_rows(path) as file:
            assert sum(1 for _ in file) == 100_000
        assert tracemalloc.get_traced_memory()[1] < 8 * 1024**2
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"[" + GOOD + b"," + GOOD, (2, "NOT_JSON")),
        (b"[" + GOOD + b"," + GOOD[:-9], (2, "NOT_JSON")),
        (b"[" + GOOD + b"," + GOOD + b"] x", (0, "NOT_JSON")),
        (b"[" + GOOD + b",]", (2, "NOT_JSON")),
        (b"[" + GOOD + GOOD + b"]", (1, "NOT_JSON")),
        (b'[{"a": "\xff"}]', (1, "NOT_UTF8")),
        (b"[" * 100_000, (1, "TOO_DEEP")),
        (b'["' + b"x" * 20_000_000, (1, "LINE_TOO_LONG")),
    ],
)
def test_an_array_that_breaks_off_ends_with_what_is_wrong(
    tmp_path: Path, content: bytes, expected: tuple[int, str]
) -> None:
    assert problems(read(tmp_path, content)[1]) == [expected]


def test_the_place_of_a_mistake_in_an_array_is_that_in_the_file(tmp_path: Path) -> None:
    content = b"[\n" + b",\n".join([GOOD.strip()] * 50_000) + b",\n  {'a': 1}\n]"
    _, found = read(tmp_path, content)
    assert problems(found) == [(50_001, "NOT_JSON")]
    assert "(line 50002, column 4)" in the_problem(found).message


def test_the_limits_are_those_of_the_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "MAX_LINE_BYTES", 100)
    long = b'{"a": "' + b"x" * 200 + b'"}\n'
    assert problems(read(tmp_path, GOOD + long + GOOD)[1]) == [(2, "LINE_TOO_LONG")]
    assert problems(read(tmp_path, b"[" + GOOD + b"," + long + b"]")[1]) == [(2, "LINE_TOO_LONG")]
    monkeypatch.setattr(rows_module, "MAX_ARRAY_BYTES", 50)
    assert problems(read(tmp_path, b"[" + GOOD + b"," + GOOD + b"]")[1]) == [(0, "FILE_TOO_LARGE")]


@pytest.mark.parametrize("blank", [b"\n", b" \t\r\n"])
def test_blank_lines_by_the_million_are_counted(tmp_path: Path, blank: bytes) -> None:
    for content in (GOOD, b"prompt,completion\na,b\n"):
        _, found = read(tmp_path, content + blank * 3_000_000 + content)
        assert found[0].line + 3_000_001 == found[-1].line - (content is not GOOD)
        assert isinstance(found[-1].value, dict)


def test_a_file_of_nothing_but_mistakes_is_not_read_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "MAX_PROBLEMS", 1000)
    _, found = read(tmp_path, GOOD + b"x\n" * 5000)
    assert len(found) == 1002
    assert problems(found)[-1] == (0, "TOO_MANY_PROBLEMS")


def test_columns_take_the_names_of_the_fields(tmp_path: Path) -> None:
    content = b'{"question": "q", "answer": "a", "id": 1}\n'
    _, found = read(tmp_path, content, columns={"prompt": "question", "completion": "answer", "solution": "answer"})
    assert values(found) == [{"id": 1, "prompt": "q", "completion": "a", "solution": "a"}]
    _, found = read(tmp_path, content, columns={"prompt": "question", "question": "question"})
    assert values(found) == [{"answer": "a", "id": 1, "prompt": "q", "question": "q"}]
    _, found = read(tmp_path, content, columns={"question": "answer", "answer": "question"})
    assert values(found) == [{"question": "a", "answer": "q", "id": 1}]


def test_a_missing_column_is_named_with_its_nearest(tmp_path: Path) -> None:
    _, found = read(tmp_path, b'{"Question": "q", "answer": "a"}\n', columns={"prompt": "question"})
    problem = the_problem(found)
    assert (found[0].line, problem.code) == (1, "COLUMN_MISSING")
    assert problem.fix == 'Did you mean "Question"?'
    _, found = read(tmp_path, b"Question,answer\nq,a\nq,a\n", columns={"prompt": "zzz"})
    assert problems(found) == [(0, "COLUMN_MISSING")]
    assert '"Question", "answer"' in the_problem(found).fix


def test_a_named_format_decides_for_text_and_is_held_against_other_files(tmp_path: Path) -> None:
    file_format, found = read(tmp_path, b"word\nhello\n", file_format=FileFormat.CSV)
    assert (file_format, values(found)) == (FileFormat.CSV, [{"word": "hello"}])
    assert problems(read(tmp_path, GOOD, file_format=FileFormat.JSON)[1]) == [(0, "NOT_JSON")]
    assert problems(read(tmp_path, GOOD, file_format=FileFormat.PARQUET)[1]) == [(0, "FILE_FORMAT_MISMATCH")]
    assert problems(read(tmp_path, b"PK\x05\x06" + b"\0" * 18, file_format=FileFormat.CSV)[1]) == [
        (0, "FILE_FORMAT_MISMATCH")
    ]


def test_a_file_can_be_read_again(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    path.write_bytes(GOOD * 3)
    with open_rows(path) as file:
        assert list(file) == list(file)
        assert not file.has_image("a.png")
        with pytest.raises(KeyError):
            file.image("a.png")
    with pytest.raises(FileNotFoundError):
        open_rows(tmp_path / "absent")
