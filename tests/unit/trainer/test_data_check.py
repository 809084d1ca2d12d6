"""The structural check: what it finds, the module as the server runs it, and what no file may make it do."""

import gzip
import json
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luthier.v1 import dataset_pb2, dataset_report_pb2
from luthier_trainer.data import check as check_module
from luthier_trainer.data.check import check
from luthier_trainer.data.reading import Format, Reading

GOOD = b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}\n'
ERROR = dataset_report_pb2.FINDING_LEVEL_ERROR
WARNING = dataset_report_pb2.FINDING_LEVEL_WARNING
NOTE = dataset_report_pb2.FINDING_LEVEL_NOTE
bounded = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def judged(tmp_path: Path, content: bytes, reading: Reading | None = None) -> dataset_report_pb2.DatasetReport:
    path = tmp_path / "blob"
    path.write_bytes(content)
    return check(path, reading or Reading(), tmp_path)


def found(tmp_path: Path, content: bytes, reading: Reading | None = None) -> list[tuple[int, int, str]]:
    report = judged(tmp_path, content, reading)
    assert sum(count.count for count in report.counts) == len(report.findings)
    return [(finding.line, finding.level, finding.code) for finding in report.findings]


def row(*turns: tuple[str, Any], **more: Any) -> bytes:
    return json.dumps({"messages": [{"role": r, "content": c} for r, c in turns], **more}).encode() + b"\n"


USER, ANSWER = ("user", "hi"), ("assistant", "hello")
OTHER = row(("user", "Which is the largest ocean?"), ("assistant", "The Pacific."))


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("NOT_UTF8", b'{"messages": "\xff"}\n'),
        ("NOT_JSON", b'{"messages": [}\n'),
        ("TOO_DEEP", b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}\n"),
        ("NOT_AN_OBJECT", b"[1]\n"),
        ("MIXED_FORMATS", b'{"prompt": "a", "completion": "b"}\n'),
        ("EMPTY_CONVERSATION", row()),
        ("BAD_ROLE", row(USER, ("assistent", "hello"))),
        ("NO_ASSISTANT_TURN", row(USER)),
        ("ROLES_OUT_OF_ORDER", row(USER, ("system", "late"), ANSWER)),
    ],
)
def test_a_wrong_line_between_good_ones_is_found_at_its_number(tmp_path: Path, code: str, line: bytes) -> None:
    report = judged(tmp_path, GOOD + line + OTHER)
    assert [(finding.line, finding.level, finding.code) for finding in report.findings] == [(2, ERROR, code)]
    assert [(count.level, count.code, count.count) for count in report.counts] == [(ERROR, code, 1)]
    assert report.rows == 3
    assert report.statistics.rows == 2
    assert report.reading.format == dataset_pb2.DATASET_FORMAT_MESSAGES
    assert report.reading.file_format == dataset_pb2.FILE_FORMAT_JSONL
    message = report.findings[0].message
    assert message.endswith((".", "?"))
    assert message.isprintable()


@pytest.mark.parametrize(
    ("line", "level", "code"),
    [
        (row(("user", "So?"), ANSWER, ("user", "And now?")), NOTE, "NOTHING_AFTER_LAST_ANSWER"),
        (row(("user", " \n"), ANSWER), WARNING, "BLANK_TURN"),
        (GOOD, WARNING, "DUPLICATE_ROW"),
        (b'{"id": 7, ' + GOOD[1:], WARNING, "DUPLICATE_ROW"),
        (row(USER, ("assistant", "good evening")), NOTE, "SAME_PROMPT"),
        (row(("user", "mine: AKIAQ7RZ4WK3M5TXB6UP"), ANSWER), WARNING, "POSSIBLE_SECRET"),
        (row(("user", "I am ada.lovelace@analytical.org"), ANSWER), NOTE, "POSSIBLE_PERSONAL_DATA"),
        (row(("user", "caf\u00c3\u00a9"), ANSWER), WARNING, "ODD_ENCODING"),
        (row(("user", "a\x07b"), ANSWER), WARNING, "ODD_ENCODING"),
    ],
)
def test_what_is_probably_not_meant_is_found_and_refuses_nothing(
    tmp_path: Path, line: bytes, level: int, code: str
) -> None:
    assert found(tmp_path, GOOD + line + OTHER) == [(2, level, code)]


@pytest.mark.parametrize(
    ("line", "level", "code"),
    [
        (b'{"text": " \\n"}\n', WARNING, "EMPTY_ROW"),
        (b'{"prompt": "a", "chosen": "b", "rejected": "b"}\n', WARNING, "SAME_ANSWERS"),
    ],
)
def test_rows_without_anything_to_learn_are_found_in_other_formats(
    tmp_path: Path, line: bytes, level: int, code: str
) -> None:
    report = judged(tmp_path, line)
    # The format's own check may call it an error already.
    assert [finding.line for finding in report.findings] == [1]
    if report.findings[0].level != ERROR:
        assert (report.findings[0].level, report.findings[0].code) == (level, code)


