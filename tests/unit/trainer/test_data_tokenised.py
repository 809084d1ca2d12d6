"""Tokenised rows: what is made of a file, what is found, and when it is made again."""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
from transformers import AutoTokenizer

from luthier.trainer.v1 import task_pb2
from luthier.v1 import dataset_pb2, dataset_report_pb2, event_pb2
from luthier_trainer.data.masks import sandbox
from luthier_trainer.data.masks.masking import Masking, TrainOn
from luthier_trainer.data.masks.render import tokenise
from luthier_trainer.data.masks.spans import render
from luthier_trainer.data.masks.template import template_of
from luthier_trainer.data.problem import Problem
from luthier_trainer.data.records import Conversation, Passage
from luthier_trainer.data.tokens import tokenised
from luthier_trainer.data.tokens.leakage import leakage
from luthier_trainer.data.tokens.options import Options
from luthier_trainer.data.tokens.overlong import Overlong
from luthier_trainer.data.tokens.parts import Part
from luthier_trainer.data.tokens.report import Tally, first_errors
from luthier_trainer.data.tokens.tokenised import TokenisedRows, require_trainable
from luthier_trainer.errors import TrainingError
from luthier_trainer.inspect import BUILTIN
from luthier_trainer.report import Payload

REPOSITORY = Path(__file__).parents[3]


class Recorder:
    """A Reporter that keeps what it is given."""

    def __init__(self) -> None:
        self.payloads: list[Payload] = []

    def report(self, payload: Payload, *, durable: bool = False) -> None:
        self.payloads.append(payload)

    def completed(self) -> list[int]:
        return [p.completed for p in self.payloads if isinstance(p, event_pb2.PhaseProgressed)]

    def warnings(self) -> list[str]:
        return [p.message for p in self.payloads if isinstance(p, event_pb2.LogEmitted)]


@pytest.fixture
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BUILTIN / "tiny")


def chats(count: int) -> list[Conversation]:
    return [
        [
            {"role": "user", "content": f"Question {n}? " + "why " * (n % 40)},
            {"role": "assistant", "content": f"It is {n} 😀"},
        ]
        for n in range(count)
    ]


def write(path: Path, rows: Iterable[Any], sha256: str = "ab" * 32) -> task_pb2.DatasetSource:
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines))
    return task_pb2.DatasetSource(path=str(path), sha256=sha256, rows=len(lines))


def source_of(path: Path, conversations: list[Conversation], sha256: str = "ab" * 32) -> task_pb2.DatasetSource:
    return write(path, ({"messages": turns} for turns in conversations), sha256)


Tokens = list[tuple[list[int], list[bool]]]


def tokens(rows: TokenisedRows) -> list[Tokens]:
    return [[(e.input_ids.tolist(), e.trained.tolist()) for e in rows.examples(index)] for index in range(len(rows))]


def load_from(
    source: task_pb2.DatasetSource,
    tokenizer: Any,
    folder: Path,
    max_length: int = 1024,
    *,
    overlong: Overlong = Overlong.TRUNCATE,
    masking: Masking | None = None,
    recorder: Recorder | None = None,
    cache_max_bytes: int = 0,
) -> TokenisedRows:
    return tokenised.load(
        source,
        tokenizer,
        template_of(tokenizer),
        Options(max_length, overlong, masking or Masking()),
        cache_dir=folder,
        cache_max_bytes=cache_max_bytes,
        reporter=recorder or Recorder(),
    )


def found(rows: TokenisedRows, code: str) -> list[dataset_report_pb2.Finding]:
    return [each for each in rows.report.findings if each.code == code]


def whole(rows: TokenisedRows) -> Part[TokenisedRows]:
    return Part(rows, np.arange(len(rows)))


def test_rows_equal_each_conversation_encoded_alone(tmp_path: Path, tokenizer: Any) -> None:
    conversations = chats(700)
    rows = load_from(source_of(tmp_path / "rows.jsonl", conversations), tokenizer, tmp_path, max_length=40)
    template = template_of(tokenizer)
    alone: list[Tokens] = []
    for each in conversations:
        (example,) = tokenise([render(Passage(messages=each), template, Masking())], tokenizer)
        ids, trained = example.input_ids.tolist()[:40], example.trained.tolist()[:40]
        alone.append([(ids, trained)] if any(trained[1:]) else [])
    assert tokens(rows) == alone
    assert rows.lengths.tolist() == [max((len(ids) for ids, _ in each), default=0) for each in alone]
    assert rows.scored.tolist() == [sum(sum(trained[1:]) for _, trained in each) for each in alone]
    assert rows.lengths.dtype == rows.scored.dtype == np.dtype(np.int64)
    assert rows.lines.tolist() == list(range(1, 701))
    assert 0 < rows.truncated < 700
    for outside in (-1, 700):
        with pytest.raises(IndexError):
            rows.examples(outside)


