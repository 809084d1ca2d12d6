"""Tools and calls by every habit become one form, and broken ones are named."""

import json
from typing import Any

import pytest

from luthier_trainer.data.formats import convert
from luthier_trainer.data.problem import Problem
from luthier_trainer.data.reading import Format
from luthier_trainer.data.records import Chat

SCHEMA = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": SCHEMA}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
USER = {"role": "user", "content": "1 and 1?"}
RESULT = {"role": "tool", "content": "2"}
END = {"role": "assistant", "content": "2."}


def called(**more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, **more}


def chat(row: dict[str, Any], row_format: Format = Format.MESSAGES) -> Chat:
    record = convert(row, row_format)
    assert isinstance(record, Chat), record
    return record


def problem(row: dict[str, Any], row_format: Format = Format.MESSAGES) -> Problem:
    record = convert(row, row_format)
    assert isinstance(record, Problem), record
    return record


@pytest.mark.parametrize(
    "tools",
    [[TOOL], [SCHEMA], json.dumps([TOOL]), json.dumps([SCHEMA]), [json.dumps(SCHEMA)], [{"function": SCHEMA}]],
)
@pytest.mark.parametrize("key", ["tools", "functions"])
def test_tools_in_any_wrapping_are_the_same(tools: object, key: str) -> None:
    assert chat({"messages": [USER, END], key: tools}).tools == (TOOL,)


@pytest.mark.parametrize("tools", [None, [], "", "[]", " ", "null"])
def test_no_tools_are_no_error(tools: object) -> None:
    assert chat({"messages": [USER, END], "tools": tools}).tools == ()


@pytest.mark.parametrize(
    "call",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": [{"id": "", "function": {"name": "add", "arguments": '{"a": 1}'}}]},
        {"tool_calls": [{"name": "add", "arguments": {"a": 1}}]},
        {"function_call": {"name": "add", "arguments": '{"a": 1}'}},
    ],
)
def test_a_call_in_any_wrapping_has_decoded_arguments(call: dict[str, Any]) -> None:
    turns = chat({"messages": [USER, called(**call), RESULT, END]}).messages
    assert turns == [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, RESULT, END]


def test_ids_and_names_that_tie_answers_to_calls_stay() -> None:
    answers = [
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
        {"role": "function", "content": "3", "name": "add"},
    ]
    turns = chat({"messages": [USER, called(tool_calls=[{**CALL, "id": "c1"}]), *answers, END]}).messages
    assert turns[1]["tool_calls"] == [{**CALL, "id": "c1"}]
    assert turns[2:4] == [answers[0], answers[1] | {"role": "tool"}]


@pytest.mark.parametrize("role", ["tool", "function", "ipython", "observation"])
def test_a_result_is_a_tool_turn_by_any_name(role: str) -> None:
    turns = chat({"messages": [USER, called(tool_calls=[CALL]), {"role": role, "content": "2"}, END]}).messages
    assert turns[2] == RESULT


def test_text_beside_a_call_stays() -> None:
    turns = chat({"messages": [USER, called(tool_calls=[CALL]) | {"content": "Let me see."}]}).messages
    assert turns[1] == {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]}


@pytest.mark.parametrize("arguments", ["", None, "{}"])
def test_a_call_without_arguments_has_none(arguments: object) -> None:
    turns = chat(
        {"messages": [USER, called(tool_calls=[{"function": {"name": "now", "arguments": arguments}}])]}
    ).messages
    assert turns[1]["tool_calls"][0]["function"]["arguments"] == {}


def sharegpt(*turns: tuple[str, object]) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": value} for role, value in turns]}


@pytest.mark.parametrize("value", [json.dumps(CALL["function"]), CALL["function"], json.dumps([CALL["function"]])])
def test_a_function_call_of_sharegpt_is_a_turn_with_a_call(value: object) -> None:
    row = sharegpt(("human", "1 and 1?"), ("function_call", value), ("observation", "2"), ("gpt", "2."))
    expected = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, RESULT, END]
    assert chat(row, Format.SHAREGPT).messages == expected


