"""Rows that are tokenised while a job trains: they are those of the cache, whoever makes them and whenever."""

import csv
import fcntl
import gzip
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fidelity.jobs import Recorder, StopAfter, task, tiny_base
from pyarrow import parquet
from safetensors.torch import load_file

from luthier.trainer.v1.report_pb2 import Finished, Stopped
from luthier.trainer.v1.task_pb2 import CONTROL_ACTION_UNSPECIFIED, ControlAction, TrainerTask
from luthier.v1 import dataset_pb2, event_pb2, job_pb2, tokenization_pb2
from luthier_trainer import sft
from luthier_trainer.control import NoControl
from luthier_trainer.data.files.numbered import numbered_rows
from luthier_trainer.data.files.rows import open_rows
from luthier_trainer.data.formats import records
from luthier_trainer.data.tokens import cache, streamed, tokenised
from luthier_trainer.data.tokens.streamed import StreamedRows, Streams, Wanted
from luthier_trainer.data.tokens.task import tokens_for
from luthier_trainer.data.tokens.tokenised import TokenisedRows, require_trainable
from luthier_trainer.errors import TrainingError
from luthier_trainer.order import epoch_order
from luthier_trainer.report import Payload

COUNT = 30
WORDS = "one two three four"


def row(number: int) -> dict[str, Any]:
    return {
        "prompt": f"Count {number}: \u00e9\U0001f600",
        "completion": " ".join(WORDS.split()[: number % 4 + 1]) * (number % 9 + 1),
    }


ROWS = [row(number) for number in range(COUNT)]


def jsonl(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in rows)


def as_csv(rows: list[Any]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["prompt", "completion"])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows: list[Any]) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), file, row_group_size=7)
    return file.getvalue()


FILES: dict[str, Callable[[list[Any]], bytes]] = {
    "jsonl": jsonl,
    "spaced": lambda rows: b"\xef\xbb\xbf\n \n" + jsonl(rows).replace(b"\n", b"\r\n\n"),
    "gzip": lambda rows: gzip.compress(jsonl(rows)),
    "json": lambda rows: json.dumps(rows).encode(),
    "csv": as_csv,
    "parquet": as_parquet,
}


def job(folder: Path, base: Path, content: bytes, **more: Any) -> TrainerTask:
    """A task as the server makes it: the file was looked at, so that its format and its rows are known."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "rows"
    path.write_bytes(content)
    made = task(folder, base, path, **more)
    with records(path) as found:
        count = sum(1 for line, _, _ in found if line)
        for source in (
            made.training_dataset,
            *([made.validation_dataset] if made.HasField("validation_dataset") else []),
        ):
            source.rows, source.sha256 = count, hashlib.sha256(content).hexdigest()
            source.reading.CopyFrom(found.reading.to_proto())
    return made


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "_LOOK_SECONDS", 0.0)
    monkeypatch.setattr(streamed, "_POLL_SECONDS", 0.001)


def wanted_by(request: TrainerTask) -> Wanted:
    tokens = tokens_for(request)
    folder = Path(request.cache_dir)
    return Wanted(request.training_dataset, tokens.tokenizer, tokens.template, tokens.options, folder, 0, Recorder())


@contextmanager
def being_built(directory: Path) -> Iterator[None]:
    """As if another process made the entry of the cache: it holds its lock for as long as this lasts."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    aside = tempfile.mkdtemp(prefix=f".{directory.name[:16]}-", dir=directory.parent)
    held = os.open(aside, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_SH)
    try:
        yield
    finally:
        os.close(held)
        os.rmdir(aside)


def accept(found: TokenisedRows) -> None:
    require_trainable(found, Recorder())


def tokens(rows: TokenisedRows | StreamedRows) -> list[Any]:
    return [
        [(e.input_ids.tolist(), e.trained.tolist(), e.input_ids.dtype) for e in rows.examples(n)]
        for n in range(len(rows))
    ]


def stream(request: TrainerTask) -> StreamedRows:
    wanted = wanted_by(request)
    with being_built(wanted.directory()):
        found = Streams().load(wanted, accept)
    assert isinstance(found, StreamedRows)
    return found