def test_an_example_may_be_written_to_without_touching_the_cache(tmp_path: Path, tokenizer: Any) -> None:
    rows = load_from(source_of(tmp_path / "rows.jsonl", chats(3)), tokenizer, tmp_path)
    before = tokens(rows)
    (example,) = rows.examples(1)
    example.input_ids[:] = 0
    example.trained[:] = True
    assert tokens(rows) == before


def test_the_first_token_is_never_scored(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endfor %}"
    )
    rows = load_from(source_of(tmp_path / "rows.jsonl", chats(3)), tokenizer, tmp_path)
    assert rows.examples(0)[0].trained.all()
    assert rows.scored.tolist() == (rows.lengths - 1).tolist()


def test_a_second_load_reads_the_cache_and_neither_the_file_nor_the_tokenizer(tmp_path: Path, tokenizer: Any) -> None:
    source = source_of(tmp_path / "rows.jsonl", chats(50))
    first = load_from(source, tokenizer, tmp_path)
    Path(source.path).unlink()
    assert tokens(load_from(source, tokenizer, tmp_path)) == tokens(first)


def test_a_padded_or_truncating_call_in_between_does_not_lose_the_cache(tmp_path: Path, tokenizer: Any) -> None:
    source = source_of(tmp_path / "rows.jsonl", chats(5))
    load_from(source, tokenizer, tmp_path)
    tokenizer(["a", "b b b b"], padding=True, truncation=True, max_length=3)
    Path(source.path).unlink()
    load_from(source, tokenizer, tmp_path)


@pytest.mark.parametrize(
    "changed", ["template", "tokenizer", "max_length", "dataset", "reading", "overlong", "train_on"]
)
def test_the_rows_are_made_again_when_what_they_depend_on_changes(tmp_path: Path, tokenizer: Any, changed: str) -> None:
    source = source_of(tmp_path / "rows.jsonl", chats(25))
    first = load_from(source, tokenizer, tmp_path, 30)
    changes: dict[str, Any] = {}
    max_length = 30
    match changed:
        case "template":
            tokenizer.chat_template = "New." + str(tokenizer.chat_template)
        case "tokenizer":
            tokenizer.add_tokens(["Question"])
        case "max_length":
            max_length = 24
        case "dataset":
            source = source_of(tmp_path / "rows.jsonl", chats(6), sha256="cd" * 32)
        case "reading":
            write(tmp_path / "rows.jsonl", ({"a": f"q {n}", "completion": "c"} for n in range(25)))
            source.reading.columns["prompt"] = "a"
        case "overlong":
            changes["overlong"] = Overlong.DROP
        case "train_on":
            changes["masking"] = Masking(TrainOn.ALL_TOKENS)
    assert tokens(load_from(source, tokenizer, tmp_path, max_length, **changes)) != tokens(first)
    assert len(list((tmp_path / "tokenised").iterdir())) == 2


def test_without_a_hash_the_file_itself_is_hashed(tmp_path: Path, tokenizer: Any) -> None:
    source = source_of(tmp_path / "rows.jsonl", chats(5), sha256="")
    load_from(source, tokenizer, tmp_path)
    assert len(load_from(source_of(tmp_path / "rows.jsonl", chats(6), sha256=""), tokenizer, tmp_path)) == 6


