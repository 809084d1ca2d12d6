"""Tokenised rows: what is kept, when it is made again, and what two trainers, damage and full disks do to it."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from luthier.trainer.v1 import task_pb2
from luthier.v1 import event_pb2
from luthier_trainer.data import tokenised
from luthier_trainer.data.formats import Conversation
from luthier_trainer.data.render import encode, template_sha256
from luthier_trainer.data.tokenised import TokenisedRows, load
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


def source_of(path: Path, conversations: list[Conversation], sha256: str = "ab" * 32) -> task_pb2.DatasetSource:
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in conversations))
    return task_pb2.DatasetSource(path=str(path), sha256=sha256, rows=len(conversations))


def tokens(rows: TokenisedRows) -> list[tuple[list[int], list[bool], bool]]:
    examples = [rows.example(index) for index in range(len(rows))]
    return [(e.input_ids.tolist(), e.trained.tolist(), e.truncated) for e in examples]


def load_from(source: task_pb2.DatasetSource, tokenizer: Any, cache: Path, max_length: int = 1024) -> TokenisedRows:
    return load(source, tokenizer, max_length=max_length, cache_dir=cache, reporter=Recorder())


def test_rows_equal_each_conversation_encoded_alone(tmp_path: Path, tokenizer: Any) -> None:
    conversations = chats(700)
    rows = load_from(source_of(tmp_path / "rows.jsonl", conversations), tokenizer, tmp_path, max_length=40)
    alone = [encode(each, tokenizer, max_length=40) for each in conversations]
    assert tokens(rows) == [(e.input_ids.tolist(), e.trained.tolist(), e.truncated) for e in alone]
    assert rows.lengths.tolist() == [len(e.input_ids) for e in alone]
    assert rows.scored.tolist() == [int(e.trained[1:].sum()) for e in alone]
    assert rows.lengths.dtype == rows.scored.dtype == np.dtype(np.int64)
    assert rows.truncated == sum(e.truncated for e in alone) > 0
    assert rows.template_sha256 == template_sha256(tokenizer)
    for outside in (-1, 700):
        with pytest.raises(IndexError):
            rows.example(outside)


def test_an_example_may_be_written_to_without_touching_the_cache(tmp_path: Path, tokenizer: Any) -> None:
    rows = load_from(source_of(tmp_path / "rows.jsonl", chats(3)), tokenizer, tmp_path)
    before = tokens(rows)
    example = rows.example(1)
    example.input_ids[:] = 0
    example.trained[:] = True
    assert tokens(rows) == before


def test_the_first_token_is_never_scored(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endfor %}"
    )
    rows = load_from(source_of(tmp_path / "rows.jsonl", chats(3)), tokenizer, tmp_path)
    assert rows.example(0).trained.all()
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


@pytest.mark.parametrize("changed", ["template", "tokenizer", "max_length", "dataset"])
def test_the_rows_are_made_again_when_what_they_depend_on_changes(tmp_path: Path, tokenizer: Any, changed: str) -> None:
    source = source_of(tmp_path / "rows.jsonl", chats(5))
    first = tokens(load_from(source, tokenizer, tmp_path))
    max_length = 1024
    match changed:
        case "template":
            tokenizer.chat_template = "New." + str(tokenizer.chat_template)
        case "tokenizer":
            tokenizer.add_tokens(["Question"])
        case "max_length":
            max_length = 24
        case "dataset":
            source = source_of(tmp_path / "rows.jsonl", chats(6), sha256="cd" * 32)
    assert tokens(load_from(source, tokenizer, tmp_path, max_length)) != first


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


SCRIPT = """
import sys
from pathlib import Path
from luthier.trainer.v1 import task_pb2
from transformers import AutoTokenizer
from luthier_trainer.data import tokenised
from luthier_trainer.inspect import BUILTIN

class Silent:
    def report(self, payload, *, durable=False): pass

source = task_pb2.DatasetSource(path=sys.argv[1], rows=600)
tokenizer = AutoTokenizer.from_pretrained(BUILTIN / "tiny")
move = tokenised._move

def move_when_told(*arguments):
    print("built", flush=True)
    sys.stdin.readline()
    move(*arguments)

if sys.argv[3:] == ["wait"]:
    tokenised._move = move_when_told
rows = tokenised.load(source, tokenizer, max_length=64, cache_dir=Path(sys.argv[2]), reporter=Silent())
if sys.argv[3:] == ["wait"]:
    print(len(rows), rows.lengths.sum(), rows.scored.sum(), flush=True)