@pytest.mark.parametrize("kind", FILES)
def test_rows_by_number_are_the_rows_of_the_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "rows"
    path.write_bytes(FILES[kind](ROWS))
    with open_rows(path) as file:
        straight, reading = list(file), file.file_format
    with records(path) as found:
        list(found)
        assert found.reading.file_format is reading
        rows = numbered_rows(path, found.reading)
    assert rows is not None
    assert [rows.row(number) for number in reversed(range(len(rows)))] == straight[::-1]
    assert len(rows) == COUNT
    rows.close()


@pytest.mark.parametrize("kind", FILES)
def test_streamed_rows_are_those_of_the_cache(tmp_path: Path, base: Path, kind: str) -> None:
    request = job(tmp_path, base, FILES[kind](ROWS), max_steps=1)
    rows = stream(request)
    found = wanted_by(request).load(rows._directory)
    assert not rows.is_whole
    assert tokens(rows) == tokens(found)
    assert rows.scores(np.arange(3))
    assert rows.is_whole  # it has looked
    assert tokens(rows) == tokens(found)


@pytest.mark.parametrize("overlong", ["TRUNCATE", "DROP", "SPLIT"])
@pytest.mark.parametrize("text", [False, True], ids=["chats", "texts"])
def test_streamed_rows_are_cut_as_those_of_the_cache(tmp_path: Path, base: Path, overlong: str, text: bool) -> None:
    content = jsonl([{"text": each["completion"] * 5} for each in ROWS] if text else ROWS)
    request = job(tmp_path, base, content, max_steps=1, max_length=24)
    request.spec.fine_tune.tokenization.overlong = tokenization_pb2.Overlong.Value(f"OVERLONG_{overlong}")
    rows = stream(request)
    report, template = rows.report, rows.template_sha256
    streamed_tokens = tokens(rows)
    found = wanted_by(request).load(rows._directory)
    assert streamed_tokens == tokens(found)
    assert (report.max_length, report.tokenization) == (found.report.max_length, found.report.tokenization)
    assert template == found.template_sha256
    request.cache_dir += "-other"
    other = stream(request)
    for start in range(0, COUNT, 3):
        some = np.arange(start, start + 3)
        assert other.scores(some) == bool(found.scored[some].any())
    assert not other.is_whole


def test_a_dataset_that_nobody_makes_is_made_at_once_and_one_that_is_there_is_used(tmp_path: Path, base: Path) -> None:
    wanted = wanted_by(job(tmp_path, base, jsonl(ROWS), max_steps=1))
    assert isinstance(Streams().load(wanted, accept), TokenisedRows)
    with being_built(wanted.directory()):
        assert isinstance(Streams().load(wanted, accept), TokenisedRows)


def test_whoever_builds_an_entry_is_seen_until_it_dies(tmp_path: Path) -> None:
    directory = cache.entry(tmp_path, "ab" * 32)
    assert not cache.is_being_built(directory)
    seen: list[bool] = []

    def write(aside: Path) -> None:
        (aside / cache.COUNTS).write_bytes(b"{}")
        seen.append(cache.is_being_built(directory))
        seen.append(cache.is_being_built(cache.entry(tmp_path, "cd" * 32)))

    cache.build(directory, write, lambda _: True)
    assert seen == [True, False]
    assert not cache.is_being_built(directory)
    (directory.parent / f".{directory.name[:16]}-left").mkdir()  # by a process that was killed
    assert not cache.is_being_built(directory)