def test_several_answers_to_one_prompt_are_what_preference_data_is_made_of(tmp_path: Path) -> None:
    lines = b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": "d", "rejected": "c"}\n'
    assert found(tmp_path, lines) == []
    lines = b'{"prompt": "a", "completion": "b", "label": true}\n{"prompt": "a", "completion": "c", "label": false}\n'
    assert found(tmp_path, lines) == []


def test_the_same_system_turn_in_all_rows_is_no_finding(tmp_path: Path) -> None:
    system = ("system", "You are a helpful assistant.")
    rows = [row(system, ("user", f"What is {n} + 1?"), ("assistant", str(n + 1))) for n in range(20)]
    assert found(tmp_path, b"".join(rows)) == []


def test_statistics_count_turns_characters_images_tools_and_lengths(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
    report = judged(
        tmp_path,
        row(("system", "Be brief."), ("user", "a" * 20), ("assistant", "b" * 100))
        + row(("user", "12345"), ("assistant", "67"), tools=[tool]),
    )
    statistics = report.statistics
    assert (statistics.rows, statistics.images, statistics.rows_with_tools) == (2, 0, 1)
    assert dict(statistics.turns) == {"system": 1, "user": 2, "assistant": 2}
    assert dict(statistics.characters) == {"system": 9, "user": 25, "assistant": 102}
    assert [(bucket.up_to, bucket.rows) for bucket in statistics.lengths] == [
        (16, 1),
        (32, 0),
        (64, 0),
        (128, 0),
        (256, 1),
    ]


def test_a_row_far_longer_than_the_others_is_noted(tmp_path: Path) -> None:
    rows = [row(("user", f"Question {n}?"), ("assistant", "yes" * 40)) for n in range(50)]
    rows[30] = row(("user", "All of it?"), ("assistant", "word " * 20_000))
    report = judged(tmp_path, b"".join(rows))
    assert [(finding.line, finding.code) for finding in report.findings] == [(31, "LONG_ROW")]
    assert "100,010 characters" in report.findings[0].message


@pytest.mark.parametrize("content", [b"", b"\n \r\n\n", b"\xef\xbb\xbf", b"[]", b" [ ] \n"])
def test_a_file_without_rows_is_empty(tmp_path: Path, content: bytes) -> None:
    report = judged(tmp_path, content)
    assert [(finding.line, finding.code) for finding in report.findings] == [(0, "EMPTY_FILE")]
    assert (report.rows, report.reading.format) == (0, 0)


def test_columns_and_format_that_are_named_are_in_the_report(tmp_path: Path) -> None:
    reading = Reading(None, Format.PROMPT_COMPLETION, {"prompt": "question", "completion": "answer"})
    report = judged(tmp_path, b'{"question": "1 + 1?", "answer": "2"}\n', reading)
    assert not report.findings
    assert report.reading == dataset_pb2.DatasetReading(
        file_format=dataset_pb2.FILE_FORMAT_JSONL,
        format=dataset_pb2.DATASET_FORMAT_PROMPT_COMPLETION,
        columns={"prompt": "question", "completion": "answer"},
    )


def test_all_wrong_lines_are_counted_and_the_first_thousand_listed(tmp_path: Path) -> None:
    report = judged(tmp_path, GOOD + b"x\n" * 2500 + GOOD * 3)
    assert [finding.line for finding in report.findings] == list(range(2, 1002))
    assert [(count.code, count.count) for count in report.counts] == [("NOT_JSON", 2500), ("DUPLICATE_ROW", 3)]


def test_memory_that_runs_out_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> Any:
        raise MemoryError

    monkeypatch.setattr(check_module, "records", exhausted)
    assert found(tmp_path, GOOD) == [(0, ERROR, "FILE_TOO_LARGE")]


@pytest.mark.parametrize(
    ("name", "rows", "file_format", "row_format", "codes"),
    [
        ("alpaca_en_demo.json", 999, "JSON", "INSTRUCTION", {"DUPLICATE_ROW"}),
        ("identity.json", 91, "JSON", "INSTRUCTION", {"SAME_PROMPT"}),
        (
            "glaive_toolcall_en_demo.json",
            300,
            "JSON",
            "SHAREGPT",
            {"DUPLICATE_ROW", "POSSIBLE_SECRET", "SAME_PROMPT"},
        ),
        ("dpo_en_demo.json", 300, "JSON", "PREFERENCE", {"DUPLICATE_ROW", "ODD_ENCODING"}),
        ("kto_en_demo.json", 300, "JSON", "UNPAIRED_PREFERENCE", {"ODD_ENCODING"}),
        ("c4_demo.jsonl", 300, "JSONL", "TEXT", {"LONG_ROW", "ODD_ENCODING", "POSSIBLE_PERSONAL_DATA"}),
    ],
)
def test_public_samples_have_no_errors(
    samples: Path, tmp_path: Path, name: str, rows: int, file_format: str, row_format: str, codes: set[str]
) -> None:
    report = check(samples / name, Reading(), tmp_path)
    assert report.rows == report.statistics.rows == rows
    assert dataset_pb2.FileFormat.Name(report.reading.file_format) == f"FILE_FORMAT_{file_format}"
    assert dataset_pb2.DatasetFormat.Name(report.reading.format) == f"DATASET_FORMAT_{row_format}"
    assert {count.code for count in report.counts} == codes
    assert not [finding for finding in report.findings if finding.level == ERROR]


def test_public_samples_with_other_columns_have_no_errors(samples: Path, tmp_path: Path) -> None:
    reading = Reading(columns={"prompt": "question", "completion": "answer"})
    report = check(samples / "gsm8k_train.jsonl", reading, tmp_path)
    assert (report.rows, list(report.counts)) == (2000, [])


def test_images_that_did_not_come_along_are_an_error_of_each_row(samples: Path, tmp_path: Path) -> None:
    report = check(samples / "mllm_demo.json", Reading(), tmp_path)
    assert [(count.level, count.code, count.count) for count in report.counts] == [(ERROR, "IMAGE_MISSING", 6)]


def test_images_in_an_archive_are_counted(samples: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in (samples / "mllm_demo.json", *(samples / "mllm_demo_data").iterdir()):
            archive.write(file, file.relative_to(samples))
    report = check(path, Reading(), tmp_path)
    assert (report.rows, report.statistics.images, list(report.counts)) == (6, 8, [])
    assert report.reading.file_format == dataset_pb2.FILE_FORMAT_ZIP


def run_module(*arguments: object, before: str = "") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "luthier_trainer.data.check"]
    if before:
        first = "import sys\nfrom luthier_trainer.data import check\n"
        last = "\nsys.exit(check.main(sys.argv[1:]))"
        command = [sys.executable, "-c", first + textwrap.dedent(before) + last]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, timeout=60, check=False)


