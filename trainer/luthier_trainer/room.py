"""Room on a full disk: what a job can do without before it gives up."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from luthier.v1 import event_pb2
from luthier_trainer import checkpoint
from luthier_trainer.data.tokens import tokenised
from luthier_trainer.errors import TrainingError
from luthier_trainer.job import Job

_Written = TypeVar("_Written")


def with_room(job: Job, write: Callable[[], _Written]) -> _Written:
    """What `write` returns. When the disk is full, room is made and `write` called once more.

    Deleted are the job's checkpoints but for the newest that is known to be whole and the best it knows, and tokenised
    datasets that no trainer uses. Raises TrainingError STORAGE_FULL when there is nothing to delete or it did not help.
    """
    try:
        return write()
    except TrainingError as error:
        if error.reason != "STORAGE_FULL":
            raise
        deleted = _make_room(job.places.checkpoints, job.saved[1], job.places.cache)
        if not deleted:
            raise
    message = f"the disk is full: deleted {' and '.join(deleted)}, and trying once more"
    job.reporter.report(event_pb2.LogEmitted(level=event_pb2.LOG_LEVEL_WARNING, message=message))
    return write()


def _make_room(checkpoints: Path, newest: str, cache: Path) -> list[str]:
    """Deletes what can be done without; returns it in words. Without a newest checkpoint none is deleted."""
    kept = checkpoint.with_bests([checkpoints / newest]) if newest else set()
    doomed = [each for each in checkpoint.newest_first(checkpoints) if newest and each.name not in kept]
    for directory in doomed:
        checkpoint.delete(directory)
    deleted = [f"the checkpoints {', '.join(each.name for each in doomed)}"] if doomed else []
    count, freed = tokenised.drop_unused(cache)
    if count:
        deleted.append(f"{count} tokenised datasets that nobody uses ({freed / 2**20:.1f} MiB)")
    return deleted
