"""`luthier job diff`: what two jobs, or two models, differ in."""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from luthier_client.cli.lazy import Command, settings

if TYPE_CHECKING:
    from luthier.v1.job_pb2 import Job, JobSpec
    from luthier_client.client import Client

SECTIONS = ("spec", "data", "plan", "metrics")
# What the machine decided and how fast it was differs between any two runs.
_OF_THE_MACHINE = ("peak_flops", "mfu", "tokens_per_second", "seconds", "memory_bytes")


@dataclass(frozen=True)
class Side:
    """All that is compared of a job: fields by name, in each section."""

    id: str
    job_id: str
    sections: Mapping[str, Mapping[str, Any]]
    missing: tuple[str, ...]
    """Sections of which nothing is known any more."""


@click.command(
    cls=Command,
    examples="""luthier job diff @latest job_01J8
    luthier job diff support-bot@production support-bot -o json""",
)
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@click.pass_context
def diff(ctx: click.Context, first: str, second: str) -> None:
    """Show what two jobs or models differ in: specs, datasets, plans, final metrics."""
    from luthier_client.cli import ids, output
    from luthier_client.cli.connect import connect

    chosen = settings(ctx)
    with connect(chosen) as client:
        sides = [side(client, ids.job_or_model(client, each)) for each in (first, second)]
    left, right = sides
    found = differences(left, right)
    unknown = [section for section in SECTIONS if section in left.missing or section in right.missing]
    if chosen.output == "json":
        body = {"a": left.id, "b": right.id, "equal": not found, "not_compared": unknown, "differences": found}
        click.echo(json.dumps(body, ensure_ascii=False, indent=2))
    elif chosen.output == "id":
        for each in found:
            click.echo(each["field"])
    else:
        if found:
            rows = [[each["section"], each["field"], _text(each["a"]), _text(each["b"])] for each in found]
            output.table(["", "FIELD", left.id, right.id], rows)
        else:
            what = ", ".join(section for section in SECTIONS if section not in unknown)
            click.echo(f"equal: {left.id} and {right.id} have the same {what}")
        if unknown:
            click.echo(f"not compared, because a job or its log is gone: {', '.join(unknown)}", err=True)


def side(client: "Client", given: str) -> Side:
    """What is known of a job or a model. Raises NotFound."""
    from luthier_client.errors import NotFound

    if given.startswith("job_") and ":" not in given:
        job = client.get_job(given).proto
        metrics: dict[str, float] = {}
        with contextlib.suppress(NotFound):  # a model may be gone before its job
            metrics = dict(client.get_model(job.model_id).metrics) if job.model_id else {}
        return _of_job(client, job, given, metrics)
    model = client.get_model(given)
    try:
        job = client.get_job(model.job_id).proto
    except NotFound:
        spec = flat(model.resolved_spec)
        missing = ("plan",) if spec else ("spec", "plan")
        sections = {"spec": spec, "data": hashes(client, model.resolved_spec), "metrics": _steady(model.metrics)}
        return Side(model.id, model.job_id, sections, missing)
    return _of_job(client, job, model.id, dict(model.metrics))


def _of_job(client: "Client", job: "Job", given: str, metrics: Mapping[str, float]) -> Side:
    from luthier_client.errors import OutOfRange

    missing: tuple[str, ...] = ()
    plan: dict[str, Any] = {}
    numbers: dict[str, float] = {}
    try:
        plan, numbers = _log(client, job)
    except OutOfRange:  # the log of a job that ended long ago is not kept whole
        missing = ("plan",) if metrics else ("plan", "metrics")
    sections = {
        "spec": flat(job.resolved_spec if job.HasField("resolved_spec") else job.spec),
        "data": hashes(client, job.resolved_spec),
        "plan": _steady(plan),
        "metrics": _steady(metrics or numbers),
    }
    return Side(given, job.id, sections, missing)


def _log(client: "Client", job: "Job") -> tuple[dict[str, Any], dict[str, float]]:
    """(the plan, the last numbers) that a job's log tells so far. Raises OutOfRange."""
    from luthier_client.cli.output import proto_dict

    plan: dict[str, Any] = {}
    numbers: dict[str, float] = {}
    with contextlib.closing(client.get_job(job.id).watch()) as events:
        for event in events:
            if event.HasField("plan_resolved"):
                plan = {name: value for name, value in proto_dict(event.plan_resolved).items() if name != "notes"}
            elif event.HasField("step_completed"):
                numbers["loss"] = event.step_completed.loss
            elif event.HasField("evaluation_completed"):
                numbers["eval_loss"] = event.evaluation_completed.loss
            elif event.HasField("export_proven"):
                numbers |= {check.name.lower(): check.value for check in event.export_proven.proof.checks}
            if event.sequence >= job.last_sequence:
                break
    return plan, numbers


def differences(left: Side, right: Side) -> list[dict[str, Any]]:
    """Each field that differs, with both values (None: there is none), in the order of the sections."""
    found: list[dict[str, Any]] = []
    for section in SECTIONS:
        if section in left.missing or section in right.missing:
            continue
        one, other = left.sections.get(section, {}), right.sections.get(section, {})
        found += [
            {"section": section, "field": field, "a": one.get(field), "b": other.get(field)}
            for field in sorted(one.keys() | other.keys())
            if one.get(field) != other.get(field)
        ]
    return found


def flat(spec: "JobSpec") -> dict[str, Any]:
    """The fields of a spec that are set, by their dotted paths."""
    from luthier_client.spec import spec_fields

    found: dict[str, Any] = {}

    def add(fields: Mapping[str, Any], before: str) -> None:
        for name, value in fields.items():
            if isinstance(value, dict) and value:
                add(value, f"{before}{name}.")
            else:
                found[before + name] = value

    add(spec_fields(spec), "")
    return found


def hashes(client: "Client", spec: "JobSpec") -> dict[str, str]:
    """The hash of each dataset that a spec names; equal data under two names is equal data."""
    from luthier_client.errors import NotFound

    named = {
        "training sha256": spec.fine_tune.training_dataset,
        "validation sha256": spec.fine_tune.validation_dataset,
        "proof sha256": spec.export.proof_dataset,
    }
    found: dict[str, str] = {}
    for what, dataset in named.items():
        if dataset:
            try:
                found[what] = client.get_dataset(dataset).sha256
            except NotFound:
                found[what] = f"{dataset} is gone"
    return found


def _steady(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Without what differs between any two runs of one job."""
    return {name: value for name, value in numbers.items() if not name.endswith(_OF_THE_MACHINE)}


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