def report_of(done: subprocess.CompletedProcess[bytes]) -> dataset_report_pb2.DatasetReport:
    assert (done.returncode, done.stderr) == (0, b"")
    return dataset_report_pb2.DatasetReport.FromString(done.stdout)


def test_the_module_writes_a_report_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"x\n")
    report = report_of(run_module(path))
    assert (report.rows, report.findings[0].line, report.findings[0].code) == (2, 2, "NOT_JSON")


def test_the_module_reads_as_it_is_told_and_leaves_nothing_in_its_scratch_folder(tmp_path: Path) -> None:
    path, reading, scratch = tmp_path / "rows", tmp_path / "reading", tmp_path / "scratch"
    path.write_bytes(gzip.compress(b"q;a\nWhere?;Here.\nWhere?;Here.\n", mtime=0))
    wanted = dataset_pb2.DatasetReading(
        format=dataset_pb2.DATASET_FORMAT_PROMPT_COMPLETION, columns={"prompt": "q", "completion": "a"}
    )
    reading.write_bytes(wanted.SerializeToString())
    scratch.mkdir()
    report = report_of(run_module("--reading", reading, "--scratch", scratch, path))
    wanted.file_format = dataset_pb2.FILE_FORMAT_CSV
    assert report.reading == wanted
    assert [(finding.line, finding.code) for finding in report.findings] == [(3, "DUPLICATE_ROW")]
    assert list(scratch.iterdir()) == []


def test_the_module_says_when_there_is_no_file_to_judge(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path, Path("/dev/zero")):
        done = run_module(path)
        assert (done.returncode, done.stdout) == (2, b"")
        assert done.stderr.startswith(b"cannot read the file")


def test_the_module_refuses_a_reading_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(GOOD)
    (tmp_path / "reading").write_bytes(b"\xff\xff")
    done = run_module("--reading", tmp_path / "reading", tmp_path / "rows")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"cannot read the reading")


def test_the_module_survives_a_hostile_array_within_its_memory(tmp_path: Path) -> None:
    path = tmp_path / "hostile"
    path.write_bytes(b"[" + b"{}," * 50_000 + b"[" * 2_000_000)
    report = report_of(run_module(path))
    assert sum(count.count for count in report.counts) == report.rows == 50_001


def test_a_file_of_wrong_rows_is_given_up_before_it_takes_minutes(tmp_path: Path) -> None:
    path = tmp_path / "wrong"
    path.write_bytes(b"{}\n" * 300_000)
    report = report_of(run_module(path))
    assert report.rows == 100_000
    assert {(count.code, count.count) for count in report.counts} == {
        ("UNKNOWN_FORMAT", 100_000),
        ("TOO_MANY_PROBLEMS", 1),
    }


