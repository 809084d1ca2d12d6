"""What each format of conversations becomes, and that nothing that changes what is trained is silently misread."""

import json
from typing import Any

import pytest

from luthier_trainer.data.formats import convert, detect
from luthier_trainer.data.problem import Problem
from luthier_trainer.data.reading import Format
from luthier_trainer.data.records import Chat, Conversation


def chat_of(row: dict[str, Any]) -> Chat:
    found = detect(row)
    assert found is not None
    record = convert(row, found)
    assert isinstance(record, Chat), record
    return record


def turns_of(row: dict[str, Any]) -> Conversation:
    return chat_of(row).messages


def problem_of(row: dict[str, Any]) -> Problem:
    found = detect(row)
    assert found is not None
    record = convert(row, found)
    assert isinstance(record, Problem), record
    return record


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


def said(role: str, value: Any, **more: Any) -> dict[str, Any]:
    return {"from": role, "value": value, **more}


def test_messages_stay_as_they_are_without_other_keys() -> None:
    turns = [system(""), user("a"), user("b"), assistant("c"), user("d")]
    noisy = [turn | {"name": "x", "id": 3, "weight": None, "tool_calls": None} for turn in turns]
    assert turns_of({"messages": turns}) == turns
    assert turns_of({"messages": noisy, "source": "web", "tools": None, "images": []}) == turns


def test_a_record_is_no_part_of_its_row() -> None:
    row = {"messages": [user("a"), assistant("b")]}
    turns_of(row)[1]["content"] = "changed"
    assert row == {"messages": [user("a"), assistant("b")]}


@pytest.mark.parametrize(
    ("role", "known"), [("developer", "system"), ("human", "user"), ("gpt", "assistant"), ("model", "assistant")]
)
def test_other_words_for_roles_are_understood(role: str, known: str) -> None:
    before = [user("a")] if known == "assistant" else []
    turns = [*before, {"role": role, "content": "x"}, user("b"), assistant("c")]
    assert turns_of({"messages": turns})[len(before)]["role"] == known


def test_parts_of_text_alone_are_one_string() -> None:
    parts = [{"type": "text", "text": "a ", "image": None}, {"type": "text", "text": "b"}]
    assert turns_of({"messages": [user(parts), assistant([{"type": "text", "text": "c"}])]}) == [
        user("a b"),
        assistant("c"),
    ]


@pytest.mark.parametrize(
    ("key", "off"), [("weight", 0), ("weight", 0.0), ("loss", False), ("loss", 0), ("train", False)]
)
def test_a_turn_without_weight_is_context(key: str, off: Any) -> None:
    row = {"messages": [user("a"), assistant("b", **{key: off}), user("c"), assistant("d", **{key: 1})]}
    assert turns_of(row) == [user("a"), assistant("b", weight=0), user("c"), assistant("d")]


def test_a_weight_on_a_turn_of_the_user_changes_nothing() -> None:
    assert turns_of({"messages": [user("a") | {"weight": 0}, assistant("b")]}) == [user("a"), assistant("b")]


def test_turns_may_be_json_text_as_a_csv_file_holds_them() -> None:
    turns = [user("a"), assistant("b")]
    assert turns_of({"messages": json.dumps(turns)}) == turns
    problem = problem_of({"messages": str(turns)})
    assert (problem.code, problem.fix) == ("BAD_CONTENT", "JSON wants double quotes.")


def test_a_prompt_and_a_completion_are_two_turns() -> None:
    assert turns_of({"prompt": "a", "completion": " b"}) == [user("a"), assistant(" b")]


