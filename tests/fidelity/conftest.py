"""What several tests of whole jobs need."""

import pytest

from luthier_trainer import job as job_module
from luthier_trainer import sft
from luthier_trainer.job import Job


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Every job that was set up, so that a test can ask the trainer's own model."""
    made: list[Job] = []

    def set_up(*arguments: object) -> Job:
        made.append(job_module.set_up(*arguments))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(sft, "set_up", set_up)
    return made