def test_a_bomb_of_tiny_rows_ends_where_the_limit_is(tmp_path: Path) -> None:
    path = tmp_path / "bomb"
    path.write_bytes(gzip.compress(b'{"text":"a"}\n' * 5_000_000))
    report = report_of(run_module(path))
    assert report.rows == 64 * 1024 * 1024 // 256
    assert [each.code for each in report.findings if each.level == dataset_report_pb2.FINDING_LEVEL_ERROR] == [
        "FILE_TOO_LARGE"
    ]


def test_a_file_that_takes_too_long_ends_with_a_finding(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(GOOD)
    endless = """
        import itertools
        from luthier_trainer.data.problem import Level, Problem
        class Endless:
            reading = None
            def __enter__(self): return self
            def __exit__(self, *_): pass
            def __iter__(self): return ((n, Problem("X", "X.", level=Level.WARNING), None) for n in itertools.count(1))
        check.records = lambda *_: Endless()
        check.CPU_SECONDS = 2
    """
    done = run_module(path, before=endless)
    report = report_of(done)
    assert (report.findings[0].line, report.findings[0].code) == (0, "CHECK_TOO_LONG")
    assert len(report.findings) > 100


def test_memory_stays_flat_when_every_row_has_something(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    with open(path, "wb") as file:
        for n in range(60_000):
            file.write(row(("user", f"mail {n % 7}@a.org \ufffd"), ("assistant", f"\u00e2\u20ac {n % 1000}")))
    peak = tmp_path / "peak"
    limited = f"""
        import atexit, pathlib
        # Not ru_maxrss, which a child inherits from the process that started it.
        def tell():
            status = pathlib.Path("/proc/self/status").read_text()
            pathlib.Path({str(peak)!r}).write_text(status.split("VmHWM:")[1].split()[0])
        atexit.register(tell)
    """
    report = report_of(run_module(path, before=limited))
    assert {count.code: count.count for count in report.counts} == {
        "ODD_ENCODING": 60_000,
        "DUPLICATE_ROW": 53_000,
        "POSSIBLE_PERSONAL_DATA": 60_000,
        "SAME_PROMPT": 6_993,
    }
    assert int(peak.read_text()) < 120 * 1024  # KiB


def test_the_check_loads_neither_torch_nor_numpy_nor_transformers() -> None:
    code = (
        "import sys, luthier_trainer.data.check, luthier_trainer.data.derive, luthier_trainer.inspect;"
        "heavy = {'torch', 'numpy', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@bounded
@given(st.binary(max_size=300))
def test_random_bytes_never_crash_the_check(tmp_path: Path, content: bytes) -> None:
    report = judged(tmp_path, content)
    assert report.findings or report.rows > 0
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
    as_lines.reading.file_format = as_array.reading.file_format
    assert as_lines == as_array


_turns = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.text(max_size=30)}), max_size=4
)


@bounded
@given(st.lists(st.fixed_dictionaries({"messages": _turns}), min_size=1, max_size=4))
def test_any_text_in_turns_is_judged_and_counted(tmp_path: Path, values: list[dict[str, Any]]) -> None:
    report = judged(tmp_path, "\n".join(json.dumps(value) for value in values).encode())
    assert report.rows == len(values)
    assert report.statistics.rows + sum(count.count for count in report.counts if count.level == ERROR) == len(values)
    report.SerializeToString()


@bounded
@given(st.integers(0, 20_000), st.sampled_from(["[", '{"a":', '[{"messages":']), st.booleans())
def test_deep_nesting_never_crashes_the_check(tmp_path: Path, depth: int, opening: str, in_a_row: bool) -> None:
    content = ('{"messages": ' if in_a_row else "") + opening * depth
    assert judged(tmp_path, content.encode()).findings


@pytest.mark.parametrize("depth", [200, 300, 900, 1000])
def test_deep_values_that_are_carried_along_never_crash_the_check(tmp_path: Path, depth: int) -> None:
    deep = '{"a":[' * (depth // 2) + "1" + "]}" * (depth // 2)
    line = f'{{"prompt": "What?", "reference": {deep}}}\n'
    report = judged(tmp_path, (line * 2).encode())
    assert report.rows == 2
    codes = {finding.code for finding in report.findings}
    assert codes <= {"DUPLICATE_ROW", "TOO_DEEP", "BAD_CONTENT", "NOT_SUPPORTED"}
    assert codes


def test_the_limit_on_memory_is_set(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(GOOD)
    hungry = "check.check = lambda *_: bytearray(8 * 2**30)"
    done = run_module(path, before=hungry)
    assert done.returncode == 1
    assert b"MemoryError" in done.stderr
