"""Duplicates and prompts with several answers: in memory, on the disk, and in any number of passes."""

import random
from pathlib import Path

import pytest

from luthier_trainer.data.doctor import duplicates as duplicates_module
from luthier_trainer.data.doctor.duplicates import Duplicates, content, digests
from luthier_trainer.data.doctor.findings import Findings
from luthier_trainer.data.problem import Problem
from luthier_trainer.data.records import Chat, Preference, Prompt, Record, Text, Unpaired


class Lines(Findings):
    """Keeps every finding, to look at."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[tuple[int, str, str]] = []

    def add(self, line: int, problem: Problem) -> None:
        self.all.append((line, problem.code, problem.message))


def chat(question: str, answer: str) -> Chat:
    return Chat([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


def judged(scratch: Path, rows: list[tuple[int, Record]]) -> list[tuple[int, str, str]]:
    duplicates, found = Duplicates(scratch), Lines()
    for line, record in rows:
        duplicates.add(line, *digests(*content(record)))
    duplicates.judge(found)
    return sorted(found.all)


def test_a_row_that_repeats_another_names_the_first_one(tmp_path: Path) -> None:
    rows: list[tuple[int, Record]] = [
        (2, chat("a", "b")),
        (3, chat("c", "d")),
        (7, chat("a", "b")),
        (9, chat("a", "b")),
    ]
    assert judged(tmp_path, rows) == [
        (7, "DUPLICATE_ROW", "Line 7 repeats line 2."),
        (9, "DUPLICATE_ROW", "Line 9 repeats line 2."),
    ]


def test_other_answers_to_a_prompt_are_noted_once_each(tmp_path: Path) -> None:
    rows: list[tuple[int, Record]] = [
        (1, chat("a", "b")),
        (2, chat("a", "c")),
        (3, chat("a", "c")),
        (4, chat("b", "b")),
    ]
    assert judged(tmp_path, rows) == [
        (2, "SAME_PROMPT", "Line 2 has the prompt of line 1 and another answer."),
        (3, "DUPLICATE_ROW", "Line 3 repeats line 2."),
    ]


@pytest.mark.parametrize("buffer", [24, 240, 10_000, 10**9])
@pytest.mark.parametrize("at_once", [1, 7, 10**9])
def test_the_same_is_found_from_memory_and_from_files_and_in_any_number_of_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffer: int, at_once: int
) -> None:
    draw = random.Random(3)
    rows: list[tuple[int, Record]] = [
        (line, chat(f"q{draw.randrange(40)}", f"a{draw.randrange(4)}")) for line in range(1, 301)
    ]
    expected = judged(tmp_path, rows)
    assert (
        len(expected) == 300 - len({str(record) for _, record in rows}) + len({str(record) for _, record in rows}) - 40
    )
    monkeypatch.setattr(duplicates_module, "BUFFER_BYTES", buffer)
    monkeypatch.setattr(duplicates_module, "MAX_JUDGED_AT_ONCE", at_once)
    monkeypatch.setattr(duplicates_module, "_CHUNK", 48)
    assert judged(tmp_path, rows) == expected
    assert list(tmp_path.iterdir()) == []


def test_one_prompt_for_all_rows_is_judged_in_bounded_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates_module, "MAX_JUDGED_AT_ONCE", 10)
    found = judged(tmp_path, [(line, chat("Go on.", str(line % 90))) for line in range(1, 101)])
    assert [(line, code) for line, code, _ in found] == [
        (line, "SAME_PROMPT" if line <= 90 else "DUPLICATE_ROW") for line in range(2, 101)
    ]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (chat("a", "b"), chat("a", "c")),
        (chat("a", "b"), Chat([*chat("a", "b").messages, *chat("c", "d").messages])),
        (chat("a", "b"), Chat(chat("a", "b").messages, ({"type": "function", "function": {"name": "f"}},))),
        (
            chat("a", "b"),
            Chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]),
        ),
        (Chat([{"role": "user", "content": 'a"},{"'}]), Chat([{"role": "user", "content": "a"}])),
        (Text("a"), Text("a ")),
        (Preference([], chat("a", "b").messages, []), Preference([], [], chat("a", "b").messages)),
        (Unpaired(chat("a", "b").messages, True), Unpaired(chat("a", "b").messages, False)),
        (Prompt([], {"answer": 1}), Prompt([], {"answer": "1"})),
    ],
)
def test_rows_that_differ_in_anything_trained_are_not_equal(one: Record, other: Record) -> None:
    assert digests(*content(one))[1] != digests(*content(other))[1]


def test_the_order_of_keys_makes_no_other_row() -> None:
    one, other = Prompt([], {"a": {"x": 1, "y": 2}, "b": 2}), Prompt([], {"b": 2, "a": {"y": 2, "x": 1}})
    assert digests(*content(one)) == digests(*content(other))


def test_only_what_is_asked_once_has_a_prompt_to_compare() -> None:
    greeting = Chat([{"role": "assistant", "content": "Hello."}])
    for record in (Text("a"), Preference([], [], []), Unpaired([], True), greeting):
        assert content(record)[0] is None
    assert content(chat("a", "b"))[0] == content(chat("a", "c"))[0]


def test_values_deeper_than_json_goes_are_compared_too() -> None:
    def deep(end: object) -> Prompt:
        value = end
        for _ in range(20_000):
            value = {"a": [value]}
        return Prompt([], {"deep": value})

    assert digests(*content(deep(1))) == digests(*content(deep(1)))
    assert digests(*content(deep(1))) != digests(*content(deep(2)))
    assert content(Prompt([], {"n": 2**70})) != content(Prompt([], {"n": 2**71}))
