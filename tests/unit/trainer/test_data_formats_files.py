"""From whole files to records: one format a file, every public sample, any damage, the memory of one row."""

import base64
import copy
import itertools
import json
import random
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from luthier_trainer.data.formats import convert, detect, records
from luthier_trainer.data.problem import Problem
from luthier_trainer.data.reading import FileFormat, Format, Reading
from luthier_trainer.data.records import (
    Chat,
    Preference,
    Prompt,
    Record,
    Text,
    Unpaired,
    images,
    passages,
    plain,
)

DATASETS = Path(__file__).parents[2] / "samples" / "datasets"
QUESTION_AND_ANSWER = {"prompt": "question", "completion": "answer"}


def read(path: Path, **reading: Any) -> tuple[Reading, list[Record]]:
    with records(path, Reading(**reading)) as found:
        result = list(found)
    problems = [(line, record) for line, record, _ in result if isinstance(record, Problem)]
    assert not problems
    return found.reading, [record for _, record, _ in result if not isinstance(record, Problem)]


def judged(path: Path, *rows: object, **reading: Any) -> list[tuple[int, str]]:
    """The problems of a file of these rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with records(path, Reading(**reading)) as found:
        return [(line, record.code) for line, record, _ in found if isinstance(record, Problem)]


def zipped(path: Path, rows: Path, folder: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(rows, rows.name)
        for image in sorted(folder.iterdir()):
            archive.write(image, f"{folder.name}/{image.name}")
    return path


@pytest.mark.parametrize(
    ("name", "expected", "kind", "rows"),
    [
        ("messages.jsonl", Format.MESSAGES, Chat, 4),
        ("messages-tools.jsonl", Format.MESSAGES, Chat, 4),
        ("messages-parts.jsonl", Format.MESSAGES, Chat, 2),
        ("weights.jsonl", Format.MESSAGES, Chat, 2),
        ("data-url.jsonl", Format.MESSAGES, Chat, 1),
        ("prompt-completion.jsonl", Format.PROMPT_COMPLETION, Chat, 3),
        ("instruction.json", Format.INSTRUCTION, Chat, 3),
        ("sharegpt.json", Format.SHAREGPT, Chat, 4),
        ("sharegpt-tools.json", Format.SHAREGPT, Chat, 2),
        ("text.jsonl", Format.TEXT, Text, 3),
        ("preference-prompt.jsonl", Format.PREFERENCE, Preference, 4),
        ("preference-sharegpt.jsonl", Format.PREFERENCE, Preference, 2),
        ("preference-openai.jsonl", Format.PREFERENCE, Preference, 2),
        ("unpaired.jsonl", Format.UNPAIRED_PREFERENCE, Unpaired, 4),
        ("prompt-only.jsonl", Format.PROMPT_ONLY, Prompt, 3),
    ],
)
def test_each_small_dataset_is_detected_and_read(name: str, expected: Format, kind: type, rows: int) -> None:
    reading, found = read(DATASETS / name)
    file_format = FileFormat.JSON if name.endswith(".json") else FileFormat.JSONL
    assert reading == Reading(file_format, expected)
    assert [type(record) for record in found] == [kind] * rows


def test_a_table_of_questions_is_read_with_a_mapping_and_without_one_says_which() -> None:
    path = DATASETS / "question-answer.csv"
    reading, found = read(path, columns=QUESTION_AND_ANSWER)
    assert reading == Reading(FileFormat.CSV, Format.PROMPT_COMPLETION, QUESTION_AND_ANSWER)
    assert len(found) == 3
    with records(path) as unmapped:
        problems = [record for _, record, _ in unmapped]
    assert unmapped.reading.format is None
    assert all(isinstance(problem, Problem) and problem.code == "UNKNOWN_FORMAT" for problem in problems)
    assert "--column prompt=question --column completion=answer" in getattr(problems[0], "fix", "")


def test_an_archive_with_images_is_read_and_its_rows_alone_miss_them(tmp_path: Path) -> None:
    rows = DATASETS / "images" / "rows.jsonl"
    reading, found = read(zipped(tmp_path / "images.zip", rows, rows.parent / "pictures"))
    assert reading == Reading(FileFormat.ZIP, Format.MESSAGES)
    assert [len(images(record.messages)) for record in found if isinstance(record, Chat)] == [1, 2, 3]
    with records(rows) as alone:
        codes = [record.code for _, record, _ in alone if isinstance(record, Problem)]
    assert codes == ["IMAGE_MISSING"] * 3


def test_a_row_of_another_format_is_refused_and_the_first_one_decides(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    pair = {"prompt": "a", "completion": "b"}
    path = tmp_path / "rows.jsonl"
    assert judged(path, {}, chat, pair, {"message": []}, chat) == [
        (1, "UNKNOWN_FORMAT"),
        (3, "MIXED_FORMATS"),
        (4, "UNKNOWN_FORMAT"),
    ]
    assert judged(path, pair, chat) == [(2, "MIXED_FORMATS")]
    assert judged(path, chat | {"label": True}, chat) == [(2, "MIXED_FORMATS")]
    assert judged(path, chat | {"label": True}, chat | {"label": "maybe"}) == [(2, "BAD_LABEL")]


def test_rows_that_fit_the_decided_format_need_not_be_detected_each(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": "b", "answer": "c"}, {"text": "d", "label": 1}]
    assert judged(tmp_path / "rows.jsonl", *rows) == []


def test_of_a_named_format_the_missing_field_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    chat = {"messages": [], "question": "a", "answer": "b"}
    assert judged(path, chat, format=Format.PROMPT_COMPLETION) == [(1, "MISSING_FIELD")]
    with records(path, Reading(format=Format.PROMPT_COMPLETION)) as found:
        ((_, problem, row),) = found
    assert row == chat
    assert isinstance(problem, Problem)
    assert problem.message == 'The row has no "prompt".'
    assert "--column prompt=question --column completion=answer" in problem.fix
    assert judged(path, {"prompt": "a", "completion": "b"}, {"prompt": "c"}, format=Format.PROMPT_ONLY) == []


def test_answers_without_a_prompt_are_told_where_it_may_be(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    answers = {"chosen": "a", "rejected": "b"}
    assert judged(path, answers, {"question": "q"} | answers) == [(1, "MISSING_FIELD"), (2, "MISSING_FIELD")]
    with records(path) as found:
        fixes = [record.fix for _, record, _ in found if isinstance(record, Problem)]
    assert fixes[0] == "Write it, or write both answers as turns that begin with it."
    assert "--column prompt=question" in fixes[1]


def test_a_table_with_the_bytes_of_images_is_read_without_an_archive(tmp_path: Path) -> None:
    picture = (DATASETS / "images" / "pictures" / "red.png").read_bytes()
    turns = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "Red."}]
    path = tmp_path / "rows.parquet"
    table = pa.table({"messages": [turns, turns], "images": [[{"bytes": picture, "path": "red.png"}]] * 2})
    pq.write_table(table, path)
    reading, found = read(path)
    assert reading == Reading(FileFormat.PARQUET, Format.MESSAGES)
    for record in found:
        assert isinstance(record, Chat)
        assert images(record.messages) == [f"data:image/png;base64,{base64.b64encode(picture).decode()}"]


def test_a_file_without_rows_is_one_problem(tmp_path: Path) -> None:
    assert judged(tmp_path / "rows.jsonl") == [(0, "EMPTY_FILE")]


def test_a_row_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\nbroken\n')
    with records(path) as found:
        (first, second) = found
    assert first == (1, Text("a"), {"text": "a"})
    assert (second[0], second[2]) == (2, None)
    assert isinstance(second[1], Problem)


def test_lines_are_read_one_at_a_time_in_flat_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl"
    with open(path, "w") as file:
        file.writelines(json.dumps({"prompt": "x" * 1000, "completion": "y"}) + "\n" for _ in range(20_000))
    tracemalloc.start()
    try:
        with records(path) as found:
            assert sum(isinstance(record, Chat) for _, record, _ in found) == 20_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 20_000_000
    assert peak < 8_000_000


def test_reading_starts_before_the_file_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "two.jsonl"
    path.write_text('{"text": "a"}\nbroken\n')
    with records(path) as found:
        assert [line for line, _, _ in itertools.islice(found, 1)] == [1]


@pytest.mark.parametrize(
    ("name", "expected", "kind", "rows", "columns"),
    [
        ("alpaca_en_demo.json", Format.INSTRUCTION, Chat, 999, {}),
        ("identity.json", Format.INSTRUCTION, Chat, 91, {}),
        ("glaive_toolcall_en_demo.json", Format.SHAREGPT, Chat, 300, {}),
        ("dpo_en_demo.json", Format.PREFERENCE, Preference, 300, {}),
        ("kto_en_demo.json", Format.UNPAIRED_PREFERENCE, Unpaired, 300, {}),
        ("c4_demo.jsonl", Format.TEXT, Text, 300, {}),
        ("gsm8k_train.jsonl", Format.PROMPT_COMPLETION, Chat, 2000, QUESTION_AND_ANSWER),
        ("gsm8k_test.jsonl", Format.PROMPT_COMPLETION, Chat, 400, QUESTION_AND_ANSWER),
    ],
)
def test_the_public_samples_are_read_whole_and_without_a_problem(
    samples: Path, name: str, expected: Format, kind: type, rows: int, columns: dict[str, str]
) -> None:
    reading, found = read(samples / name, columns=columns)
    assert reading.format is expected
    assert [type(record) for record in found] == [kind] * rows


def test_the_answers_of_the_public_samples_are_where_they_belong(samples: Path) -> None:
    for name, columns in (("alpaca_en_demo.json", {}), ("gsm8k_test.jsonl", QUESTION_AND_ANSWER)):
        path = samples / name
        text = path.read_text()
        originals = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
        _, found = read(path, columns=columns)
        for record, original in zip(found, originals, strict=True):
            assert isinstance(record, Chat)
            answer = original["output" if "output" in original else "answer"]
            assert record.messages[-1] == {"role": "assistant", "content": answer}


def test_the_calls_of_the_public_sample_are_all_there(samples: Path) -> None:
    path = samples / "glaive_toolcall_en_demo.json"
    _, found = read(path)
    for record, original in zip(found, json.loads(path.read_text()), strict=True):
        assert isinstance(record, Chat)
        calls = [turn for turn in original["conversations"] if turn["from"] == "function_call"]
        made = [call["function"] for turn in record.messages for call in turn.get("tool_calls", [])]
        assert made == [json.loads(turn["value"]) for turn in calls]
        assert [tool["function"] for tool in record.tools] == json.loads(original["tools"])


def test_the_public_sample_with_images_is_read_from_an_archive(samples: Path, tmp_path: Path) -> None:
    path = samples / "mllm_demo.json"
    _, found = read(zipped(tmp_path / "mllm.zip", path, samples / "mllm_demo_data"))
    for record, original in zip(found, json.loads(path.read_text()), strict=True):
        assert isinstance(record, Chat)
        assert images(record.messages) == original["images"]
        assert [plain(turn) for turn in record.messages] == [turn["content"] for turn in original["messages"]]


def test_no_damage_to_a_row_makes_a_converter_raise() -> None:
    random_ = random.Random(1)
    odd: list[Any] = [None, True, 0, -1.5, 10**30, "", "\0", "x", "[", "[]", [], {}, [[]], [{}], ["a"], {"role": 3}]
    rows = list(_sample_rows())
    for _ in range(20_000):
        row = copy.deepcopy(random_.choice(rows))
        for _ in range(random_.randint(1, 3)):
            place, key = random_.choice(list(_places(row)))
            place[key] = copy.deepcopy(random_.choice(odd)) if random_.random() < 0.8 else copy.deepcopy(row)
        if random_.random() < 0.3:
            row.pop(random_.choice(list(row)))
        for row_format in {detect(row), random_.choice(list(Format))} - {None}:
            assert row_format is not None
            record = convert(row, row_format)
            if isinstance(record, Problem):
                assert record.code.isupper()
                assert len(record.message) < 1500
            else:
                _is_well_formed(record)


def _is_well_formed(record: Record) -> None:
    for passage in passages(record):
        for turn in passage.messages or []:
            assert turn["role"] in ("system", "user", "assistant", "tool")
            assert isinstance(plain(turn), str)
            assert all(isinstance(call["function"]["arguments"], dict) for call in turn.get("tool_calls", []))
        assert passage.messages or passage.text


def _sample_rows() -> Iterator[dict[str, Any]]:
    for path in sorted(DATASETS.rglob("*.json*")):
        text = path.read_text()
        yield from json.loads(text) if text.startswith("[") else map(json.loads, text.splitlines())


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a value that something else can be put in."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])
