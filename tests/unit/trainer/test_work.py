"""Work on datasets: previews and checks, what they answer, and that nothing in a dataset or a model ends them badly."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import warm
from fidelity.jobs import Recorder
from transformers import AutoTokenizer
from unit.trainer.attempts import HostConnection, ask, kinds, read_exit, read_spool, running_host, wait_for

from luthier.trainer import attempt
from luthier.trainer.v1 import task_pb2
from luthier.v1 import dataset_report_pb2, datasets_pb2, job_pb2, tokenization_pb2
from luthier_trainer import work
from luthier_trainer.control import NoControl
from luthier_trainer.inspect import BUILTIN

TINY = str(BUILTIN / "tiny")


def chat(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]}


CHATS = [chat("Hi", "Hello there."), chat("Who?", "Me 😀"), chat("Why?", "Because.")]
PREFERENCE = {"prompt": "Say a word.", "chosen": "Yes, gladly.", "rejected": "No."}


def write(path: Path, rows: list[Any]) -> task_pb2.DatasetSource:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return task_pb2.DatasetSource(path=str(path), id="ds_1", rows=len(rows))


def task(folder: Path, rows: list[Any], *, base: str = TINY, job_id: str = "", **spec: Any) -> task_pb2.TrainerTask:
    made = task_pb2.TrainerTask(
        job_id=job_id,
        spec=job_pb2.JobSpec(fine_tune=job_pb2.FineTuneTask(base_model="builtin/tiny", **spec)),
        training_dataset=write(folder / "rows.jsonl", rows),
        cache_dir=str(folder / "cache"),
    )
    if base:
        made.base_model.location = base
    return made


def preview(
    request: task_pb2.TrainerTask, count: int = 0, lines: tuple[int, ...] = ()
) -> datasets_pb2.PreviewDatasetResponse:
    request.preview.CopyFrom(task_pb2.PreviewWork(count=count, lines=lines))
    answer = work.perform(request, Recorder(), NoControl())
    assert answer.HasField("preview"), answer.error
    return answer.preview


def check(request: task_pb2.TrainerTask) -> task_pb2.DataAnswer:
    request.check.SetInParent()
    return work.perform(request, Recorder(), NoControl())


def codes(findings: Any) -> list[tuple[int, str]]:
    return [(each.line, each.code) for each in findings]


def test_a_preview_shows_the_tokens_that_are_trained_and_their_texts_make_up_the_row(tmp_path: Path) -> None:
    response = preview(task(tmp_path, CHATS), count=2)
    assert [row.line for row in response.rows] == [1, 2]
    (sequence,) = response.rows[1].sequences
    assert [(turn.role, turn.content, turn.trained) for turn in sequence.turns] == [
        ("user", "Who?", False),
        ("assistant", "Me 😀", True),
    ]
    assert "".join(token.text for token in sequence.tokens) == sequence.text
    assert "".join(token.text for token in sequence.tokens if token.trained) == "Me 😀<|im_end|>"
    ids = AutoTokenizer.from_pretrained(TINY)(sequence.text, add_special_tokens=False)["input_ids"]
    assert [token.id for token in sequence.tokens] == ids
    assert sequence.token_count == len(ids)
    assert sequence.trained_count == sum(token.trained for token in sequence.tokens)
    assert not any(token.lost for token in sequence.tokens)
    assert len(response.template_sha256) == 64
    assert response.mask_method == "generation blocks"


def test_a_preview_of_lines_shows_these_and_says_which_are_not_there(tmp_path: Path) -> None:
    response = preview(task(tmp_path, [*CHATS, "no json"]), lines=(9, 4, 2))
    assert [row.line for row in response.rows] == [2, 4, 9]
    assert response.rows[0].sequences[0].turns[0].content == "Who?"
    assert not response.rows[1].sequences
    assert response.rows[1].findings[0].level == dataset_report_pb2.FINDING_LEVEL_ERROR
    assert codes(response.rows[2].findings) == [(9, "NO_SUCH_LINE")]


def test_a_preview_without_a_base_model_has_turns_and_loads_no_tokenizer(tmp_path: Path) -> None:
    turns = chat("Hi", "Hello", weight=0)["messages"] + chat("Who?", "Me")["messages"]
    request = task(tmp_path, [{"messages": turns}, chat("Who?", "Me")], base="")
    request.preview.count = 2
    program = (
        "import sys; from luthier.trainer.v1 import task_pb2\n"
        "from luthier_trainer import work; from luthier_trainer.control import NoControl\n"
        "task = task_pb2.TrainerTask.FromString(sys.stdin.buffer.read())\n"
        "sys.stdout.buffer.write(work.perform(task, None, NoControl()).SerializeToString())\n"
        "loaded = {'torch', 'transformers', 'tokenizers', 'datasets'} & sys.modules.keys()\n"
        "sys.exit(f'{loaded} is loaded' if loaded else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], input=request.SerializeToString(), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    response = task_pb2.DataAnswer.FromString(done.stdout).preview
    assert [[turn.trained for turn in row.sequences[0].turns] for row in response.rows] == [
        [False, False, False, True],
        [False, True],
    ]
    assert not response.rows[0].sequences[0].tokens
    assert response.template_sha256 == response.mask_method == ""


def test_a_preview_shows_both_answers_of_a_preference_and_the_reference_of_a_prompt(tmp_path: Path) -> None:
    (row,) = preview(task(tmp_path, [PREFERENCE])).rows
    assert [sequence.name for sequence in row.sequences] == ["chosen", "rejected"]
    assert "".join(token.text for token in row.sequences[1].tokens if token.trained) == "No.<|im_end|>"
    (row,) = preview(task(tmp_path, [{"prompt": "1 + 1?", "answer": "2"}])).rows
    assert json.loads(row.reference_json) == {"answer": "2"}
    assert row.sequences[0].trained_count == 0


@pytest.mark.parametrize(
    ("overlong", "trained"), [("TRUNCATE", False), ("DROP", False), ("SPLIT", True), ("ERROR", False)]
)
def test_a_preview_marks_what_is_lost_beyond_the_limit(tmp_path: Path, overlong: str, trained: bool) -> None:
    tokenization = tokenization_pb2.Tokenization(overlong=tokenization_pb2.Overlong.Value(f"OVERLONG_{overlong}"))
    hyperparameters = job_pb2.Hyperparameters(max_length=16)
    row = chat(" ".join(["why"] * 80), "Because it is so.")
    request = task(tmp_path, [row], tokenization=tokenization, hyperparameters=hyperparameters)
    (shown,) = preview(request).rows
    (sequence,) = shown.sequences
    assert "ROW_TOO_LONG" in [each.code for each in shown.findings]
    assert (sequence.trained_count > 0) == trained
    assert all(token.lost for token in sequence.tokens[16:] if overlong != "SPLIT")
    assert any(token.lost for token in sequence.tokens)
    if overlong == "SPLIT":
        assert sequence.tokens[0].lost and not all(token.lost for token in sequence.tokens[16:])


def test_a_preview_is_bounded_however_long_a_row_is(tmp_path: Path) -> None:
    (row,) = preview(task(tmp_path, [{"text": "one two three 😀 " * 20_000}])).rows
    (sequence,) = row.sequences
    assert len(sequence.tokens) == 8192
    assert sequence.token_count > 50_000
    assert len(sequence.text.encode()) <= 64 * 1024


def test_lone_surrogates_are_shown_or_refused_and_never_a_crash(tmp_path: Path) -> None:
    row = '{"messages": [{"role": "user", "content": "a\\ud800b"}, {"role": "assistant", "content": "ok"}]}'
    (shown,) = preview(task(tmp_path, [row])).rows
    assert shown.findings or shown.sequences[0].tokens
    answer = check(task(tmp_path, [row, *CHATS]))
    assert answer.HasField("check")


def test_a_row_that_the_template_refuses_is_shown_with_the_reason(tmp_path: Path) -> None:
    template = "{% if messages[0].content == 'Who?' %}{{ raise_exception('not you') }}{% endif %}" + Path(
        TINY, "chat_template.jinja"
    ).read_text(encoding="utf-8")
    tokenization = tokenization_pb2.Tokenization(chat_template=template)
    response = preview(task(tmp_path, CHATS, tokenization=tokenization))
    assert [len(row.findings) for row in response.rows] == [0, 1, 0]
    assert "not you" in response.rows[1].findings[0].message
    assert response.rows[1].sequences[0].turns
    answer = check(task(tmp_path, CHATS, tokenization=tokenization))
    assert codes(answer.check.training.findings) == [(2, "TEMPLATE_REFUSES")]
    assert answer.check.training.statistics.examples == 2


def test_a_model_that_is_not_there_is_an_answer_with_a_hint(tmp_path: Path) -> None:
    for kind in ("preview", "check"):
        request = task(tmp_path, CHATS, base=str(tmp_path / "nothing"))
        getattr(request, kind).SetInParent()
        answer = work.perform(request, Recorder(), NoControl())
        assert answer.error.reason == "MODEL_NOT_FOUND"
        assert answer.error.hint


def test_a_check_says_how_rows_became_tokens_and_keeps_these_for_the_job(tmp_path: Path) -> None:
    request = task(tmp_path, CHATS)
    report = check(request).check.training
    assert report.max_length == 1024
    assert report.tokenization.train_on == tokenization_pb2.TRAIN_ON_ASSISTANT
    assert report.tokenization.overlong == tokenization_pb2.OVERLONG_TRUNCATE
    assert (report.statistics.rows, report.statistics.examples) == (3, 3)
    (kept,) = (tmp_path / "cache" / "tokenised").iterdir()
    inode = (kept / "rows.arrow").stat().st_ino
    assert check(request).check.training == report
    request.job_id = "job_1"
    assert check(request).check.training == report
    assert (kept / "rows.arrow").stat().st_ino == inode, "nothing was made again"


def test_a_check_of_errors_is_a_report_for_a_person_and_an_error_for_a_job(tmp_path: Path) -> None:
    rows = [*CHATS, *["no json"] * 1500]
    report = check(task(tmp_path, rows)).check.training
    assert len(report.findings) == 1000
    assert sum(each.count for each in report.counts) == 1500
    answer = check(task(tmp_path, rows, job_id="job_1"))
    assert answer.error.reason == "DATASET_INVALID"
    assert "1,500 errors" in answer.error.message
    assert "lines 4, " in answer.error.message


def test_a_check_of_preference_data_is_a_report_for_a_person_and_an_error_for_a_job(tmp_path: Path) -> None:
    report = check(task(tmp_path, [PREFERENCE])).check.training
    assert report.statistics.examples == 2
    answer = check(task(tmp_path, [PREFERENCE], job_id="job_1"))
    assert answer.error.reason == "DATASET_NOT_FOR_OBJECTIVE"
    assert "not offered yet" in answer.error.hint


def test_a_check_finds_validation_rows_that_are_trained_on(tmp_path: Path) -> None:
    request = task(tmp_path, CHATS)
    request.validation_dataset.CopyFrom(write(tmp_path / "validation.jsonl", [chat("New", "Yes"), CHATS[2], "no json"]))
    reports = check(request).check
    assert codes(reports.validation.findings)[1:] == [(2, "LEAKAGE")]
    assert reports.validation.findings[0].level == dataset_report_pb2.FINDING_LEVEL_ERROR
    assert [(each.code, each.count) for each in reports.validation.counts][-1] == ("LEAKAGE", 1)
    again = check(request).check
    assert again == reports, "what was found about a pair of datasets is not kept with one of them"


def test_an_empty_file_is_a_finding(tmp_path: Path) -> None:
    report = check(task(tmp_path, [])).check.training
    assert codes(report.findings) == [(0, "EMPTY_FILE")]
    assert check(task(tmp_path, [], job_id="job_1")).error.reason == "DATASET_INVALID"


# As a process


def directory(data_dir: Path, request: task_pb2.TrainerTask, name: str = "0f3a") -> Path:
    place = data_dir / "work" / name
    place.mkdir(parents=True)
    (place / attempt.TASK).write_bytes(request.SerializeToString())
    return place


def run(place: Path) -> int:
    """The exit code of a trainer that runs the work."""
    return warm.run(warm.trainer, place, output=place / "output", seconds=120)[0]


def read_answer(place: Path) -> task_pb2.DataAnswer:
    return task_pb2.DataAnswer.FromString((place / attempt.ANSWER).read_bytes())


def test_a_process_leaves_its_answer_before_its_last_report(tmp_path: Path) -> None:
    request = task(tmp_path, CHATS)
    request.check.SetInParent()
    place = directory(tmp_path, request)
    cold = subprocess.run([sys.executable, "-m", "luthier_trainer.main", str(place)], capture_output=True, timeout=120)
    assert cold.returncode == 0
    assert read_answer(place).check.training.statistics.rows == 3
    reports = read_spool(place)
    assert kinds(reports)[0] == "started" and kinds(reports)[-1] == "finished"
    assert reports[-2].phase_progressed.completed == 3


def test_an_answer_that_is_an_error_is_a_failed_report_too(tmp_path: Path) -> None:
    request = task(tmp_path, CHATS, base=str(tmp_path / "nothing"))
    request.preview.count = 1
    place = directory(tmp_path, request)
    assert run(place) == 1
    assert read_answer(place).error.reason == read_spool(place)[-1].failed.error.reason == "MODEL_NOT_FOUND"


def test_a_file_that_is_gone_is_an_answer(tmp_path: Path) -> None:
    request = task(tmp_path, CHATS)
    request.check.SetInParent()
    Path(request.training_dataset.path).unlink()
    place = directory(tmp_path, request)
    assert run(place) == 1
    assert read_answer(place).error.reason == "INTERNAL"


def endless(folder: Path) -> task_pb2.TrainerTask:
    """A check that takes minutes."""
    request = task(folder, CHATS)
    with open(request.training_dataset.path, "w") as file:
        for number in range(400_000):
            file.write(json.dumps(chat(f"Question {number}", f"Answer {number}")) + "\n")
    request.check.SetInParent()
    return request


@pytest.mark.parametrize("how", ["control", "sigterm"])
def test_a_check_that_is_not_wanted_any_more_leaves_at_once(tmp_path: Path, how: str) -> None:
    place = directory(tmp_path, endless(tmp_path))
    with warm.started(warm.trainer, place, output=place / "output") as process:
        wait_for(lambda: "phase_progressed" in kinds(read_spool(place)), 60)
        if how == "control":
            ask(place, task_pb2.CONTROL_ACTION_CANCEL)
        else:
            os.kill(process.pid, signal.SIGTERM)
        asked = time.monotonic()
        process.wait(20)
        assert time.monotonic() - asked < 5
    assert kinds(read_spool(place))[-1] == "stopped"
    assert not (place / attempt.ANSWER).exists()
    assert list((tmp_path / "cache" / "tokenised").iterdir()) == []


def test_memory_and_time_have_limits_that_are_answers(tmp_path: Path) -> None:
    program = (
        "import sys; from luthier.trainer.v1 import task_pb2; from luthier_trainer import work\n"
        "from luthier_trainer.errors import TrainingError\n"
        "task = task_pb2.TrainerTask(); task.preview.count = 1\n"
        "work._MEMORY, work._PREVIEW_SECONDS = 64 << 20, 1\n"
        "work.fence(task)\n"
        "try:\n    bytearray(200 << 20)\nexcept MemoryError:\n    print('memory')\n"
        "try:\n    while True: sum(range(1000))\nexcept TrainingError as error:\n    print(error.reason)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["memory", "PREVIEW_TOO_SLOW"], done.stderr


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[HostConnection]:
    with running_host(tmp_path):
        client = HostConnection(tmp_path)
        yield client
        client.close()


def test_the_host_runs_work_beside_jobs_and_nothing_elsewhere(tmp_path: Path, connection: HostConnection) -> None:
    request = task(tmp_path, CHATS, base="")
    request.preview.count = 1
    place = directory(tmp_path, request)
    connection.start(place)
    assert read_exit(place).code == 0
    assert read_answer(place).preview.rows[0].sequences[0].turns[0].content == "Hi"
    outside = directory(tmp_path / "elsewhere", request)
    deep = directory(tmp_path, request, "a/b")
    odd = directory(tmp_path, request, "a.b")
    link = tmp_path / "work" / "link"
    link.symlink_to(outside)
    inner = directory(tmp_path, request, "inner")
    (tmp_path / "alias").symlink_to(inner)
    for refused in (outside, deep, odd, link, tmp_path / "work", tmp_path):
        with pytest.raises(AssertionError, match="lies at"):
            connection.start(refused)
        assert not (refused / attempt.SPOOL).exists()
    connection.start(tmp_path / "alias")  # a link to what may be run is followed
    assert read_exit(inner).code == 0
    assert os.listdir(outside) == [attempt.TASK]
