"""`luthier job create --from MODEL`: the job of a model, again."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import click

from luthier_client.errors import FailedPrecondition
from luthier_client.spec import find_path

if TYPE_CHECKING:
    from luthier.v1.job_pb2 import JobSpec
    from luthier_client.client import Client

# A field that is set on top takes the place of these: the contract refuses them together.
_IN_PLACE_OF: Mapping[str, tuple[str, ...]] = {
    "fine_tune.hyperparameters.warmup_steps": ("fine_tune.hyperparameters.warmup_ratio",),
    "fine_tune.hyperparameters.warmup_ratio": ("fine_tune.hyperparameters.warmup_steps",),
    "fine_tune.hyperparameters.batch_size": (
        "fine_tune.hyperparameters.per_device_train_batch_size",
        "fine_tune.hyperparameters.gradient_accumulation_steps",
    ),
    "fine_tune.hyperparameters.per_device_train_batch_size": ("fine_tune.hyperparameters.batch_size",),
    "fine_tune.hyperparameters.gradient_accumulation_steps": ("fine_tune.hyperparameters.batch_size",),
    "fine_tune.evaluation.every_steps": ("fine_tune.evaluation.every_epochs",),
    "fine_tune.evaluation.every_epochs": ("fine_tune.evaluation.every_steps",),
    "fine_tune.validation_dataset": ("fine_tune.validation_fraction",),
    "fine_tune.validation_fraction": ("fine_tune.validation_dataset",),
}
_SHOWN = (
    ("base model", "fine_tune.base_model"),
    ("revision", "fine_tune.base_model_revision"),
    ("trained on", "fine_tune.training_dataset"),
    ("validated on", "fine_tune.validation_dataset"),
    ("resumed from", "fine_tune.resume_from"),
    ("model name", "fine_tune.model_name"),
)


def spec_of(client: "Client", model: str) -> "JobSpec":
    """What the model's job was asked for, with every default, dataset version and revision as it was then. Raises
    NotFound, and FailedPrecondition for a model whose server kept none."""
    from luthier.v1.job_pb2 import JobSpec

    found = client.get_model(model)
    spec = JobSpec()
    spec.CopyFrom(found.resolved_spec if found.HasField("resolved_spec") else found.spec)
    if not spec.HasField("fine_tune"):
        raise FailedPrecondition(
            f"{found.id} was made by an older server, which kept no spec of its job",
            reason="NO_SPEC",
            metadata={"hint": "write the job anew, or create it from its file: luthier job create -f job.yaml"},
        )
    if found.base_model_revision and not spec.fine_tune.base_model.startswith(("builtin/", "model_", "/")):
        spec.fine_tune.base_model_revision = found.base_model_revision
    return spec


def without(spec: "JobSpec", settings: Iterable[str]) -> "JobSpec":
    """A copy without what settings on top of it take the place of."""
    from luthier.v1.job_pb2 import JobSpec

    rest = JobSpec()
    rest.CopyFrom(spec)
    for setting in settings:
        try:
            path = find_path(setting.partition("=")[0].strip())
        except ValueError:  # apply_settings says what is wrong with it
            continue
        for other in _IN_PLACE_OF.get(path, ()):
            message, _, field = other.rpartition(".")
            target: Any = rest.fine_tune
            for part in message.split(".")[1:]:
                target = getattr(target, part)
            target.ClearField(field)
    return rest


def tell(before: "JobSpec", spec: "JobSpec") -> None:
    """Prints on stderr what is taken over, and what other options changed of it."""
    from luthier_client.cli import output
    from luthier_client.cli.diff import flat

    old, new = flat(before), flat(spec)
    kept = [name for name, value in new.items() if old.get(name) == value]
    named = [f"{label} {new[path]}" for label, path in _SHOWN if path in kept]
    click.echo(output.clean(f"takes over: {', '.join([*named, f'{len(kept) - len(named)} more fields'])}"), err=True)
    arrow = "→" if output.speaks_unicode() else "->"
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            was, now = old.get(name, "unset"), new.get(name, "unset")
            click.echo(output.clean(f"changed: {name.removeprefix('fine_tune.')} {was} {arrow} {now}"), err=True)