def test_rows_whose_maker_died_are_made_by_the_job_itself(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = stream(job(tmp_path, base, jsonl(ROWS), max_steps=1))
    rows._look(at_once=True)
    assert not rows.is_whole  # it may come again
    monkeypatch.setattr(streamed, "_LOST_SECONDS", -1.0)
    rows.complete()
    assert rows.is_whole


def test_a_second_dataset_is_waited_for_while_the_first_is_made(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed, "_LOST_SECONDS", -1.0)
    first = wanted_by(job(tmp_path / "a", base, jsonl(ROWS), max_steps=1))
    second = wanted_by(job(tmp_path / "b", base, jsonl(ROWS[:9]), max_steps=1))
    streams = Streams()
    with being_built(first.directory()):
        assert isinstance(streams.load(first, accept), StreamedRows)
        rows = streams.load(second, accept)
        assert rows.scores(np.arange(9))
        assert isinstance(rows, StreamedRows)
        assert not rows.is_whole


def test_rows_that_are_other_rows_than_training_began_on_end_the_job(tmp_path: Path, base: Path) -> None:
    rows = stream(job(tmp_path, base, jsonl(ROWS), max_steps=1))
    fewer = wanted_by(job(tmp_path / "other", base, jsonl(ROWS[:-1]), max_steps=1))
    fewer.load(rows._directory)
    with pytest.raises(TrainingError) as caught:
        rows.complete()
    assert caught.value.reason == "CACHE_DAMAGED"


def test_a_row_in_error_trains_nothing_and_ends_the_job_as_if_all_rows_had_been_there(
    tmp_path: Path, base: Path
) -> None:
    request = job(tmp_path, base, jsonl([*ROWS[:4], {"prompt": "no answer"}, *ROWS[4:], {"prompt": 1}]), max_steps=1)
    rows = stream(request)
    assert rows.examples(4) == []
    wanted = wanted_by(request)
    with pytest.raises(TrainingError) as before:
        accept(wanted.load(rows._directory))
    with pytest.raises(TrainingError) as caught:
        rows.scores(np.array([3, 4]))
    assert (caught.value.reason, caught.value.message) == ("DATASET_INVALID", before.value.message)
    assert "line 5:" in caught.value.message


class BuiltAt(Recorder):
    """Reports, and another process that has made the rows when a step is reported."""

    def __init__(self, request: TrainerTask, step: int) -> None:
        super().__init__()
        self._wanted = wanted_by(request)
        self._step = step

    def report(self, payload: Payload, *, durable: bool = False) -> None:
        super().report(payload, durable=durable)
        if isinstance(payload, event_pb2.StepCompleted) and payload.step == self._step:
            self._wanted.load(self._wanted.directory())

    def told(self) -> list[str]:
        return [each.message for each in self.reports if isinstance(each, event_pb2.LogEmitted)]


def train(request: TrainerTask, recorder: Recorder, control: Any = None) -> Finished | Stopped:
    """Trains while somebody else makes the rows."""
    with being_built(wanted_by(request).directory()):
        return sft.train(request, recorder, control or NoControl())


def numbers(*recorders: Recorder) -> list[tuple[int, float, float, float, int]]:
    return [
        (e.step, e.loss, e.learning_rate, e.grad_norm, e.trained_tokens) for each in recorders for e in each.steps()
    ]


def weights(folder: Path) -> dict[str, bytes]:
    (file,) = (folder / "model").glob("*model.safetensors")
    return {name: each.numpy().tobytes() for name, each in load_file(file).items()}


JOB: dict[str, Any] = {"max_steps": 7, "dropout": 0.2, "evaluation": job_pb2.Evaluation(every_steps=3)}


def test_a_job_is_the_same_whichever_way_its_rows_come_and_after_a_resume(tmp_path: Path, base: Path) -> None:
    content = jsonl(ROWS)
    straight = Recorder()
    assert isinstance(sft.train(job(tmp_path / "straight", base, content, **JOB), straight, NoControl()), Finished)

    switching = job(tmp_path / "switching", base, content, **JOB)
    recorder = BuiltAt(switching, 4)
    assert isinstance(train(switching, recorder), Finished)
    assert numbers(recorder) == numbers(straight)
    assert [e.loss for e in recorder.evaluations()] == [e.loss for e in straight.evaluations()]
    assert weights(tmp_path / "switching") == weights(tmp_path / "straight")
    [plan] = [each for each in recorder.reports if isinstance(each, event_pb2.PlanResolved)]
    assert any("while the rows are tokenised" in note for note in plan.notes)

    # Stopped while the rows come one by one, and gone on from with all of them there.
    first, second = Recorder(), Recorder()
    stopped = train(job(tmp_path / "broken", base, content, **JOB), first, StopAfter(first, 3))
    assert isinstance(stopped, Stopped)
    resume_from = tmp_path / "broken" / "checkpoints" / stopped.checkpoint
    kept = shutil.copytree(resume_from, tmp_path / "kept" / stopped.checkpoint)
    again = job(tmp_path / "broken", base, content, attempt=2, resume_from=resume_from, **JOB)
    assert isinstance(sft.train(again, second, NoControl()), Finished)
    assert numbers(first, second) == numbers(straight)
    assert weights(tmp_path / "broken") == weights(tmp_path / "straight")
    assert [each.verified for each in second.reports if isinstance(each, event_pb2.ResumeChecked)] == [True]

    # The other way round: the cache was emptied between the two.
    other = job(tmp_path / "other", base, content, attempt=2, resume_from=kept, **JOB)
    third = BuiltAt(other, 5)
    assert isinstance(train(other, third), Finished)
    assert numbers(first, third) == numbers(straight)
    assert weights(tmp_path / "other") == weights(tmp_path / "straight")


def test_a_bad_row_far_down_ends_a_job_that_trains_with_its_line(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed, "_FEW", 4)  # no more are looked at before the first step
    monkeypatch.setattr(streamed, "_TOGETHER", 2)
    content = jsonl([*ROWS, {"prompt": "no answer"}])
    request = job(tmp_path, base, content, max_steps=500, batch_size=1)
    assert COUNT not in epoch_order(request.spec.fine_tune.hyperparameters.seed, 0, COUNT + 1)[:3]
    recorder = BuiltAt(request, 2)
    with pytest.raises(TrainingError) as caught:
        train(request, recorder)
    assert caught.value.reason == "DATASET_INVALID"
    assert f"line {COUNT + 1}:" in caught.value.message
    assert [each.step for each in recorder.steps()] == [1, 2]


class StopsWhileItWaits:
    """A stop that comes once the last step is made and the rows are still not there."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def requested(self) -> ControlAction.ValueType:
        newest = self._recorder.reports[-1] if self._recorder.reports else None
        waits = isinstance(newest, event_pb2.PhaseProgressed) and newest.phase == event_pb2.PHASE_TOKENIZING
        return ControlAction.CONTROL_ACTION_CANCEL if waits else CONTROL_ACTION_UNSPECIFIED


def test_no_job_ends_before_all_rows_are_there_and_one_that_waits_can_be_stopped(tmp_path: Path, base: Path) -> None:
    recorder = Recorder()
    end = train(job(tmp_path, base, jsonl(ROWS), max_steps=2), recorder, StopsWhileItWaits(recorder))
    assert end == Stopped(step=2, checkpoint="000002-a1")
    assert not (tmp_path / "model").exists()


def test_what_is_lost_of_rows_is_told_when_all_are_there(tmp_path: Path, base: Path) -> None:
    request = job(tmp_path, base, jsonl(ROWS), max_steps=4, max_length=24)
    recorder = BuiltAt(request, 2)
    assert isinstance(train(request, recorder), Finished)
    assert any("are cut off at their end" in each for each in recorder.told())


def test_a_file_that_is_not_the_one_that_was_counted_is_not_streamed(tmp_path: Path, base: Path) -> None:
    request = job(tmp_path, base, jsonl(ROWS), max_steps=1)
    request.training_dataset.rows += 1
    wanted = wanted_by(request)
    with being_built(wanted.directory()):
        assert isinstance(Streams().load(wanted, accept), TokenisedRows)
    unknown = wanted_by(job(tmp_path / "other", base, jsonl(ROWS), max_steps=1))
    unknown.source.reading.format = dataset_pb2.DATASET_FORMAT_UNSPECIFIED
    with being_built(unknown.directory()):
        assert isinstance(Streams().load(unknown, accept), TokenisedRows)


def test_a_copy_of_rows_takes_no_more_room_than_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(FILES["json"](ROWS))
    with records(path) as found:
        list(found)
    monkeypatch.setattr("luthier_trainer.data.files.numbered.MAX_COPIED_BYTES", 500)
    assert numbered_rows(path, found.reading) is None


def test_errors_are_told_as_soon_as_they_are_known(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier_trainer.data.tokens.conversion._REPORT_SECONDS", 0.0)
    request = job(tmp_path, base, jsonl([*ROWS[:2], {"prompt": "no answer"}, *ROWS[2:]]), max_steps=1)
    recorder = Recorder()
    wanted = wanted_by(request)
    rows = tokenised.load(
        wanted.source, wanted.tokenizer, wanted.template, wanted.options, cache_dir=tmp_path / "new", reporter=recorder
    )
    assert len(rows) == COUNT + 1
    [error] = [each for each in recorder.reports if isinstance(each, event_pb2.LogEmitted)]
    assert error.level == event_pb2.LOG_LEVEL_ERROR