def test_of_a_conversational_prompt_only_the_completion_is_trained() -> None:
    row = {"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("d"), user("e"), assistant("f")]}
    expected = [user("a"), assistant("b", weight=0), user("c"), assistant("d"), user("e"), assistant("f")]
    assert turns_of(row) == expected


def test_a_prompt_of_turns_may_have_a_completion_of_text_or_of_one_turn() -> None:
    assert turns_of({"prompt": [user("a")], "completion": "b"}) == [user("a"), assistant("b")]
    assert turns_of({"prompt": "a", "completion": assistant("b")}) == [user("a"), assistant("b")]


def test_instruction_and_input_are_one_turn_with_a_blank_line_between() -> None:
    row = {"instruction": "add", "input": "1 2", "output": "3"}
    assert turns_of(row) == [user("add\n\n1 2"), assistant("3")]
    assert turns_of(row | {"input": ""}) == [user("add"), assistant("3")]
    assert turns_of(row | {"input": None, "text": "all of it again"}) == [user("add"), assistant("3")]


def test_system_and_history_of_an_instruction_are_honoured() -> None:
    row = {"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]]}
    assert turns_of(row) == [system("s"), user("a"), assistant("b"), user("c"), assistant("d")]


def test_the_words_of_sharegpt_become_ours() -> None:
    row = {"conversations": [said("system", "s"), said("human", "a"), said("gpt", "b")]}
    assert turns_of(row) == [system("s"), user("a"), assistant("b")]
    assert turns_of({"conversations": [user("a"), assistant("b")]}) == [user("a"), assistant("b")]
    assert turns_of({"messages": [said("human", "a"), said("gpt", "b")]}) == [user("a"), assistant("b")]


def test_a_loss_of_a_sharegpt_turn_is_honoured() -> None:
    row = {"conversations": [said("human", "a"), said("gpt", "b", loss=False), said("human", "c"), said("gpt", "d")]}
    assert turns_of(row) == [user("a"), assistant("b", weight=0), user("c"), assistant("d")]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [user("a"), assistant("b")]},
        {"conversations": [said("human", "a"), said("gpt", "b")]},
        {"prompt": "a", "completion": "b"},
        {"instruction": "a", "output": "b"},
    ],
)
def test_the_system_text_beside_the_turns_is_not_lost(row: dict[str, Any]) -> None:
    assert turns_of(row | {"system": "s"}) == [system("s"), user("a"), assistant("b")]


def test_two_different_system_texts_are_refused_and_two_equal_ones_are_one() -> None:
    turns = [system("s"), user("a"), assistant("b")]
    assert turns_of({"messages": turns, "system": "s"}) == turns
    assert problem_of({"messages": turns, "system": "t"}).code == "ROLES_OUT_OF_ORDER"


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"messages": [user("a"), assistant("b", weight=0)]}, "NOTHING_TRAINED"),
        ({"messages": [user("a"), assistant("b", weight=0.5)]}, "BAD_CONTENT"),
        ({"messages": [user("a"), assistant("b", weight=True)]}, "BAD_CONTENT"),
        ({"messages": [user("a"), assistant("b", loss="no")]}, "BAD_CONTENT"),
        ({"messages": [user("a"), assistant("b", weight=[])]}, "BAD_CONTENT"),
        ({"messages": [user("a"), assistant("b", reasoning_content="hm")]}, "NOT_SUPPORTED"),
        ({"messages": [user("a"), assistant([{"type": "thinking", "thinking": "hm"}])]}, "NOT_SUPPORTED"),
        ({"messages": [user("a"), assistant("b")], "videos": ["x.mp4"]}, "NOT_SUPPORTED"),
        ({"messages": [user("a"), assistant("  \n")]}, "EMPTY_ASSISTANT"),
        ({"messages": [user("a"), assistant([])]}, "EMPTY_ASSISTANT"),
        ({"messages": [user("a"), assistant(None)]}, "BAD_CONTENT"),
        ({"messages": [user("a"), assistant("b\0")]}, "BAD_CONTENT"),
        ({"messages": [user([{"type": "text", "text": "a\0"}]), assistant("b")]}, "BAD_CONTENT"),
        ({"messages": [user("a"), assistant("b")], "system": "\0"}, "BAD_CONTENT"),
        ({"messages": [user("a"), assistant("b")], "system": 3}, "BAD_CONTENT"),
        ({"messages": [user(["a"]), assistant("b")]}, "BAD_CONTENT"),
        ({"messages": [user({"text": "a"}), assistant("b")]}, "BAD_CONTENT"),
        ({"messages": [user([{"type": "text"}]), assistant("b")]}, "BAD_CONTENT"),
        ({"messages": [user("a"), user("b")]}, "NO_ASSISTANT_TURN"),
        ({"messages": []}, "EMPTY_CONVERSATION"),
        ({"messages": "a"}, "BAD_CONTENT"),
        ({"messages": None}, "BAD_CONTENT"),
        ({"messages": ["a"]}, "BAD_CONTENT"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "BAD_ROLE"),
        ({"messages": [{"content": "a"}]}, "BAD_ROLE"),
        ({"messages": [{"role": "x" * 100_000, "content": "a"}]}, "BAD_ROLE"),
        ({"messages": [user("a"), assistant("b"), assistant("c")]}, "ROLES_OUT_OF_ORDER"),
        ({"messages": [user("a"), system("s"), assistant("b")]}, "ROLES_OUT_OF_ORDER"),
        ({"messages": [system("s"), assistant("b")]}, "ROLES_OUT_OF_ORDER"),
        ({"conversations": [said("gpt", "hi"), said("human", "a"), said("gpt", "b")]}, "ROLES_OUT_OF_ORDER"),
        ({"conversations": [said("narrator", "a")]}, "BAD_ROLE"),
        ({"conversations": [said("human", 3), said("gpt", "b")]}, "BAD_CONTENT"),
        ({"prompt": 3, "completion": "b"}, "BAD_CONTENT"),
        ({"prompt": "a", "completion": None}, "BAD_CONTENT"),
        ({"prompt": "a", "completion": ""}, "EMPTY_ASSISTANT"),
        ({"prompt": [user("a")], "completion": [user("b")]}, "NO_ASSISTANT_TURN"),
        ({"prompt": [user("a"), assistant("b")], "completion": [user("b")]}, "NOTHING_TRAINED"),
        ({"instruction": "a", "output": ["b"]}, "BAD_CONTENT"),
        ({"instruction": "a", "output": "b", "history": "c"}, "BAD_CONTENT"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, "BAD_CONTENT"),
        ({"instruction": "a", "output": "b", "history": [["c", 1]]}, "BAD_CONTENT"),
    ],
)
def test_what_would_train_something_else_is_refused(row: dict[str, Any], code: str) -> None:
    assert problem_of(row).code == code


