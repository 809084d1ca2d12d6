"""An export is there whole and proven, or not at all."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fidelity.exports import loaded_logits, peft_logits, tuned
from fidelity.jobs import Recorder, chats, tiny_base
from transformers import AutoModelForCausalLM

from luthier.trainer.v1 import task_pb2
from luthier.trainer.v1.report_pb2 import Finished, Stopped
from luthier.trainer.v1.task_pb2 import BaseModelSource, ControlAction, DatasetSource, ExportWork, TrainerTask
from luthier.v1 import event_pb2, export_task_pb2, job_pb2
from luthier_trainer import durable, export_model
from luthier_trainer.control import NoControl
from luthier_trainer.errors import TrainingError
from luthier_trainer.export import perform as performed
from luthier_trainer.export.perform import perform
from luthier_trainer.export.source import Tuned
from luthier_trainer.local import dataset_source

SECRET = "hunter2-credentials"


@pytest.fixture
def task(tmp_path: Path) -> TrainerTask:
    """The export of an adapter on a tied base, merged in 32 bits, below `exports`."""
    folder = tmp_path / "tuned"
    folder.mkdir()
    tuned(folder, AutoModelForCausalLM.from_pretrained(tiny_base(tmp_path, tied=True)))
    rows = dataset_source(chats(tmp_path / "chats.jsonl", rows=4), {})
    export = export_task_pb2.ExportTask(model="support-bot@3", proof_rows=2)
    export.merged.weights = export_task_pb2.WEIGHT_TYPE_F32
    return TrainerTask(
        job_id="job_1",
        attempt=1,
        spec=job_pb2.JobSpec(export=export),
        base_model=BaseModelSource(location=str(folder / "base")),
        cache_dir=str(tmp_path / "cache"),
        export=ExportWork(
            model_dir=str(folder / "model"),
            model_id="model_1",
            output_dir=str(tmp_path / "exports" / "export_1"),
            export_id="export_1",
            proof_dataset=DatasetSource(path=rows.path, id="ds_1", sha256=rows.sha256, rows=4, reading=rows.reading),
            card="# A card\n",
        ),
    )


def left(task: TrainerTask) -> list[str]:
    """What is in the directory of exports."""
    parent = Path(task.export.output_dir).parent
    return sorted(each.name for each in parent.iterdir()) if parent.exists() else []


class After:
    """Asks for something once a phase has been reported `reports` times."""

    def __init__(self, recorder: Recorder, phase: event_pb2.Phase.ValueType, action: ControlAction.ValueType) -> None:
        self._recorder = recorder
        self._phase = phase
        self._action = action

    def requested(self) -> ControlAction.ValueType:
        """What a trainer reads between two weights."""
        told = [each for each in self._recorder.reports if isinstance(each, event_pb2.PhaseProgressed)]
        reached = any(each.phase == self._phase and each.completed for each in told)
        return self._action if reached else task_pb2.CONTROL_ACTION_UNSPECIFIED


def test_an_export_tells_what_it_is_and_that_it_was_proven(task: TrainerTask) -> None:
    recorder = Recorder()
    end = perform(task, recorder, NoControl())
    assert isinstance(end, Finished)
    assert end.proof.passed
    assert end.proof.dataset_id == "ds_1"
    out = Path(task.export.output_dir)
    assert left(task) == ["export_1"]
    names = {each.name for each in out.iterdir()}
    assert names == {each.path for each in end.files} | {"manifest.json"}
    assert {"README.md", "proof.json", "luthier.json", "model.safetensors", "chat_template.jinja"} <= names
    for each in end.files:
        content = (out / each.path).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (each.size_bytes, each.sha256)
    assert end.size_bytes == sum(file.stat().st_size for file in out.iterdir())
    lineage = json.loads((out / "luthier.json").read_text())
    assert lineage["model_id"] == "model_1"
    assert lineage["export"]["id"] == "export_1"
    assert lineage["export"]["proof"]["passed"] is True
    assert (out / "README.md").read_text() == "# A card\n"
    phases = [each.phase for each in recorder.reports if isinstance(each, event_pb2.PhaseProgressed)]
    assert list(dict.fromkeys(phases)) == [event_pb2.PHASE_EXPORTING, event_pb2.PHASE_PROVING]
    proven = [each for each in recorder.reports if isinstance(each, event_pb2.ExportProven)]
    assert [each.proof for each in proven] == [end.proof]


def test_an_export_that_behaves_otherwise_is_told_and_thrown_away(
    task: TrainerTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = performed.write_files

    def faulty(source: Tuned, export: Any, folder: Path, *more: Any) -> None:
        write(source, export, folder, *more)
        (folder / "chat_template.jinja").write_text("{% for each in messages %}{{ each.content }}{% endfor %}")

    monkeypatch.setattr(performed, "write_files", faulty)
    recorder = Recorder()
    with pytest.raises(TrainingError) as caught:
        perform(task, recorder, NoControl())
    assert caught.value.reason == "EXPORT_NOT_EQUAL"
    assert "TEMPLATE" in caught.value.message
    assert [each.proof.passed for each in recorder.reports if isinstance(each, event_pb2.ExportProven)] == [False]
    assert left(task) == []


@pytest.mark.parametrize("phase", [event_pb2.PHASE_EXPORTING, event_pb2.PHASE_PROVING], ids=event_pb2.Phase.Name)
def test_a_stop_leaves_nothing(phase: event_pb2.Phase.ValueType, task: TrainerTask) -> None:
    recorder = Recorder()
    end = perform(task, recorder, After(recorder, phase, task_pb2.CONTROL_ACTION_PAUSE))
    assert isinstance(end, Stopped)
    assert left(task) == []


def test_an_attempt_that_starts_again_keeps_what_is_whole(task: TrainerTask, tmp_path: Path) -> None:
    first = perform(task, Recorder(), NoControl())
    assert isinstance(first, Finished)
    written = (Path(task.export.output_dir) / "model.safetensors").stat().st_mtime_ns
    task.attempt = 2
    recorder = Recorder()
    second = perform(task, recorder, NoControl())
    assert second == first
    assert recorder.reports == []
    weights = Path(task.export.output_dir) / "model.safetensors"
    assert weights.stat().st_mtime_ns == written
    weights.write_bytes(weights.read_bytes()[:-1])
    assert perform(task, Recorder(), NoControl()) == first  # a damaged one is made anew
    durable.verify_manifest(Path(task.export.output_dir))


@pytest.mark.parametrize(
    ("action", "kept"), [(task_pb2.CONTROL_ACTION_CANCEL, []), (task_pb2.CONTROL_ACTION_PAUSE, ["export_1"])]
)
def test_only_a_pause_while_copying_keeps_the_export(
    action: ControlAction.ValueType, kept: list[str], task: TrainerTask, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    task.spec.export.destination.uri = f"file://{target}/copy"
    task.export.destination_roots.append(str(target))
    recorder = Recorder()
    end = perform(task, recorder, After(recorder, event_pb2.PHASE_PUBLISHING, action))
    assert isinstance(end, Stopped)
    assert left(task) == kept
    assert not (target / "copy" / "manifest.json").exists()
    if kept:
        again = perform(task, Recorder(), NoControl())
        assert isinstance(again, Finished)
        assert (target / "copy" / "manifest.json").exists()
        assert again.destination_uri == f"file://{target}/copy"


def test_a_copy_that_fails_fails_the_export_and_tells_no_secret(
    task: TrainerTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUTHIER_EXPORT_CREDENTIALS", SECRET)
    task.spec.export.destination.uri = f"file://{tmp_path}/elsewhere"
    with pytest.raises(TrainingError) as caught:
        perform(task, Recorder(), NoControl())
    assert caught.value.reason == "DESTINATION_FAILED"
    assert SECRET not in str(caught.value)
    assert left(task) == []


def test_an_export_in_one_line_is_the_same_export(task: TrainerTask, tmp_path: Path) -> None:
    made = perform(task, Recorder(), NoControl())
    assert isinstance(made, Finished)
    recorder = Recorder()
    model, base = Path(task.export.model_dir), task.base_model.location
    out = tmp_path / "one" / "line"
    found = export_model(
        model, out, weights="f32", base_model=base, proof_data=tmp_path / "chats.jsonl", proof_rows=2, reporter=recorder
    )
    assert found.proof is not None
    assert found.proof.passed
    assert found.files == tuple(each.path for each in made.files if each.path != "README.md")
    theirs = Path(task.export.output_dir)
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (theirs / name).read_bytes()
    assert [each.name for each in out.parent.iterdir()] == ["line"]
    source = Tuned(model, Path(base), model, "model_1")
    torch.testing.assert_close(loaded_logits(out), peft_logits(source), rtol=0, atol=1e-4)
    with pytest.raises(FileExistsError):
        export_model(model, out, base_model=base)


def test_without_rows_an_export_in_one_line_is_not_called_proven(task: TrainerTask, tmp_path: Path) -> None:
    found = export_model(
        task.export.model_dir, tmp_path / "out", format="adapter", base_model=task.base_model.location, progress=False
    )
    assert found.proof is None
    assert not (tmp_path / "out" / "proof.json").exists()
    with pytest.raises(TrainingError):
        export_model(tmp_path, tmp_path / "none")
    assert not (tmp_path / "none").exists()
