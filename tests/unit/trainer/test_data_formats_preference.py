"""Two answers, judged answers and prompts alone: what is the prompt, what is the answer, and what is neither."""

from typing import Any

import pytest

from luthier_trainer.data.formats import convert, detect
from luthier_trainer.data.problem import Problem
from luthier_trainer.data.reading import Format
from luthier_trainer.data.records import Preference, Prompt, Unpaired, passages

CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}


def user(content: str) -> Any:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> Any:
    return {"role": "assistant", "content": content, **more}


def system(content: str) -> Any:
    return {"role": "system", "content": content}


def preference(row: dict[str, Any]) -> Preference:
    assert detect(row) is Format.PREFERENCE
    record = convert(row, Format.PREFERENCE)
    assert isinstance(record, Preference), record
    return record


def unpaired(row: dict[str, Any]) -> Unpaired:
    assert detect(row) is Format.UNPAIRED_PREFERENCE
    record = convert(row, Format.UNPAIRED_PREFERENCE)
    assert isinstance(record, Unpaired), record
    return record


def prompt(row: dict[str, Any]) -> Prompt:
    assert detect(row) is Format.PROMPT_ONLY
    record = convert(row, Format.PROMPT_ONLY)
    assert isinstance(record, Prompt), record
    return record


def code_of(row: dict[str, Any]) -> str:
    found = detect(row)
    assert found is not None
    record = convert(row, found)
    assert isinstance(record, Problem), record
    return record.code


A, B, Q = assistant("good"), assistant("bad"), user("q")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": [Q], "chosen": [A], "rejected": [B]},
        {"prompt": [Q], "chosen": A, "rejected": "bad"},
        {"chosen": [Q, A], "rejected": [Q, B]},
        {"prompt": "q", "chosen": [Q, A], "rejected": [Q, B]},
        {"prompt": " q\n", "messages": [Q, A], "chosen": [Q, A], "rejected": [Q, B], "score_chosen": 9.0},
        {"messages": [Q, A], "chosen": [Q, A], "rejected": [Q, B]},
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        {"conversations": [{"from": "human", "value": "q"}], "chosen": "good", "rejected": "bad"},
        {"input": {"messages": [Q]}, "preferred_output": [A], "non_preferred_output": [B]},
        {"input": [Q], "preferred_output": [A], "non_preferred_output": [B]},
        {"input": "q", "preferred_output": [A], "non_preferred_output": [B]},
    ],
)
def test_every_habit_gives_one_prompt_and_two_answers(row: dict[str, Any]) -> None:
    assert preference(row) == Preference([Q], [A], [B])


def test_turns_that_both_answers_share_belong_to_the_prompt_and_are_not_trained() -> None:
    start = [system("s"), user("a"), assistant("b"), user("c")]
    record = preference({"prompt": "c", "chosen": [*start, A], "rejected": [*start, B]})
    assert record.prompt == [system("s"), user("a"), assistant("b", weight=0), user("c")]
    assert (record.chosen, record.rejected) == ([A], [B])
    record = preference({"prompt": "a", "chosen": [*start, A], "rejected": [*start, B]})
    assert [turn["content"] for turn in record.prompt] == ["s", "a", "b", "c"]
    record = preference({"prompt": start, "chosen": [user("c"), A], "rejected": [user("c"), B]})
    assert [turn["content"] for turn in record.prompt] == ["s", "a", "b", "c"]


def test_a_system_prompt_alone_is_joined_with_the_turns_that_answers_begin_with() -> None:
    record = preference({"prompt": [system("s")], "chosen": [Q, A], "rejected": [Q, B]})
    assert record.prompt == [system("s"), Q]


def test_an_answer_that_goes_on_where_the_other_ends_is_not_all_prompt() -> None:
    record = preference({"chosen": [Q, A], "rejected": [Q, A, user("more"), B]})
    assert record.prompt == [Q]
    assert (record.chosen, record.rejected) == ([A], [A, user("more"), B])


def test_the_systems_and_tools_of_all_habits_are_kept() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    row = {"system": "s", "conversations": [Q], "chosen": A, "rejected": B, "tools": '[{"name": "f"}]'}
    assert preference(row) == Preference([system("s"), Q], [A], [B], (tool,))
    row = {"input": {"messages": [Q], "tools": [tool]}, "preferred_output": [A], "non_preferred_output": [B]}
    assert preference(row).tools == (tool,)


def test_an_answer_may_be_a_call_its_result_and_words() -> None:
    called = [assistant("", tool_calls=[CALL]), {"role": "tool", "content": "1"}, A]
    assert preference({"prompt": "q", "chosen": called, "rejected": [B]}).chosen == called


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"prompt": "q", "chosen": "same", "rejected": "same"}, "SAME_ANSWERS"),
        ({"chosen": [Q, A], "rejected": [Q, A]}, "SAME_ANSWERS"),
        ({"chosen": [Q, A], "rejected": [user("other"), B]}, "DIFFERENT_PROMPTS"),
        ({"prompt": "other", "chosen": [Q, A], "rejected": [Q, B]}, "DIFFERENT_PROMPTS"),
        ({"chosen": [Q], "rejected": [Q, B]}, "DIFFERENT_PROMPTS"),
        ({"chosen": [], "rejected": [B]}, "DIFFERENT_PROMPTS"),
        ({"chosen": "good", "rejected": "bad"}, "MISSING_FIELD"),
        ({"prompt": None, "chosen": "good", "rejected": "bad"}, "MISSING_FIELD"),
        ({"prompt": "q", "chosen": "good", "rejected": " "}, "EMPTY_ASSISTANT"),
        ({"prompt": "q", "chosen": "good", "rejected": None}, "BAD_CONTENT"),
        ({"prompt": "q", "chosen": "good", "rejected": 3}, "BAD_CONTENT"),
        ({"prompt": [Q, A], "chosen": "good", "rejected": "bad"}, "ROLES_OUT_OF_ORDER"),
        ({"prompt": "q", "chosen": [assistant("a", weight=0)], "rejected": [B]}, "NOTHING_TRAINED"),
        ({"input": {}, "preferred_output": [A], "non_preferred_output": [B]}, "MISSING_FIELD"),
        ({"preferred_output": [A], "non_preferred_output": [B]}, "MISSING_FIELD"),
        ({"messages": "x", "chosen": "a", "rejected": "b"}, "BAD_CONTENT"),
    ],
)
def test_what_cannot_be_compared_is_refused(row: dict[str, Any], code: str) -> None:
    assert code_of(row) == code