def test_a_near_role_is_suggested() -> None:
    problem = problem_of({"messages": [user("a"), {"role": "Assistent", "content": "b"}]})
    assert (problem.code, problem.fix) == ("BAD_ROLE", 'Did you mean "assistant"?')
    assert "turn 2" in problem.message


def test_a_conversation_that_the_assistant_opens_is_refused_with_what_to_do() -> None:
    problem = problem_of({"conversations": [said("gpt", "hi"), said("human", "a"), said("gpt", "b")]})
    assert problem.message == "The assistant's turn 1 comes before any user turn."
    assert problem.fix == "Remove it, or put the user turn that it answers before it."


def test_a_wrong_turn_is_named_by_its_place_in_the_row_whatever_is_put_before_it() -> None:
    turns = [user("a"), assistant("b"), assistant("c")]
    assert "turn 3 follows" in problem_of({"messages": turns}).message
    assert "turn 3 follows" in problem_of({"messages": turns, "system": "s"}).message
    row: dict[str, Any] = {"prompt": [user("a")], "completion": [assistant("b"), assistant("c")], "system": "s"}
    assert 'turn 2 of "completion" follows' in problem_of(row).message
    row = {"instruction": "a", "output": " ", "history": [["b", "c"]]}
    assert '"output"' in problem_of(row).message
    calls = [said("function_call", '{"name": "f", "arguments": {}}')] * 2
    opened = [said("human", "a"), *calls, said("observation", "1"), said("observation", "2"), said("gpt", "b")]
    assert "turn 7 follows" in problem_of({"conversations": [*opened, said("gpt", "c")]}).message


def test_a_named_format_is_not_guessed() -> None:
    row = {"messages": [user("a"), assistant("b")], "text": "c"}
    assert detect(row) is Format.MESSAGES
    record = convert(row, Format.INSTRUCTION)
    assert isinstance(record, Problem)
    assert (record.code, record.message) == ("MISSING_FIELD", 'The row has no "instruction".')