@pytest.mark.parametrize("damage", ["cut", "missing", "counts", "empty"])
def test_a_damaged_cache_is_made_again(tmp_path: Path, tokenizer: Any, damage: str) -> None:
    source = source_of(tmp_path / "rows.jsonl", chats(400))
    first = tokens(load_from(source, tokenizer, tmp_path))
    (kept,) = (tmp_path / "tokenised").iterdir()
    arrow, counts = kept / "rows.arrow", kept / "counts.json"
    match damage:
        case "cut":
            arrow.write_bytes(arrow.read_bytes()[: arrow.stat().st_size // 2])
        case "missing":
            arrow.unlink()
        case "counts":
            counts.write_text("{}")
        case "empty":
            shutil.rmtree(kept)
            kept.mkdir()
    assert tokens(load_from(source, tokenizer, tmp_path)) == first
    assert [path.name for path in (tmp_path / "tokenised").iterdir()] == [kept.name]


def test_progress_is_told_at_most_twice_a_second_and_at_the_end(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(tmp_path / "rows.jsonl", chats(2000))
    clock = iter(range(10_000))
    recorder = Recorder()
    with monkeypatch.context() as patch:
        patch.setattr("luthier_trainer.data.tokens.conversion._monotonic", lambda: next(clock) * 0.001)
        load_from(source, tokenizer, tmp_path, recorder=recorder)
    # By this clock a row takes a millisecond, so that 2,000 rows are told of four times, and once more at the end.
    told = recorder.completed()
    assert told == sorted(told)
    assert (len(told), told[-1]) == (5, 2000)
    (last,) = {p.total for p in recorder.payloads if isinstance(p, event_pb2.PhaseProgressed)}
    assert last == 2000
    again = Recorder()
    load_from(source, tokenizer, tmp_path, recorder=again)
    assert again.completed() == [2000]


def test_rows_that_train_nothing_keep_their_place_and_are_warned_of(tmp_path: Path, tokenizer: Any) -> None:
    conversations = chats(30)
    for wrong in (4, 17):
        conversations[wrong][0]["content"] = "long " * 200
    source = source_of(tmp_path / "rows.jsonl", conversations)
    for _ in range(2):  # made, and then from the cache
        recorder = Recorder()
        rows = load_from(source, tokenizer, tmp_path, 100)
        require_trainable(rows, recorder)
        assert len(rows) == 30
        assert [index for index, scored in enumerate(rows.scored) if not scored] == [4, 17]
        assert rows.examples(4) == []
        assert [each.line for each in found(rows, "NOTHING_TRAINED")] == [5, 18]
        assert [each.line for each in found(rows, "ROW_TOO_LONG")] == [5, 18]
        too_long, untrained = recorder.warnings()
        assert too_long.startswith("2 of 30 rows are longer than 100 tokens (max_length) and are cut off at their end")
        assert untrained == "2 of 30 rows train nothing. Lines 5, 18."


def test_a_dataset_that_trains_nothing_at_all_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    source = source_of(tmp_path / "rows.jsonl", chats(12))
    for _ in range(2):
        rows = load_from(source, tokenizer, tmp_path, 4)
        with pytest.raises(TrainingError, match="No row trains anything") as caught:
            require_trainable(rows, Recorder())
        assert caught.value.reason == "DATASET_INVALID"
        assert rows.report.statistics.examples == rows.report.statistics.tokens == 0


def test_all_wrong_rows_are_in_the_report_and_grouped_by_their_message_in_the_error(
    tmp_path: Path, tokenizer: Any
) -> None:
    source = source_of(tmp_path / "rows.jsonl", chats(600))
    with open(source.path, "a") as file:
        file.write("{}\n" + "not json\n" * 20)
    for _ in range(2):
        rows = load_from(source, tokenizer, tmp_path)
        errors = [each for each in rows.report.findings if each.level == dataset_report_pb2.FINDING_LEVEL_ERROR]
        assert [each.line for each in errors] == list(range(601, 622))
        assert rows.report.statistics.examples == 600
        assert rows.report.statistics.rows == 621
        assert sum(each.rows for each in rows.report.statistics.lengths) == 600
        with pytest.raises(TrainingError) as caught:
            require_trainable(rows, Recorder())
        assert caught.value.reason == "DATASET_INVALID"
        assert caught.value.message.startswith("line 601: ")
        assert "; 20 rows (lines 602, 603, 604, 605, 606, 607, 608, 609, 610, 611, ...): " in caught.value.message
        assert caught.value.message.count(errors[1].message) == 1
        assert "`luthier dataset doctor DATASET --base-model MODEL`" in caught.value.hint


def test_an_error_names_three_messages_at_most_and_how_many_errors_there_are() -> None:
    tally = Tally()
    for line in range(1, 9):
        tally.findings.add(line, Problem("NOT_JSON", f"It is wrong in way {line % 4}.", "Mend it."))
    report = tally.report()
    report.dataset_id, report.base_model = "ds_1", "builtin/tiny"
    said, hint = first_errors(report)
    assert said == (
        "8 errors, the first of them: 2 rows (lines 1, 5): It is wrong in way 1.; 2 rows (lines 2, 6): It is wrong in"
        " way 2.; 2 rows (lines 3, 7): It is wrong in way 3."
    )
    assert hint == "Mend it. `luthier dataset doctor ds_1 --base-model builtin/tiny` lists everything that was found."


def test_rows_in_error_have_no_length() -> None:
    tally = Tally()
    tally.add_lengths(np.zeros(3, np.int64))
    assert list(tally.report().statistics.lengths) == []
    tally.add_lengths(np.array([0, 17, 32], np.int64))
    statistics = tally.report().statistics
    assert statistics.rows == 6
    assert [(each.up_to, each.rows) for each in statistics.lengths] == [(32, 2)]


def test_rows_that_the_template_refuses_are_named_by_line(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% if 'Question 7' in messages[0].content %}{{ raise_exception('not seven') }}{% endif %}"
        + str(tokenizer.chat_template)
    )
    rows = load_from(source_of(tmp_path / "rows.jsonl", chats(20)), tokenizer, tmp_path)
    with pytest.raises(TrainingError, match=r"^DATASET_INVALID: line 8: .*not seven"):
        require_trainable(rows, Recorder())
    assert rows.examples(7) == []
    assert len(rows) == 20


def test_the_cache_stays_within_its_limit_and_keeps_what_is_in_use(tmp_path: Path, tokenizer: Any) -> None:
    def names() -> set[str]:
        return {path.name for path in (tmp_path / "tokenised").iterdir()}

    def load_number(number: int) -> TokenisedRows:
        source = source_of(tmp_path / f"{number}.jsonl", chats(100), sha256=f"{number:064x}")
        return load_from(source, tokenizer, tmp_path, cache_max_bytes=1)

    held = load_number(1)
    before = tokens(held)
    assert len(names()) == 1, "what was just made is in use"
    second = load_number(2)
    assert len(names()) == 2
    del second
    third = load_number(3)
    assert len(names()) == 2, "the second was used by nobody"
    assert tokens(held) == before
    del held, third


PREFERENCE = {"prompt": "Say a word.", "chosen": "Yes, gladly.", "rejected": "No."}


def test_preference_data_has_a_report_of_all_its_tokens_and_no_job_trains_on_it(tmp_path: Path, tokenizer: Any) -> None:
    rows = load_from(write(tmp_path / "rows.jsonl", [PREFERENCE] * 3), tokenizer, tmp_path)
    assert (rows.report.statistics.rows, rows.report.statistics.examples) == (3, 6)
    assert rows.report.statistics.trained_tokens > 0
    assert not rows.report.findings or rows.report.findings[0].level != dataset_report_pb2.FINDING_LEVEL_ERROR
    with pytest.raises(TrainingError, match="not offered yet") as caught:
        require_trainable(rows, Recorder())
    assert caught.value.reason == "DATASET_NOT_FOR_OBJECTIVE"


def test_prompts_alone_have_a_report_of_their_tokens(tmp_path: Path, tokenizer: Any) -> None:
    source = write(tmp_path / "rows.jsonl", [{"prompt": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(3)])
    rows = load_from(source, tokenizer, tmp_path)
    assert rows.report.statistics.tokens > 0
    assert rows.report.statistics.trained_tokens == 0
    assert all(each.level != dataset_report_pb2.FINDING_LEVEL_ERROR for each in rows.report.findings)
    with pytest.raises(TrainingError) as caught:
        require_trainable(rows, Recorder())
    assert caught.value.reason == "DATASET_NOT_FOR_OBJECTIVE"


def test_the_counts_of_a_report_add_up_to_every_token_of_every_row(tmp_path: Path, tokenizer: Any) -> None:
    conversations = chats(60)
    uncut = load_from(source_of(tmp_path / "rows.jsonl", conversations), tokenizer, tmp_path).report.statistics
    assert uncut.overlong_rows == uncut.lost_tokens == 0
    assert sum(uncut.tokens_by_role.values()) == uncut.tokens
    assert set(uncut.tokens_by_role) >= {"user", "assistant"}
    assert sum(each.rows for each in uncut.lengths) == uncut.rows == 60
    assert uncut.lengths[-1].up_to >= uncut.longest > uncut.lengths[-1].up_to // 2
    for policy in (Overlong.TRUNCATE, Overlong.DROP, Overlong.SPLIT):
        rows = load_from(source_of(tmp_path / "rows.jsonl", conversations), tokenizer, tmp_path, 30, overlong=policy)
        statistics = rows.report.statistics
        assert statistics.overlong_rows > 0
        assert statistics.tokens + statistics.lost_tokens == uncut.tokens
        assert sum(statistics.tokens_by_role.values()) == statistics.tokens
        made = [example for index in range(60) for example in rows.examples(index)]
        assert statistics.examples == len(made)
        assert statistics.tokens == sum(len(example.input_ids) for example in made)
        assert statistics.trained_tokens == rows.scored.sum() == sum(example.trained[1:].sum() for example in made)
        assert (statistics.longest, statistics.lengths) == (uncut.longest, uncut.lengths)


def test_texts_need_no_chat_turns_and_every_token_of_theirs_is_trained(tmp_path: Path, tokenizer: Any) -> None:
    rows = load_from(
        write(tmp_path / "rows.jsonl", [{"text": f"Once upon a time {n}."} for n in range(5)]), tokenizer, tmp_path
    )
    assert rows.scored.tolist() == (rows.lengths - 1).tolist()
    assert rows.report.template_sha256 == ""
    assert rows.report.tokenization.train_on


def test_rows_of_the_validation_data_that_are_trained_on_are_found(tmp_path: Path, tokenizer: Any) -> None:
    conversations = chats(50)
    other: list[Conversation] = [[conversations[7][0], {"role": "assistant", "content": "Another answer."}]]
    fresh: list[Conversation] = [
        [{"role": "user", "content": "Never asked."}, {"role": "assistant", "content": "It is 3 😀"}]
    ]
    training = load_from(source_of(tmp_path / "a.jsonl", conversations), tokenizer, tmp_path)
    held = [*fresh, conversations[31], *other]
    validation = load_from(source_of(tmp_path / "b.jsonl", held, "cd" * 32), tokenizer, tmp_path)
    leaks = [(line, problem.code, problem.message) for line, problem in leakage(whole(training), whole(validation))]
    assert leaks == [
        (2, "LEAKAGE", "Validation line 2 is training line 32 too."),
        (3, "SAME_PROMPT_LEAKAGE", "Validation line 3 has the same prompt as training line 8, with another answer."),
    ]


def test_texts_without_a_prompt_do_not_leak_by_an_empty_one(tmp_path: Path, tokenizer: Any) -> None:
    training = load_from(write(tmp_path / "a.jsonl", [{"text": "One."}, {"text": "Two."}]), tokenizer, tmp_path)
    validation = load_from(write(tmp_path / "b.jsonl", [{"text": "Three."}], "cd" * 32), tokenizer, tmp_path)
    assert list(leakage(whole(training), whole(validation))) == []


def test_a_row_that_the_template_takes_too_long_for_is_named(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.2)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer.chat_template = (
        "{% if 'slow' in messages[0].content %}" + endless + "{% endif %}" + tokenizer.chat_template
    )
    conversations = chats(2)
    conversations[1][0]["content"] = "slow"
    with pytest.raises(TrainingError, match=r"TEMPLATE_TOO_SLOW: Line 2: The chat template works") as caught:
        load_from(source_of(tmp_path / "rows.jsonl", conversations), tokenizer, tmp_path)
    assert caught.value.reason == "TEMPLATE_TOO_SLOW"


def test_another_jinja_makes_the_rows_anew(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(tmp_path / "rows.jsonl", chats(1))
    options = Options(64, Overlong.TRUNCATE, Masking())
    key = tokenised.cache_key(source, tokenizer, template_of(tokenizer), options)
    assert tokenised.cache_key(source, tokenizer, template_of(tokenizer), options) == key
    monkeypatch.setattr(jinja2, "__version__", "0")
    assert tokenised.cache_key(source, tokenizer, template_of(tokenizer), options) != key


def test_the_alpaca_sample_trains_its_outputs(tmp_path: Path, tokenizer: Any) -> None:
    path = Path(os.environ.get("LUTHIER_TEST_DATA") or REPOSITORY.parent / "shared" / "data") / "alpaca_en_demo.json"
    if not path.is_file():
        pytest.skip("alpaca_en_demo.json is not here")
    originals = json.loads(path.read_text())
    source = task_pb2.DatasetSource(path=str(path), rows=len(originals))
    source.reading.format = dataset_pb2.DATASET_FORMAT_INSTRUCTION
    rows = load_from(source, tokenizer, tmp_path, max_length=100_000)
    assert len(rows) == len(originals)
    for index in range(0, len(originals), 50):
        (example,) = rows.examples(index)
        assert tokenizer.decode(example.input_ids[example.trained]) == originals[index]["output"] + "<|im_end|>"
