"""What each format becomes, and that other formats' habits are not silently misread."""

import itertools
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from luthier_trainer.data.formats import Conversation, Format, Problem, conversations, convert, detect, rows

REPOSITORY = Path(__file__).parents[3]


def conversation_of(value: dict[str, Any]) -> Conversation:
    found = detect(value)
    assert found is not None
    result = convert(value, found)
    assert not isinstance(result, Problem), result
    return result


def problem_of(value: dict[str, Any]) -> str:
    found = detect(value)
    assert found is not None
    result = convert(value, found)
    assert isinstance(result, Problem)
    return result.code


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def test_messages_stay_as_they_are_without_other_keys() -> None:
    turns = [{"role": "system", "content": ""}, user("a"), user("b"), assistant("c"), user("d")]
    noisy = [turn | {"name": "x", "id": 3} for turn in turns]
    assert conversation_of({"messages": noisy, "source": "web"}) == turns


def test_a_prompt_and_a_completion_are_two_turns() -> None:
    assert conversation_of({"prompt": "a", "completion": " b"}) == [user("a"), assistant(" b")]


def test_of_a_conversational_prompt_only_the_completion_is_trained() -> None:
    value = {"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("d")]}
    assert conversation_of(value) == [user("a"), assistant("b", weight=0), user("c"), assistant("d")]


def test_instruction_and_input_are_one_turn_with_a_blank_line_between() -> None:
    value = {"instruction": "add", "input": "1 2", "output": "3"}
    assert conversation_of(value) == [user("add\n\n1 2"), assistant("3")]
    assert conversation_of(value | {"input": ""}) == [user("add"), assistant("3")]
    assert conversation_of(value | {"input": None}) == [user("add"), assistant("3")]


def test_system_and_history_of_an_instruction_are_honoured() -> None:
    value = {"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]]}
    expected = [{"role": "system", "content": "s"}, user("a"), assistant("b"), user("c"), assistant("d")]
    assert conversation_of(value) == expected


def test_a_weight_of_nought_keeps_a_turn_as_context() -> None:
    value = {"messages": [user("a"), assistant("b", weight=0), user("c"), assistant("d", weight=1)]}
    assert conversation_of(value) == [user("a"), assistant("b", weight=0), user("c"), assistant("d")]


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ({"messages": [user("a"), assistant("b", weight=0)]}, "NO_ASSISTANT_TURN"),
        ({"messages": [user("a"), assistant("b", weight=0.5)]}, "BAD_CONTENT"),
        ({"messages": [user("a"), assistant("b", weight=True)]}, "BAD_CONTENT"),
        ({"messages": [user("a"), assistant("b", tool_calls=[{}])]}, "NOT_SUPPORTED"),
        ({"messages": [user("a"), assistant("b", reasoning_content="hm")]}, "NOT_SUPPORTED"),
        ({"prompt": 3, "completion": "b"}, "BAD_CONTENT"),
        ({"prompt": "a", "completion": None}, "BAD_CONTENT"),
        ({"prompt": "a", "completion": ""}, "EMPTY_ASSISTANT"),
        ({"prompt": [user("a")], "completion": [user("b")]}, "NO_ASSISTANT_TURN"),
        ({"instruction": "a", "output": ["b"]}, "BAD_CONTENT"),
        ({"instruction": "a", "output": "b", "history": "c"}, "BAD_CONTENT"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, "BAD_CONTENT"),
        ({"instruction": "a", "output": "b", "images": ["x.jpg"]}, "NOT_SUPPORTED"),
    ],
)
def test_what_would_change_the_training_silently_is_refused(value: dict[str, Any], code: str) -> None:
    assert problem_of(value) == code


def test_the_format_is_told_by_keys_and_messages_win() -> None:
    assert detect({"messages": [], "prompt": "", "completion": ""}) is Format.MESSAGES
    assert detect({"prompt": "", "completion": ""}) is Format.PROMPT_COMPLETION
    assert detect({"instruction": "", "output": ""}) is Format.INSTRUCTION
    assert detect({"instruction": "", "input": ""}) is None


def test_lines_are_read_one_at_a_time_in_flat_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl"
    with open(path, "w") as file:
        file.writelines(json.dumps({"prompt": "x" * 1000, "completion": "y"}) + "\n" for _ in range(20_000))
    tracemalloc.start()
    try:
        assert sum(1 for _ in conversations(path)) == 20_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 20_000_000
    assert peak < 4_000_000


def test_reading_starts_before_the_file_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "two.jsonl"
    path.write_text('{"a": 1}\nbroken\n')
    assert [row.line for row in itertools.islice(rows(path), 1)] == [1]


def sample_data(name: str) -> Path:
    path = Path(os.environ.get("LUTHIER_TEST_DATA") or REPOSITORY.parent / "shared" / "data") / name
    if not path.is_file():
        pytest.skip(f"{name} is not here")
    return path


def test_the_alpaca_sample_is_read_whole() -> None:
    path = sample_data("alpaca_en_demo.json")
    expected = json.loads(path.read_text())
    read = list(conversations(path))
    assert [line for line, _, _ in read] == list(range(1, len(expected) + 1))
    for (_, row_format, conversation), original in zip(read, expected, strict=True):
        assert row_format is Format.INSTRUCTION
        assert not isinstance(conversation, Problem)
        assert conversation[-1] == assistant(original["output"])


def test_the_gsm8k_sample_is_refused_with_a_hint_and_read_once_renamed(tmp_path: Path) -> None:
    source = sample_data("gsm8k_train.jsonl")
    (_, _, first) = next(conversations(source))
    assert isinstance(first, Problem)
    assert 'Call "question" "prompt"' in first.message
    originals = [json.loads(line) for line in source.read_text().splitlines()]
    renamed = tmp_path / "gsm8k.jsonl"
    renamed.write_text(
        "".join(json.dumps({"prompt": o["question"], "completion": o["answer"]}) + "\n" for o in originals)
    )
    read = [conversation for _, _, conversation in conversations(renamed)]
    assert read == [[user(o["question"]), assistant(o["answer"])] for o in originals]