"""


def test_two_processes_that_build_at_once_agree_and_leave_one_copy(tmp_path: Path, tokenizer: Any) -> None:
    source = source_of(tmp_path / "rows.jsonl", chats(600), sha256="")
    command = [sys.executable, "-c", SCRIPT, source.path, str(tmp_path), "wait"]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "built\n"
        assert len(list((tmp_path / "tokenised").iterdir())) == 2, "each has built a copy aside"
        answers = [process.communicate("go\n", timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0]
    rows = load_from(source, tokenizer, tmp_path, max_length=64)
    assert answers == [f"{len(rows)} {rows.lengths.sum()} {rows.scored.sum()}\n"] * 2
    assert [path.name[0] != "." for path in (tmp_path / "tokenised").iterdir()] == [True]


def test_what_a_killed_trainer_left_is_swept_after_a_day(tmp_path: Path, tokenizer: Any) -> None:
    old, young = tmp_path / "tokenised" / ".old", tmp_path / "tokenised" / ".young"
    for path in (old, young):
        path.mkdir(parents=True)
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    load_from(source_of(tmp_path / "rows.jsonl", chats(2)), tokenizer, tmp_path)
    assert (old.exists(), young.exists()) == (False, True)


def test_progress_is_told_at_most_twice_a_second_and_at_the_end(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(tmp_path / "rows.jsonl", chats(2000))
    clock = iter(range(10_000))
    monkeypatch.setattr("luthier_trainer.data.tokenised.time.monotonic", lambda: next(clock) * 0.3)
    recorder = Recorder()
    load(source, tokenizer, max_length=99, cache_dir=tmp_path, reporter=recorder)
    # A batch of 256 rows takes 0.3 s by this clock, so every second batch is told.
    assert recorder.completed() == [512, 1024, 1536, 2000, 2000]
    (last,) = {p.total for p in recorder.payloads if isinstance(p, event_pb2.PhaseProgressed)}
    assert last == 2000
    again = Recorder()
    load(source, tokenizer, max_length=99, cache_dir=tmp_path, reporter=again)
    assert again.completed() == [2000]


def test_rows_that_train_nothing_keep_their_place_and_are_warned_of(tmp_path: Path, tokenizer: Any) -> None:
    conversations = chats(30)
    for wrong in (4, 17):
        conversations[wrong][0]["content"] = "long " * 200
    source = source_of(tmp_path / "rows.jsonl", conversations)
    for _ in range(2):  # made, and then from the cache
        recorder = Recorder()
        rows = load(source, tokenizer, max_length=100, cache_dir=tmp_path, reporter=recorder)
        assert len(rows) == 30
        assert [index for index, scored in enumerate(rows.scored) if not scored] == [4, 17]
        (warning,) = recorder.warnings()
        assert warning.startswith("2 of 30 rows train nothing")
        assert warning.endswith("Lines 5, 18.")


def test_a_dataset_that_trains_nothing_at_all_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    source = source_of(tmp_path / "rows.jsonl", chats(12))
    for _ in range(2):
        with pytest.raises(TrainingError, match=r"Lines 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, \.\.\.") as caught:
            load_from(source, tokenizer, tmp_path, max_length=4)
        assert caught.value.reason == "DATASET_INVALID"


def test_wrong_rows_are_named_by_line_ten_at_most(tmp_path: Path, tokenizer: Any) -> None:
    source = source_of(tmp_path / "rows.jsonl", chats(600))
    with open(source.path, "a") as file:
        file.write("{}\n" + "not json\n" * 20)
    with pytest.raises(TrainingError, match="line 601: The row has no keys") as caught:
        load_from(source, tokenizer, tmp_path)
    assert caught.value.reason == "DATASET_INVALID"
    assert caught.value.message.count("line ") == 10
    assert list((tmp_path / "tokenised").iterdir()) == []


def test_rows_that_the_template_refuses_are_named_by_line(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% if 'Question 7' in messages[0].content %}{{ raise_exception('not seven') }}{% endif %}"
        + str(tokenizer.chat_template)
    )
    with pytest.raises(TrainingError, match=r"line 8: .*not seven"):
        load_from(source_of(tmp_path / "rows.jsonl", chats(20)), tokenizer, tmp_path)


def test_a_full_disk_is_its_own_error_and_leaves_nothing_behind(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tokenised, "_sync", full)
    with pytest.raises(TrainingError) as caught:
        load_from(source_of(tmp_path / "rows.jsonl", chats(5)), tokenizer, tmp_path)
    assert (caught.value.reason, caught.value.retryable) == ("STORAGE_FULL", True)
    assert list((tmp_path / "tokenised").iterdir()) == []


def test_nothing_is_printed_or_written_outside_the_cache(tmp_path: Path) -> None:
    home, cache = tmp_path / "home", tmp_path / "cache"
    home.mkdir()
    source = source_of(tmp_path / "rows.jsonl", chats(600))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, source.path, str(cache)],
        env=environment | {"HOME": str(home)},
        cwd=home,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert list(home.rglob("*")) == []
    assert sorted(path.name for path in cache.rglob("*") if path.is_file()) == ["counts.json", "rows.arrow"]


def test_the_alpaca_sample_trains_its_outputs(tmp_path: Path, tokenizer: Any) -> None:
    path = Path(os.environ.get("LUTHIER_TEST_DATA") or REPOSITORY.parent / "shared" / "data") / "alpaca_en_demo.json"
    if not path.is_file():
        pytest.skip("alpaca_en_demo.json is not here")
    originals = json.loads(path.read_text())
    source = task_pb2.DatasetSource(path=str(path), rows=len(originals))
    rows = load_from(source, tokenizer, tmp_path, max_length=100_000)
    assert len(rows) == len(originals)
    for index in range(0, len(originals), 50):
        example = rows.example(index)
        assert tokenizer.decode(example.input_ids[example.trained]) == originals[index]["output"] + "<|im_end|>"
