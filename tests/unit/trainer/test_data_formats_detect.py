"""The format is told by keys; where it cannot be, the fix names the option that helps."""

import time
from typing import Any

import pytest

from luthier_trainer.data.formats import convert, detect
from luthier_trainer.data.formats.unknown import unknown
from luthier_trainer.data.problem import Problem
from luthier_trainer.data.reading import Format
from luthier_trainer.data.records import Text

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": []}, Format.MESSAGES),
        ({"messages": [], "prompt": "", "completion": "", "text": ""}, Format.MESSAGES),
        ({"messages": [], "conversations": []}, Format.MESSAGES),
        ({"messages": None, "conversations": []}, Format.SHAREGPT),
        ({"messages": None}, Format.MESSAGES),
        ({"conversations": [], "id": "1"}, Format.SHAREGPT),
        ({"conversations": [], "chosen": None, "rejected": None}, Format.SHAREGPT),
        ({"prompt": "", "completion": ""}, Format.PROMPT_COMPLETION),
        ({"prompt": "", "completion": None}, Format.PROMPT_COMPLETION),
        ({"prompt": "", "completion": "", "label": None}, Format.PROMPT_COMPLETION),
        ({"instruction": "", "output": ""}, Format.INSTRUCTION),
        ({"instruction": "", "input": "", "output": "", "text": ""}, Format.INSTRUCTION),
        ({"instruction": "", "input": ""}, None),
        ({"text": ""}, Format.TEXT),
        ({"text": "", "source": "", "prompt": None}, Format.TEXT),
        ({"text": "", "target": ""}, None),
        ({"text": []}, None),
        ({"prompt": "", "chosen": "", "rejected": "", "messages": []}, Format.PREFERENCE),
        ({"input": {}, "preferred_output": [], "non_preferred_output": []}, Format.PREFERENCE),
        ({"prompt": "", "chosen": ""}, None),
        ({"prompt": "", "completion": "", "label": False}, Format.UNPAIRED_PREFERENCE),
        ({"prompt": "", "completion": "", "label": 7}, Format.PROMPT_COMPLETION),
        ({"prompt": "", "answer": ""}, Format.PROMPT_ONLY),
        ({"prompt": "", "label": "34"}, None),
        ({"prompt": "", "response": ""}, None),
        ({"question": "", "answer": ""}, None),
        ({}, None),
    ],
)
def test_the_format_is_told_by_keys_and_the_richer_one_wins(row: dict[str, Any], expected: Format | None) -> None:
    assert detect(row) is expected


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ({"question": "q", "answer": "a"}, "--column prompt=question --column completion=answer"),
        ({"query": "q", "response": "a"}, "--column prompt=query --column completion=response"),
        ({"input": "q", "target": "a"}, "--column prompt=input --column completion=target"),
        ({"input": "q", "output": "a"}, "--column prompt=input --column completion=output"),
        ({"instruction": "q", "response": "a"}, "--column output=response"),
        ({"instruction": "q", "context": "c", "response": "a"}, "--column input=context --column output=response"),
        (
            {"question": "q", "context": "c", "answer": "a"},
            "--column instruction=question --column input=context --column output=answer",
        ),
        ({"Question": "q", "Answer": "a"}, "--column prompt=Question --column completion=Answer"),
        ({"prompt": "q", "response": "a"}, "--column completion=response (or --format prompt_only"),
        ({"text": "q", "summary": "a"}, "--column prompt=text --column completion=summary"),
        (
            {"question": "q", "chosen": "a", "reject": "b"},
            "--column prompt=question --column rejected=reject",
        ),
        ({"dialogue": TURNS}, "--column messages=dialogue"),
        ({"chat": [{"from": "human", "value": "a"}]}, "--column conversations=chat"),
        ({"content": "a long story"}, "--column text=content"),
        ({"message": []}, "--column messages=message"),
        ({"my prompt": "x", "promt": "q"}, "--column prompt=promt"),
        ({"prompt": "q", "label": "34"}, "--format prompt_only"),
        ({"a": 1}, "--column prompt=COLUMN --column completion=COLUMN"),
        ({}, "--column prompt=COLUMN --column completion=COLUMN"),
    ],
)
def test_a_row_of_no_known_format_gets_the_option_that_would_help(row: dict[str, Any], options: str) -> None:
    problem = unknown(row)
    assert problem.code == "UNKNOWN_FORMAT"
    assert options in problem.fix


def test_a_column_that_is_mapped_to_a_misspelt_field_is_told_the_nearest_field() -> None:
    # As `--column promt=question` leaves the row.
    assert unknown({"promt": "q", "answer": "a"}).fix == (
        'Did you mean "prompt" by "promt"? Then say --column prompt=promt or, where a --column has made it "promt" (no'
        ' field of any format), make that "prompt"'
    )


def test_the_names_of_columns_are_quoted_for_a_shell() -> None:
    assert "--column 'messages=my $(talk)'" in unknown({"my $(talk)": TURNS}).fix


@pytest.mark.parametrize(
    ("row", "mapped"),
    [
        ({"question": "q", "answer": "a"}, Format.PROMPT_COMPLETION),
        ({"question": "q", "context": "c", "answer": "a"}, Format.INSTRUCTION),
        ({"instruction": "q", "response": "a"}, Format.INSTRUCTION),
        ({"prompt": "q", "response": "a"}, Format.PROMPT_COMPLETION),
        ({"text": "q", "summary": "a"}, Format.PROMPT_COMPLETION),
        ({"content": "a long story"}, Format.TEXT),
        ({"dialogue": TURNS}, Format.MESSAGES),
        ({"question": "q", "chosen": "a", "reject": "b"}, Format.PREFERENCE),
    ],
)
def test_the_option_that_is_named_does_help(row: dict[str, Any], mapped: Format) -> None:
    options = [word.partition("=") for word in unknown(row).fix.split() if "=" in word]
    sources = {source for _, _, source in options}
    renamed = {key: value for key, value in row.items() if key not in sources}
    renamed |= {field: row[source] for field, _, source in options}
    assert detect(renamed) is mapped
    assert not isinstance(convert(renamed, mapped), Problem)


def test_no_row_makes_guessing_slow_or_its_message_long() -> None:
    rows: list[dict[str, Any]] = [
        {"k" * 1_000_000: 1},
        {f"promp{number}": number for number in range(100_000)},
        {"\u202e\x1b[2J": 1, "": []},
        {"a": [{}], "": [{"role": 1, "content": 2}]},
    ]
    start = time.perf_counter()
    for row in rows:
        problem = unknown(row)
        assert len(problem.message) < 1500
        assert len(problem.fix) < 300
        assert problem.message.isprintable()
        assert problem.fix.isprintable()
    assert time.perf_counter() - start < 2


def test_raw_text_is_taken_whole_and_empty_text_is_refused() -> None:
    assert convert({"text": " a\n", "id": 1}, Format.TEXT) == Text(" a\n")
    for text, code in ((" \n", "EMPTY_TEXT"), ("", "EMPTY_TEXT"), ("\0", "BAD_CONTENT"), (3, "BAD_CONTENT")):
        problem = convert({"text": text}, Format.TEXT)
        assert isinstance(problem, Problem)
        assert problem.code == code
