"""Which checkpoint an attempt goes on from. Loads no torch: it is decided before an attempt's first report."""

from pathlib import Path

from luthier.trainer.v1.task_pb2 import TrainerTask
from luthier_trainer import durable
from luthier_trainer.errors import TrainingError
from luthier_trainer.state import verified_state


def choose(task: TrainerTask) -> tuple[TrainerTask, str]:
    """The task with the first checkpoint that is whole as its `resume_from`, or none for a start from scratch.

    Tried are `resume_from` and then `resume_fallbacks`, every file against the manifest. Returned with it: a sentence
    that names the damaged ones and what is taken in their place, empty when the first is taken.
    """
    chosen = TrainerTask()
    chosen.CopyFrom(task)
    chosen.ClearField("resume_from")
    chosen.ClearField("resume_fallbacks")
    damaged: list[str] = []
    for directory in [task.resume_from, *task.resume_fallbacks] if task.resume_from else []:
        try:
            if task.HasField("puppet"):  # its state is its own
                durable.verify_manifest(Path(directory))
            else:
                verified_state(Path(directory))
        except TrainingError as error:
            damaged.append(error.message)
            continue
        chosen.resume_from = directory
        break
    if not damaged:
        return chosen, ""
    taken = f"goes on from {Path(chosen.resume_from).name}" if chosen.resume_from else "starts from scratch"
    return chosen, f"{' '.join(damaged)} The job {taken}."