def test_a_wrong_turn_is_named_by_its_place_in_the_answer() -> None:
    record = convert({"prompt": "q", "chosen": [A], "rejected": [B, B], "system": "s"}, Format.PREFERENCE)
    assert isinstance(record, Problem)
    assert 'turn 2 of "rejected" follows' in record.message
    record = convert({"chosen": [Q, A], "rejected": [Q, B, B]}, Format.PREFERENCE)
    assert isinstance(record, Problem)
    assert 'turn 3 of "rejected" follows' in record.message


@pytest.mark.parametrize(
    ("label", "wanted"),
    [(True, True), (False, False), (1, True), (0, False), (1.0, True), ("true", True), ("False ", False), ("0", False)],
)
@pytest.mark.parametrize("key", ["label", "kto_tag"])
def test_labels_by_every_habit_are_true_or_false(label: object, wanted: bool, key: str) -> None:
    assert unpaired({"messages": [Q, A], key: label}) == Unpaired([Q, A], wanted)
    assert unpaired({"prompt": "q", "completion": "good", key: label}) == Unpaired([Q, A], wanted)
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "good"}]
    assert unpaired({"conversations": turns, key: label}) == Unpaired([Q, A], wanted)


@pytest.mark.parametrize("label", [2, 0.5, "yes", "positive", [], {}, "1" * 100_000])
def test_a_class_is_no_judgement(label: object) -> None:
    row = {"messages": [Q, A], "label": label}
    assert detect(row) is Format.MESSAGES
    record = convert(row, Format.UNPAIRED_PREFERENCE)
    assert isinstance(record, Problem)
    assert record.code == "BAD_LABEL"


@pytest.mark.parametrize(("row", "code"), [({}, "MISSING_FIELD"), ({"label": None}, "BAD_LABEL")])
def test_a_judgement_that_is_missing_is_told(row: dict[str, Any], code: str) -> None:
    record = convert({"messages": [Q, A], **row}, Format.UNPAIRED_PREFERENCE)
    assert isinstance(record, Problem)
    assert record.code == code


def test_of_a_judged_conversation_only_the_last_answer_is_trained() -> None:
    tail = [user("c"), assistant("", tool_calls=[CALL]), {"role": "tool", "content": "1"}, assistant("d"), user("e")]
    record = unpaired({"messages": [Q, A, *tail], "label": True})
    assert record.messages == [Q, A | {"weight": 0}, *tail]
    assert code_of({"messages": [Q, A, user("c"), assistant("d", weight=0)], "label": True}) == "NOTHING_TRAINED"


def test_a_prompt_keeps_every_other_column_for_rewards() -> None:
    row = {"prompt": "q", "answer": "42", "checks": {"a": [1, 2.5, None, True]}, "empty": None}
    reference = {"answer": "42", "checks": {"a": [1, 2.5, None, True]}, "empty": None}
    assert prompt(row) == Prompt([Q], reference)
    assert prompt({"prompt": [system("s"), Q], "tools": [{"name": "f"}]}).reference == {}
    assert prompt({"prompt": "q", "system": "s"}) == Prompt([system("s"), Q], {})


def test_nothing_of_a_prompt_alone_is_trained() -> None:
    (passage,) = passages(prompt({"prompt": [Q, A, user("again")]}))
    assert passage.to_answer
    assert passage.messages == [Q, A | {"weight": 0}, user("again")]


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"prompt": ""}, "EMPTY_PROMPT"),
        ({"prompt": []}, "EMPTY_CONVERSATION"),
        ({"prompt": None}, "BAD_CONTENT"),
        ({"prompt": 3}, "BAD_CONTENT"),
        ({"prompt": [Q, A]}, "ROLES_OUT_OF_ORDER"),
        ({"prompt": [system("s")]}, "ROLES_OUT_OF_ORDER"),
        ({"prompt": "q", "answer": float("nan")}, "BAD_CONTENT"),
        ({"prompt": "q", "answer": {"a": b"x"}}, "BAD_CONTENT"),
        ({"prompt": "q", "answer": {1: "x"}}, "BAD_CONTENT"),
    ],
)
def test_a_prompt_that_nobody_can_answer_or_check_is_refused(row: dict[str, Any], code: str) -> None:
    assert code_of(row) == code


def test_a_reference_that_nests_too_deep_to_be_written_again_is_refused() -> None:
    deep: Any = []
    for _ in range(500):
        deep = [deep]
    assert code_of({"prompt": "q", "answer": deep}) == "TOO_DEEP"
