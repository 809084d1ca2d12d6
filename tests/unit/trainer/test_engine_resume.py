"""Resuming: from the newest checkpoint that is whole, and checked against what it noted."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fidelity.jobs import Recorder, StopAfter, chats, task, tiny_base
from unit.trainer.attempts import kinds, read_spool, write_attempt

from luthier.trainer import attempt
from luthier.trainer.v1 import report_pb2, task_pb2
from luthier.v1 import event_pb2, job_pb2
from luthier_trainer import durable, resume, sft
from luthier_trainer.control import NoControl


def checkpoint(folder: Path, name: str) -> str:
    """A checkpoint as far as one can tell without torch."""
    directory = folder / name
    with durable.new_directory(directory) as aside:
        plan = {"device": "cpu", "dtype": "float32", "attention": "a", "micro_batch_tokens": 4096, "threads": 1}
        state = {"format": 1, "job_id": "job_1", "counters": {"step": int(name[:6])}, "plan": plan, "rows": {}}
        durable.write_json(aside / "state.json", state)
        (aside / "weights").write_bytes(b"12345")
        durable.write_manifest(aside)
    return str(directory)


def damage(directory: str) -> str:
    (Path(directory) / "weights").write_bytes(b"12346")
    return directory


def test_the_first_whole_checkpoint_is_taken_and_the_damaged_ones_are_named(tmp_path: Path) -> None:
    newest, second, third = (checkpoint(tmp_path, name) for name in ("000030-a2", "000020-a1", "000010-a1"))
    asked = task_pb2.TrainerTask(job_id="job_1", resume_from=newest, resume_fallbacks=[second, third])
    chosen, said = resume.choose(asked)
    assert (chosen.job_id, chosen.resume_from, said) == ("job_1", newest, "")
    damage(newest)
    chosen, said = resume.choose(asked)
    assert chosen.resume_from == second
    assert said == "The checkpoint 000030-a2 is damaged: weights. The job goes on from 000020-a1."
    (Path(second) / "state.json").unlink()
    chosen, said = resume.choose(asked)
    assert chosen.resume_from == third
    assert "000020-a1 is damaged: state.json" in said


def test_without_a_whole_checkpoint_a_job_starts_from_scratch_and_says_so(tmp_path: Path) -> None:
    asked = task_pb2.TrainerTask(resume_from=str(tmp_path / "000030-a2"))
    asked.resume_fallbacks.append(damage(checkpoint(tmp_path, "000020-a1")))
    chosen, said = resume.choose(asked)
    assert chosen.resume_from == ""
    assert "000030-a2 is damaged: manifest.json" in said
    assert said.endswith("The job starts from scratch.")


def test_a_checkpoint_whose_state_makes_no_sense_is_passed_over_although_its_manifest_is_right(tmp_path: Path) -> None:
    good = checkpoint(tmp_path, "000010-a1")
    odd = checkpoint(tmp_path, "000020-a1")
    (Path(odd) / "state.json").write_text('{"format": 99}')
    (Path(odd) / durable.MANIFEST).unlink()
    durable.write_manifest(Path(odd))
    chosen, said = resume.choose(task_pb2.TrainerTask(resume_from=odd, resume_fallbacks=[good]))
    assert chosen.resume_from == good
    assert "its format is not known" in said


def test_a_trainer_reports_as_its_start_what_it_really_goes_on_from(tmp_path: Path) -> None:
    checkpoints = tmp_path / "jobs/job_01JTEST/checkpoints"

    def run(directory: Path) -> list[report_pb2.TrainerReport]:
        subprocess.run([sys.executable, "-m", "luthier_trainer.main", str(directory)], capture_output=True, timeout=60)
        return read_spool(directory)

    run(write_attempt(tmp_path, steps=6, fail_at_step=5, every_steps=2))
    (checkpoints / "000004-a1" / "state.json").write_text("{}")
    second = write_attempt(tmp_path, 2, steps=6, resume_from=str(checkpoints / "000004-a1"))
    asked = task_pb2.TrainerTask.FromString((second / attempt.TASK).read_bytes())
    asked.resume_fallbacks.append(str(checkpoints / "000002-a1"))
    (second / attempt.TASK).write_bytes(asked.SerializeToString())
    reports = run(second)
    assert kinds(reports)[:2] == ["started", "log_emitted"]
    assert (reports[0].started.resumed_from_step, reports[0].started.checkpoint) == (2, "000002-a1")
    assert reports[1].log_emitted.level == event_pb2.LOG_LEVEL_WARNING
    assert "000004-a1" in reports[1].log_emitted.message
    assert "000002-a1" in reports[1].log_emitted.message
    assert [each.step_completed.step for each in reports if each.HasField("step_completed")] == [3, 4, 5, 6]
    assert reports[-1].finished.step == 6


def test_choosing_a_checkpoint_loads_no_torch() -> None:
    code = "import luthier_trainer.main, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def checked(recorder: Recorder) -> list[event_pb2.ResumeChecked]:
    return [each for each in recorder.reports if isinstance(each, event_pb2.ResumeChecked)]


@pytest.fixture
def paused(tmp_path: Path) -> Path:
    """A checkpoint of a job with dropout after its third of seven steps."""
    recorder = Recorder()
    job = task(tmp_path, tiny_base(tmp_path), chats(tmp_path / "chats.jsonl"), max_steps=7, dropout=0.2)
    end = sft.train(job, recorder, StopAfter(recorder, 3))
    assert isinstance(end, report_pb2.Stopped)
    assert checked(recorder) == []
    return tmp_path / "checkpoints" / end.checkpoint


def resumed(paused: Path, **changes: Any) -> event_pb2.ResumeChecked:
    """What a job that goes on from there finds before its next step."""
    folder = paused.parents[1]
    recorder = Recorder()
    again = task(folder, folder / "base", folder / "chats.jsonl", attempt=2, resume_from=paused, dropout=0.2, **changes)
    sft.train(again, recorder, StopAfter(recorder, 4))
    plan = next(each for each in recorder.reports if isinstance(each, event_pb2.PlanResolved))
    (found,) = checked(recorder)
    (step,) = recorder.steps()
    order = [recorder.reports.index(each) for each in (plan, found, step)]
    assert order == sorted(order)
    return found


def test_a_resume_computes_the_noted_loss_to_the_last_bit(paused: Path) -> None:
    found = resumed(paused, max_steps=7)
    assert found.verified
    assert found.message == "resume verified"
    assert found.step == 3
    noted = json.loads((paused / "state.json").read_text())
    assert found.recorded_loss == found.recomputed_loss == noted["next_loss"] > 0
    assert set(noted["environment"]) == {"torch", "transformers", "peft", "processor"}


def test_a_resume_in_another_precision_is_not_verified_and_says_what_differs(paused: Path) -> None:
    found = resumed(paused, max_steps=7, dtype=job_pb2.DTYPE_BFLOAT16)
    assert not found.verified
    assert "dtype bfloat16, was float32" in found.message
    assert "differ by" in found.message
    assert found.recomputed_loss == pytest.approx(found.recorded_loss, rel=2e-2)


def test_a_resume_whose_plan_had_to_change_is_not_verified_and_agrees_to_rounding(paused: Path) -> None:
    state = json.loads((paused / "state.json").read_text())
    state["plan"]["threads"] = 3
    state["environment"]["torch"] = "2.0"
    (paused / "state.json").write_text(json.dumps(state))
    found = resumed(paused, max_steps=7)
    assert not found.verified
    assert "threads 1, was 3" in found.message
    assert "was 2.0" in found.message
    assert found.message.endswith("the losses are equal to the last bit")
    state["next_loss"] = math.nextafter(state["next_loss"], math.inf)
    (paused / "state.json").write_text(json.dumps(state))
    assert resumed(paused, max_steps=7).message.endswith("equal within 1e-5")


def test_weights_that_are_not_those_of_the_checkpoint_are_noticed(paused: Path) -> None:
    state = json.loads((paused / "state.json").read_text())
    state["next_loss"] *= 1.0 + 1e-7
    (paused / "state.json").write_text(json.dumps(state))
    found = resumed(paused, max_steps=7)
    assert not found.verified
    assert found.message == "nothing that was noted differs: the losses are equal within 1e-5"


def test_a_checkpoint_that_notes_no_loss_can_still_be_resumed(paused: Path) -> None:
    state = json.loads((paused / "state.json").read_text())
    del state["next_loss"], state["environment"], state["counters"]["skipped"]
    (paused / "state.json").write_text(json.dumps(state))
    folder, recorder = paused.parents[1], Recorder()
    again = task(folder, folder / "base", folder / "chats.jsonl", resume_from=paused, dropout=0.2, max_steps=7)
    assert sft.train(again, recorder, NoControl()).step == 7
    assert checked(recorder) == []


def test_a_resume_after_the_last_step_has_nothing_to_check(paused: Path) -> None:
    folder, recorder = paused.parents[1], Recorder()
    again = task(folder, folder / "base", folder / "chats.jsonl", resume_from=paused, dropout=0.2, max_steps=3)
    assert sft.train(again, recorder, NoControl()).step == 3
    assert checked(recorder) == []