def test_calls_in_a_row_are_one_turn_and_their_results_several() -> None:
    value = json.dumps(CALL["function"])
    row = sharegpt(
        ("human", "?"),
        ("gpt", "Let me see."),
        ("function_call", value),
        ("function_call", value),
        ("observation", "2"),
        ("observation", "2"),
        ("gpt", "2."),
    )
    turns = chat(row, Format.SHAREGPT).messages
    assert [turn["role"] for turn in turns] == ["user", "assistant", "tool", "tool", "assistant"]
    assert turns[1] == {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL, CALL]}


def test_calls_of_one_turn_may_not_differ_in_weight() -> None:
    row = sharegpt(("human", "?"), ("gpt", "Wait."), ("function_call", CALL["function"]))
    row["conversations"][1]["loss"] = False
    assert problem(row, Format.SHAREGPT).code == "BAD_CONTENT"
    row["conversations"][2]["loss"] = False
    assert problem(row, Format.SHAREGPT).code == "NOTHING_TRAINED"


@pytest.mark.parametrize(
    "calls",
    [
        [{"function": {"name": "add", "arguments": '{"a": 1'}}],
        [{"function": {"name": "add", "arguments": "1"}}],
        [{"function": {"name": "add", "arguments": [1]}}],
        [{"function": {"name": "add", "arguments": {"a": json.loads("[" * 70 + "]" * 70)}}}],
        [{"function": {"name": "", "arguments": {}}}],
        [{"function": {"name": "a\0", "arguments": {}}}],
        [{"function": {"arguments": {}}}],
        [{"type": "custom", "custom": {"name": "add"}}],
        [{}],
        ["add"],
        {"name": "add"},
    ],
)
def test_a_broken_call_is_named_by_its_turn(calls: object) -> None:
    found = problem({"messages": [USER, called(tool_calls=calls), RESULT, END]})
    assert found.code in ("BAD_TOOL_CALL", "BAD_CONTENT")
    assert "turn 2" in found.message


def test_single_quotes_in_a_call_are_told() -> None:
    found = problem(sharegpt(("human", "?"), ("function_call", "{'name': 'add'}")), Format.SHAREGPT)
    assert (found.code, found.fix) == ("BAD_TOOL_CALL", "JSON wants double quotes.")


@pytest.mark.parametrize(
    "tools",
    [
        "[{",
        "add",
        {"name": "add"},
        ["add"],
        [3],
        [{"type": "function"}],
        [{"function": {"name": 3}}],
        [{"type": "retrieval", "function": SCHEMA}],
        [{"name": "deep", "parameters": json.loads("[" * 70 + "]" * 70)}],
        json.dumps([{"name": "deep", "parameters": json.loads("[" * 70 + "]" * 70)}]),
    ],
)
def test_broken_tools_are_refused(tools: object) -> None:
    assert problem({"messages": [USER, END], "tools": tools}).code == "BAD_TOOLS"


@pytest.mark.parametrize(
    "turns",
    [
        [USER, RESULT, END],
        [USER, END, RESULT],
        [RESULT, END],
        [USER, called(tool_calls=[CALL]), USER, RESULT, END],
        [USER, called(tool_calls=[CALL]), END],
    ],
)
def test_tools_answer_calls_and_nothing_else(turns: list[dict[str, Any]]) -> None:
    assert problem({"messages": turns}).code == "ROLES_OUT_OF_ORDER"


def test_a_conversation_may_end_with_a_call_or_with_its_result() -> None:
    assert len(chat({"messages": [USER, called(tool_calls=[CALL])]}).messages) == 2
    assert len(chat({"messages": [USER, called(tool_calls=[CALL]), RESULT]}).messages) == 3
