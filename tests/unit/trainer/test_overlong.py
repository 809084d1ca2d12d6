"""Rows over the limit: what each policy keeps, counts and says, and that training sees exactly that."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fidelity.jobs import Recorder, StopAfter, chats, task, tiny_base
from transformers import AutoTokenizer

from luthier.trainer.v1 import report_pb2, task_pb2
from luthier.v1 import dataset_report_pb2, event_pb2, tokenization_pb2
from luthier_trainer import sft
from luthier_trainer.control import NoControl
from luthier_trainer.data.masks.masking import Masking
from luthier_trainer.data.masks.template import template_of
from luthier_trainer.data.tokens import tokenised
from luthier_trainer.data.tokens.options import Options
from luthier_trainer.data.tokens.overlong import Overlong, cut
from luthier_trainer.data.tokens.tokenised import TokenisedRows, require_trainable
from luthier_trainer.errors import TrainingError
from luthier_trainer.inspect import BUILTIN

LIMIT = 32
WORDS = ("one", "two", "three", "four", "five", "six")


@pytest.fixture
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BUILTIN / "tiny")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def long_text(words: int) -> dict[str, Any]:
    return {"text": " ".join(WORDS[n % 6] for n in range(words))}


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def load(path: Path, tokenizer: Any, policy: Overlong, cache: Path, limit: int = LIMIT) -> TokenisedRows:
    return tokenised.load(
        task_pb2.DatasetSource(path=str(path)),
        tokenizer,
        template_of(tokenizer),
        Options(limit, policy, Masking()),
        cache_dir=cache,
        reporter=Recorder(),
    )


def too_long(rows: TokenisedRows) -> list[dataset_report_pb2.Finding]:
    return [each for each in rows.report.findings if each.code == "ROW_TOO_LONG"]


@pytest.mark.parametrize("policy", list(Overlong))
def test_a_row_of_the_limit_is_whole_whatever_the_policy(policy: Overlong) -> None:
    assert cut(10, policy, 10) == ((0, 10),)
    assert cut(1, policy, 10) == ((0, 1),)


def test_every_policy_cuts_where_it_says() -> None:
    assert cut(25, Overlong.TRUNCATE, 10) == ((0, 10),)
    assert cut(25, Overlong.SPLIT, 10) == ((0, 10), (10, 20), (20, 25))
    assert cut(25, Overlong.DROP, 10) == cut(25, Overlong.ERROR, 10) == ()


def test_an_unset_policy_is_truncate_and_every_other_survives_the_contract() -> None:
    assert Overlong.from_proto(tokenization_pb2.OVERLONG_UNSPECIFIED) is Overlong.TRUNCATE
    for policy in Overlong:
        assert Overlong.from_proto(policy.to_proto()) is policy


def test_the_pieces_of_a_text_are_the_whole_text_in_order(tmp_path: Path, tokenizer: Any) -> None:
    data = write(tmp_path / "rows.jsonl", [long_text(10), long_text(200), long_text(5)])
    whole = load(data, tokenizer, Overlong.SPLIT, tmp_path, limit=4096)
    rows = load(data, tokenizer, Overlong.SPLIT, tmp_path)
    assert len(rows) == 3
    pieces = rows.examples(1)
    assert len(pieces) > 3
    assert all(len(piece.input_ids) == LIMIT for piece in pieces[:-1])
    assert np.concatenate([piece.input_ids for piece in pieces]).tolist() == whole.examples(1)[0].input_ids.tolist()
    assert all(piece.trained[1:].any() for piece in pieces)
    statistics = rows.report.statistics
    assert (statistics.overlong_rows, statistics.lost_tokens) == (1, 0)
    assert statistics.examples == len(pieces) + 2
    (finding,) = too_long(rows)
    assert (finding.line, finding.level) == (2, dataset_report_pb2.FINDING_LEVEL_WARNING)
    assert f"it becomes {len(pieces)} examples." in finding.message


def test_a_piece_that_trains_nothing_is_left_out_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    data = write(tmp_path / "rows.jsonl", [chat("why " * 100, "Because."), chat("Hi", "Hello")])
    whole = load(data, tokenizer, Overlong.SPLIT, tmp_path, limit=4096)
    rows = load(data, tokenizer, Overlong.SPLIT, tmp_path)
    pieces = rows.examples(0)
    assert 1 <= len(pieces) <= 2, "the answer lies in the last one or two pieces"
    assert all(piece.trained[1:].any() for piece in pieces)
    lost = int(whole.lengths[0]) - sum(len(piece.input_ids) for piece in pieces)
    assert rows.report.statistics.lost_tokens == lost > 0
    (finding,) = too_long(rows)
    assert f"and {lost:,} tokens in pieces that train nothing are left out" in finding.message


def test_a_dropped_row_keeps_its_place_and_has_no_example(tmp_path: Path, tokenizer: Any) -> None:
    data = write(tmp_path / "rows.jsonl", [chat("a", "b"), chat("why " * 100, "Because."), chat("c", "d")])
    whole = load(data, tokenizer, Overlong.DROP, tmp_path, limit=4096)
    rows = load(data, tokenizer, Overlong.DROP, tmp_path)
    assert [len(rows.examples(index)) for index in range(3)] == [1, 0, 1]
    assert rows.lengths[1] == rows.scored[1] == 0
    assert rows.report.statistics.lost_tokens == whole.lengths[1]
    (finding,) = too_long(rows)
    assert (finding.line, finding.level) == (2, dataset_report_pb2.FINDING_LEVEL_WARNING)
    assert not any(each.code == "NOTHING_TRAINED" for each in rows.report.findings)
    require_trainable(rows, Recorder())


def test_with_error_the_lines_and_their_lengths_are_named(tmp_path: Path, tokenizer: Any) -> None:
    data = write(tmp_path / "rows.jsonl", [chat("a", "b"), chat("why " * 100, "Because."), chat("how " * 90, "So.")])
    whole = load(data, tokenizer, Overlong.ERROR, tmp_path, limit=4096)
    rows = load(data, tokenizer, Overlong.ERROR, tmp_path)
    with pytest.raises(TrainingError) as caught:
        require_trainable(rows, Recorder())
    assert caught.value.reason == "DATASET_INVALID"
    assert f"line 2: The row has {whole.lengths[1]} tokens" in caught.value.message
    assert f"line 3: The row has {whole.lengths[2]} tokens" in caught.value.message
    assert "line 1:" not in caught.value.message


def job(folder: Path, base: Path, data: Path, overlong: str, **numbers: Any) -> task_pb2.TrainerTask:
    made = task(folder, base, data, max_length=LIMIT, **numbers)
    made.spec.fine_tune.tokenization.overlong = tokenization_pb2.Overlong.Value(f"OVERLONG_{overlong}")
    made.training_dataset.ClearField("sha256")
    return made


def losses(request: task_pb2.TrainerTask) -> tuple[list[float], list[int]]:
    recorder = Recorder()
    assert isinstance(sft.train(request, recorder, NoControl()), report_pb2.Finished)
    steps = list(recorder.steps())
    return [each.loss for each in steps], [each.trained_tokens for each in steps]


def test_a_job_on_split_rows_computes_what_one_on_their_pieces_computes(tmp_path: Path, tokenizer: Any) -> None:
    """One row of the split dataset makes up each step, and all of its pieces make up the same step of the other job.
    The pieces are handed over as they are: as texts of their own they would get tokens around them."""
    base = tiny_base(tmp_path)
    data = write(tmp_path / "rows.jsonl", [long_text(120)])
    pieces = load(data, tokenizer, Overlong.SPLIT, tmp_path / "pieces").examples(0)
    split = job(tmp_path / "a", base, data, "SPLIT", batch_size=1, max_steps=4)
    split_losses, split_tokens = losses(split)

    other = job(tmp_path / "b", base, data, "TRUNCATE", batch_size=len(pieces), max_steps=4)
    own = tokenised.load

    def load_pieces(*arguments: Any, **named: Any) -> Any:
        found = own(*arguments, **named)
        scored = np.array([int(piece.trained[1:].sum()) for piece in pieces])
        lengths = np.array([len(piece.input_ids) for piece in pieces])
        return _Pieces(found, pieces, lengths, scored)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenised, "load", load_pieces)
        piece_losses, piece_tokens = losses(other)
    assert split_tokens == piece_tokens
    # The order of the rows in a step differs, so sums are rounded differently.
    assert split_losses == pytest.approx(piece_losses, rel=1e-5)


class _Pieces:
    """Pieces in the place of the rows of another dataset."""

    def __init__(self, rows: TokenisedRows, pieces: list[Any], lengths: Any, scored: Any) -> None:
        self.pieces, self.lengths, self.scored = pieces, lengths, scored
        self.counts, self.report = rows.counts, rows.report
        self.template_sha256, self.truncated, self.is_whole = rows.template_sha256, 0, True

    def __len__(self) -> int:
        return len(self.pieces)

    def examples(self, index: int) -> list[Any]:
        return [self.pieces[index]]

    @property
    def sizes(self) -> Any:
        return self.lengths, self.lengths, self.scored

    def scores(self, indices: Any) -> bool:
        return bool(self.scored[indices].any())

    def complete(self) -> None:
        pass


def test_a_dropped_row_leaves_its_slot_empty_and_the_step_is_that_of_the_others(tmp_path: Path) -> None:
    base = tiny_base(tmp_path)
    rows = [chat(f"Count {n}.", WORDS[n % 6]) for n in range(7)]
    with_long = write(tmp_path / "long.jsonl", [*rows, chat("why " * 100, "Because.")])
    without = write(tmp_path / "short.jsonl", rows)
    # One step over all rows: the order in it changes rounding alone.
    dropped, dropped_tokens = losses(job(tmp_path / "a", base, with_long, "DROP", batch_size=8, max_steps=1))
    short, short_tokens = losses(job(tmp_path / "b", base, without, "DROP", batch_size=8, max_steps=1))
    assert dropped_tokens == short_tokens
    assert dropped == pytest.approx(short, rel=1e-6)


def test_a_step_whose_rows_are_all_dropped_changes_no_weight_and_is_told(tmp_path: Path) -> None:
    base = tiny_base(tmp_path)
    data = write(tmp_path / "rows.jsonl", [chat("a", "b"), chat("why " * 100, "Because."), chat("c", "d")])
    request = job(tmp_path, base, data, "DROP", batch_size=1, max_steps=6)
    recorder = Recorder()
    end = sft.train(request, recorder, NoControl())
    assert isinstance(end, report_pb2.Finished)
    assert end.step == 6
    assert end.metrics["empty_steps"] == 2
    steps = list(recorder.steps())
    assert len(steps) == 4
    assert all(np.isfinite(each.loss) and each.loss > 0 for each in steps)
    assert end.metrics["train_loss"] == pytest.approx(sum(each.loss for each in steps) / 4)
    told = [each.message for each in recorder.reports if isinstance(each, event_pb2.LogEmitted)]
    assert sum("is made without an update: nothing of row 2 is trained" in each for each in told) == 2


def test_a_job_of_split_and_dropped_rows_resumes_bit_by_bit(tmp_path: Path) -> None:
    base = tiny_base(tmp_path)
    data = write(tmp_path / "rows.jsonl", [long_text(3 + 5 * n) for n in range(6)])
    for policy in ("SPLIT", "DROP"):
        folder = tmp_path / policy
        straight, _ = losses(job(folder / "straight", base, data, policy, batch_size=2, max_steps=6, dropout=0.1))
        recorder = Recorder()
        first = job(folder / "stopped", base, data, policy, batch_size=2, max_steps=6, dropout=0.1)
        end = sft.train(first, recorder, StopAfter(recorder, 3))
        assert isinstance(end, report_pb2.Stopped)
        first.attempt, first.resume_from = 2, str(folder / "stopped" / "checkpoints" / end.checkpoint)
        rest, _ = losses(first)
        assert [each.loss for each in recorder.steps()] + rest == straight


def test_a_checkpoint_of_other_options_is_refused(tmp_path: Path) -> None:
    base = tiny_base(tmp_path)
    data = chats(tmp_path / "chats.jsonl")
    recorder = Recorder()
    first = job(tmp_path, base, data, "DROP", max_steps=6)
    end = sft.train(first, recorder, StopAfter(recorder, 2))
    assert isinstance(end, report_pb2.Stopped)
    other = job(tmp_path, base, data, "SPLIT", max_steps=6)
    other.attempt, other.resume_from = 2, str(tmp_path / "checkpoints" / end.checkpoint)
    with pytest.raises(TrainingError) as caught:
        sft.train(other, Recorder(), NoControl())
    assert caught.value.reason == "CHECKPOINT_MISMATCH"
