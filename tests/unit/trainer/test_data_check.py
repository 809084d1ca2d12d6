"""The structural check: each finding, the module as the server runs it, and what no file may make it do."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luthier.trainer.v1 import report_pb2
from luthier.v1 import dataset_pb2
from luthier_trainer.data import check as check_module
from luthier_trainer.data import rows as rows_module
from luthier_trainer.data.check import check

GOOD = b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}\n'
bounded = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def judged(tmp_path: Path, content: bytes) -> report_pb2.DatasetReport:
    path = tmp_path / "blob"
    path.write_bytes(content)
    return check(path)


def found(tmp_path: Path, content: bytes) -> list[tuple[int, str]]:
    return [(finding.line, finding.code) for finding in judged(tmp_path, content).findings]


def row(*turns: tuple[str, Any], **more: Any) -> bytes:
    return json.dumps({"messages": [{"role": r, "content": c} for r, c in turns], **more}).encode() + b"\n"


USER, ANSWER = ("user", "hi"), ("assistant", "hello")


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("NOT_UTF8", b'{"messages": "\xff"}\n'),
        ("NOT_JSON", b'{"messages": [}\n'),
        ("NOT_JSON", b'{"messages": "\\ud800"}\n'),
        ("NOT_JSON", b'{"messages": NaN}\n'),
        ("NOT_JSON", b"\0\0\0\n"),
        ("NOT_JSON", b'{"n": 1' + b"0" * 5000 + b"}\n"),
        ("TOO_DEEP", b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}\n"),
        ("NOT_AN_OBJECT", b"[1]\n"),
        ("NOT_AN_OBJECT", b'"text"\n'),
        ("UNKNOWN_FORMAT", b'{"message": []}\n'),
        ("UNKNOWN_FORMAT", b"{}\n"),
        ("MIXED_FORMATS", b'{"prompt": "a", "completion": "b"}\n'),
        ("EMPTY_CONVERSATION", row()),
        ("BAD_ROLE", row(USER, ("assistent", "hello"))),
        ("BAD_ROLE", row(USER, ANSWER, ("tool", "42"))),
        ("BAD_ROLE", b'{"messages": [{"from": "human", "value": "hi"}]}\n'),
        ("BAD_CONTENT", row(USER, ("assistant", None))),
        ("BAD_CONTENT", row(("user", [{"type": "text", "text": "hi"}]), ANSWER)),
        ("BAD_CONTENT", row(("user", "a\0b"), ANSWER)),
        ("BAD_CONTENT", b'{"messages": {"role": "user"}}\n'),
        ("BAD_CONTENT", b'{"messages": ["hi"]}\n'),
        ("NO_ASSISTANT_TURN", row(USER)),
        ("EMPTY_ASSISTANT", row(USER, ("assistant", " \n"))),
        ("ROLES_OUT_OF_ORDER", row(ANSWER, USER)),
        ("ROLES_OUT_OF_ORDER", row(USER, ("system", "late"), ANSWER)),
        ("ROLES_OUT_OF_ORDER", row(USER, ANSWER, ANSWER)),
        ("NOT_SUPPORTED", row(USER, ANSWER, tools=[{"name": "search"}])),
    ],
)
def test_a_wrong_line_between_good_ones_is_found_at_its_number(tmp_path: Path, code: str, line: bytes) -> None:
    report = judged(tmp_path, GOOD + line + GOOD)
    assert [(finding.line, finding.code) for finding in report.findings] == [(2, code)]
    assert report.finding_count == 1
    assert report.rows == 3
    assert report.format == dataset_pb2.DATASET_FORMAT_MESSAGES
    message = report.findings[0].message
    assert message.endswith((".", "?"))
    assert message.isprintable()


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        (b'{"message": []}', 'Did you mean "messages" by "message"?'),
        (b'{"question": "a", "answer": "b"}', 'Call "question" "prompt" and "answer" "completion".'),
        (b'{"conversations": []}', "ShareGPT"),
        (b'{"prompt": "a", "chosen": "b", "rejected": "c"}', "preference data"),
        (row(("User", "hi"), ANSWER), 'Did you mean "user"?'),
        (row(("human", "hi"), ANSWER), 'called "user" here'),
        (b"{'messages': []}", "double quotes"),
        (b'{"a": 1, }', "(column 8)"),
        (b"{\n", "Write each object on one line"),
    ],
)
def test_a_message_says_what_to_do(tmp_path: Path, line: bytes, hint: str) -> None:
    assert hint in judged(tmp_path, line).findings[0].message


@pytest.mark.parametrize("content", [b"", b"\n \r\n\n", b"\xef\xbb\xbf", b"[]", b" [ ] \n"])
def test_a_file_without_rows_is_empty(tmp_path: Path, content: bytes) -> None:
    report = judged(tmp_path, content)
    assert [(finding.line, finding.code) for finding in report.findings] == [(0, "EMPTY_FILE")]
    assert (report.rows, report.finding_count, report.format) == (0, 1, 0)


def test_byte_order_mark_blank_lines_and_windows_line_ends_are_no_problem(tmp_path: Path) -> None:
    report = judged(tmp_path, b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n") + b"\r\n" + GOOD.rstrip())
    assert not report.findings
    assert report.rows == 2


def test_lines_are_counted_with_the_blank_ones(tmp_path: Path) -> None:
    assert found(tmp_path, b"\n\n" + GOOD + b"\nx\n") == [(5, "NOT_JSON")]


def test_a_line_over_the_limit_is_skipped_and_the_next_one_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "MAX_LINE_BYTES", 200)
    monkeypatch.setattr(rows_module, "_CHUNK", 64)
    exact = GOOD[:-2] + b" " * (200 - len(GOOD)) + b"}\n"
    assert len(exact) == 200
    report = judged(tmp_path, exact + b'{"x": "' + b"y" * 5000 + b'"}\n' + b"x\n")
    assert [(finding.line, finding.code) for finding in report.findings] == [(2, "LINE_TOO_LONG"), (3, "NOT_JSON")]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"[" + GOOD + b"," + GOOD + b"]", []),
        (b" [\n" + GOOD + b",\n 3,\n" + GOOD + b"\n]\n", [(2, "NOT_AN_OBJECT")]),
        (b"[" + GOOD + b"," + GOOD, [(2, "NOT_JSON")]),
        (b"[" + GOOD + b"," + GOOD + b"] x", [(0, "NOT_JSON")]),
        (b"[" + GOOD + b",]", [(2, "NOT_JSON")]),
        (b"[" + GOOD + GOOD + b"]", [(1, "NOT_JSON")]),
        (b'[{"prompt": "a", "completion": "\\ud800"}]', [(1, "NOT_JSON")]),
        (b'[{"n": NaN}]', [(1, "NOT_JSON")]),
        (b'[{"n": 1' + b"0" * 5000 + b"}]", [(1, "NOT_JSON")]),
        (b"[" * 100_000, [(1, "TOO_DEEP")]),
        (b'[{"a": "\xff"}]', [(0, "NOT_UTF8")]),
        (b"[1]\n[2]\n", [(1, "NOT_AN_OBJECT"), (2, "NOT_AN_OBJECT")]),
    ],
)
def test_an_array_is_judged_by_its_elements(tmp_path: Path, content: bytes, expected: list[tuple[int, str]]) -> None:
    findings = found(tmp_path, content)
    assert [finding for finding in findings if finding[1] != "UNKNOWN_FORMAT"] == expected


def test_an_array_over_the_limit_is_refused_with_a_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "MAX_ARRAY_BYTES", 50)
    report = judged(tmp_path, b"[" + GOOD + b"]")
    assert report.findings[0].code == "FILE_TOO_LARGE"
    assert "JSONL" in report.findings[0].message


@pytest.mark.parametrize("magic", [b"\x1f\x8b\x08", b"PK\x03\x04", b"\xff\xfe{\0", b"PAR1"])
def test_another_kind_of_file_is_named_once_and_not_line_by_line(tmp_path: Path, magic: bytes) -> None:
    assert found(tmp_path, magic + b"\n\xff\n" * 50) == [(0, "NOT_UTF8")]


def test_all_wrong_lines_are_counted_and_the_first_hundred_kept(tmp_path: Path) -> None:
    report = judged(tmp_path, GOOD + b"x\n" * 250)
    assert report.finding_count == 250
    assert [finding.line for finding in report.findings] == list(range(2, 102))


def test_memory_that_runs_out_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(_: Path) -> Any:
        raise MemoryError
        yield

    monkeypatch.setattr(check_module, "conversations", exhausted)
    assert found(tmp_path, GOOD) == [(0, "FILE_TOO_LARGE")]


def run_module(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "luthier_trainer.data.check", *arguments]
    return subprocess.run(command, capture_output=True, timeout=60, check=False)


def test_the_module_writes_a_report_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"x\n")
    done = run_module(str(path))
    assert (done.returncode, done.stderr) == (0, b"")
    report = report_pb2.DatasetReport.FromString(done.stdout)
    assert (report.rows, report.finding_count, report.findings[0].line) == (2, 1, 2)


def test_the_module_says_when_there_is_no_file_to_judge(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path, Path("/dev/zero")):
        done = run_module(str(path))
        assert (done.returncode, done.stdout) == (2, b"")
        assert done.stderr.startswith(b"cannot read the file")


def test_the_module_survives_a_hostile_array_within_its_memory(tmp_path: Path) -> None:
    path = tmp_path / "hostile"
    path.write_bytes(b"[" + b"{}," * 300_000 + b"[" * 2_000_000)
    done = run_module(str(path))
    assert done.returncode == 0
    report = report_pb2.DatasetReport.FromString(done.stdout)
    assert report.finding_count == report.rows == 300_001


def test_the_check_loads_neither_torch_nor_numpy_nor_transformers() -> None:
    code = (
        "import sys, luthier_trainer.data.check, luthier_trainer.inspect;"
        "heavy = {'torch', 'numpy', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@bounded
@given(st.binary(max_size=300))
def test_random_bytes_never_crash_the_check(tmp_path: Path, content: bytes) -> None:
    report = judged(tmp_path, content)
    assert report.finding_count >= len(report.findings) > 0 or report.rows > 0
    report.SerializeToString()


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["messages", "role", "content", "prompt", "completion", "weight"]), inner)
    ),
    max_leaves=12,
)


@bounded
@given(st.lists(st.dictionaries(st.sampled_from(["messages", "prompt", "completion", "input"]), _json), max_size=4))
def test_any_json_gives_the_same_findings_as_lines_and_as_an_array(tmp_path: Path, values: list[object]) -> None:
    texts = [json.dumps(value) for value in values]
    as_lines = judged(tmp_path, "\n".join(texts).encode())
    as_array = judged(tmp_path, f"[{','.join(texts)}]".encode())
    assert as_lines == as_array


@bounded
@given(st.integers(0, 20_000), st.sampled_from(["[", '{"a":', '[{"messages":']), st.booleans())
def test_deep_nesting_never_crashes_the_check(tmp_path: Path, depth: int, opening: str, in_a_row: bool) -> None:
    content = ('{"messages": ' if in_a_row else "") + opening * depth
    assert judged(tmp_path, content.encode()).finding_count > 0
