"""The puppet of exports: it reports and writes like one that exports, and computes nothing."""

import hashlib
import signal
from pathlib import Path

from luthier.trainer.v1 import report_pb2, task_pb2
from luthier.v1 import event_pb2, export_proof_pb2, model_pb2
from luthier_trainer import durable
from luthier_trainer.control import Control
from luthier_trainer.errors import TrainingError
from luthier_trainer.puppet import rest
from luthier_trainer.report import Reporter
from luthier_trainer.stop import StopRequested

_WEIGHTS = 700_000
"""Bytes of a file that takes several chunks of a download."""


def perform(
    task: task_pb2.TrainerTask, reporter: Reporter, control: Control
) -> report_pb2.Finished | report_pb2.Stopped:
    """Writes a file a step, in `task.puppet.steps` steps; then all of it is proven. Raises TrainingError PUPPET_FAILED
    after the step where it is told to, and EXPORT_NOT_EQUAL for rows that no puppet can prove: 13 of them."""
    if task.puppet.stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        return _export(task, reporter, control)
    except StopRequested:
        return report_pb2.Stopped()


def _export(task: task_pb2.TrainerTask, reporter: Reporter, control: Control) -> report_pb2.Finished:
    puppet = task.puppet
    output = Path(task.export.output_dir)
    with durable.new_directory(output) as aside:
        for step in range(1, puppet.steps + 1):
            progress = event_pb2.PhaseProgressed(
                phase=event_pb2.PHASE_EXPORTING, completed=step - 1, total=puppet.steps, unit="files"
            )
            reporter.report(progress)
            if not rest(puppet, control):
                raise StopRequested
            (aside / f"part-{step:03d}.txt").write_text(f"{task.export.model_id} {step}\n", encoding="utf-8")
            if step == puppet.fail_at_step:
                raise TrainingError("PUPPET_FAILED", f"the puppet was told to fail after step {step}")
        (aside / "weights").mkdir()
        (aside / "weights" / "model.bin").write_bytes(_noise(task.export.export_id))
        proof = _proof(task)
        reporter.report(event_pb2.ExportProven(proof=proof), durable=True)
        if not proof.passed:
            raise TrainingError("EXPORT_NOT_EQUAL", "the puppet was told to prove 13 rows", "ask for other rows")
        durable.write_manifest(aside)
    return report_pb2.Finished(size_bytes=durable.size(output), files=_files(output), proof=proof)


def _noise(seed: str) -> bytes:
    """Bytes of which no part is like another."""
    return hashlib.shake_256(seed.encode()).digest(_WEIGHTS)


def _proof(task: task_pb2.TrainerTask) -> export_proof_pb2.ExportProof:
    passed = task.spec.export.proof_rows != 13
    check = export_proof_pb2.ProofCheck(
        name="TOP1_AGREEMENT", passed=passed, value=float(passed), limit=1, message="a puppet compares nothing"
    )
    return export_proof_pb2.ExportProof(
        loader="puppet",
        loader_version="1",
        passed=passed,
        checks=[check],
        rows=task.spec.export.proof_rows,
        dataset_id=task.export.proof_dataset.id,
    )


def _files(folder: Path) -> list[model_pb2.ModelFile]:
    return [
        model_pb2.ModelFile(
            path=each.relative_to(folder).as_posix(),
            size_bytes=each.stat().st_size,
            sha256=hashlib.sha256(each.read_bytes()).hexdigest(),
        )
        for each in sorted(folder.rglob("*"))
        if each.is_file()
    ]
