"""`luthier job`: list, get, watch, wait, cancel, logs; and what the files beside this one add."""

import sys
from typing import TYPE_CHECKING

import click

from luthier_client.cli.checkpoints import checkpoints
from luthier_client.cli.create import create
from luthier_client.cli.diff import diff
from luthier_client.cli.lazy import Command, settings
from luthier_client.cli.rest import delete, pause, resume, told

if TYPE_CHECKING:
    from luthier.v1.job_pb2 import Job

TIMED_OUT = 124
_STATES = [
    "validating", "queued", "preparing", "running", "pausing",
    "paused", "cancelling", "succeeded", "failed", "cancelled",
]  # fmt: skip


@click.group()
def job() -> None:
    """Create, watch, compare, pause, resume, cancel and delete jobs."""


@job.command(
    "list",
    cls=Command,
    examples="""luthier job list --state running --state queued
    luthier job list --label team=search -o id""",
)
@click.option("--state", "states", multiple=True, type=click.Choice(_STATES), help="Only jobs in this state.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="Only jobs with this label.")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(min=1), help="Jobs at most.")
@click.pass_context
def list_(ctx: click.Context, states: tuple[str, ...], labels: tuple[str, ...], limit: int) -> None:
    """List jobs, newest first."""
    from itertools import islice

    from luthier_client.cli import output
    from luthier_client.cli.connect import connect

    wanted = dict(_label(text) for text in labels)
    with connect(settings(ctx)) as client:
        found = client.list_jobs(states=states, labels=wanted, page_size=min(limit, 1000))
        jobs = [each.proto for each in islice(found, limit)]
    headers = ["ID", "STATE", "STEP", "LOSS", "CREATED", "NAME"]
    output.resources(settings(ctx), jobs, headers, [_summary(each) for each in jobs])


@job.command(cls=Command, examples="luthier job get @latest\nluthier job get job_01J8 -o json")
@click.argument("job_id", metavar="ID")
@click.pass_context
def get(ctx: click.Context, job_id: str) -> None:
    """Show a job."""
    from luthier_client.cli import ids, output
    from luthier_client.cli.connect import connect

    with connect(settings(ctx)) as client:
        found = client.get_job(ids.job(client, job_id)).proto
    output.resource(settings(ctx), found, _details(found))


@job.command(
    cls=Command, examples="luthier job watch @latest\nluthier job watch @latest -o json | jq .step_completed.loss"
)
@click.argument("job_id", metavar="ID")
@click.pass_context
def watch(ctx: click.Context, job_id: str) -> None:
    """Watch a job to its end. Ctrl-C leaves it running."""
    from luthier_client.cli import ids
    from luthier_client.cli.connect import connect
    from luthier_client.cli.follow import follow

    with connect(settings(ctx)) as client:
        ctx.exit(follow(settings(ctx), client.get_job(ids.job(client, job_id))))


@job.command(cls=Command, examples="luthier job wait @latest --timeout 3600 && echo done")
@click.argument("job_id", metavar="ID")
@click.option("--timeout", type=click.FloatRange(min=0), metavar="SECONDS", help="Give up after this; exit code 124.")
@click.pass_context
def wait(ctx: click.Context, job_id: str, timeout: float | None) -> None:
    """Wait silently for a job's end; the exit code tells how it went."""
    from luthier_client.cli import ids, output
    from luthier_client.cli.connect import connect
    from luthier_client.cli.follow import exit_code

    with connect(settings(ctx)) as client:
        handle = client.get_job(ids.job(client, job_id))
        try:
            ended = handle.wait(timeout)
        except TimeoutError:
            click.echo(f"error: {handle.id} did not end within {timeout:g} seconds", err=True)
            ctx.exit(TIMED_OUT)
    output.resource(settings(ctx), ended, _details(ended))
    ctx.exit(exit_code(ended.state))


@job.command(cls=Command, examples="luthier job cancel @latest")
@click.argument("job_id", metavar="ID")
@click.pass_context
def cancel(ctx: click.Context, job_id: str) -> None:
    """Ask a job to stop; it saves a checkpoint first."""
    from luthier_client.cli import ids
    from luthier_client.cli.connect import connect

    with connect(settings(ctx)) as client:
        told(ctx, client.get_job(ids.job(client, job_id)).cancel())


@job.command(cls=Command, examples="luthier job logs @latest -f")
@click.argument("job_id", metavar="ID")
@click.option("-f", "--follow", is_flag=True, help="Go on until the job ends.")
@click.pass_context
def logs(ctx: click.Context, job_id: str, follow: bool) -> None:
    """Print a job's lines for people."""
    from luthier_client.cli import ids, output
    from luthier_client.cli.connect import connect
    from luthier_client.cli.lines import log_line

    chosen = settings(ctx)
    with connect(chosen) as client:
        handle = client.get_job(ids.job(client, job_id))
        head = handle.proto.last_sequence
        for event in handle.watch():
            if event.HasField("log_emitted"):
                click.echo(output.json_line(event) if chosen.output == "json" else log_line(event))
                sys.stdout.flush()
            if not follow and event.sequence >= head:
                break


for command in (create, pause, resume, delete, checkpoints, diff):
    job.add_command(command)


def _label(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator:
        raise click.BadParameter(f"{text!r} is not KEY=VALUE", param_hint="--label")
    return key, value


def _state(job: "Job") -> str:
    from luthier.v1.job_pb2 import JobState
    from luthier_client import enums

    return enums.short(JobState.DESCRIPTOR, job.state)


def _summary(job: "Job") -> list[str]:
    from luthier_client.cli import output
    from luthier_client.exports import describe

    progress = job.progress
    step = f"{progress.step}/{progress.total_steps}" if progress.total_steps else ""
    loss = output.number(progress.loss) if progress.step else ""
    name = job.spec.display_name
    if job.spec.HasField("export"):
        name = f"{describe(job.spec.export)} of {job.spec.export.model}"
    return [job.id, _state(job), step, loss, output.age(job.create_time), name]


def _details(job: "Job") -> list[tuple[str, str]]:
    from luthier_client.cli import output
    from luthier_client.exports import describe

    progress, task, exported = job.progress, job.spec.fine_tune, job.spec.export
    started = job.start_time.seconds or job.create_time.seconds
    rows = [
        ("id", job.id),
        ("name", job.spec.display_name),
        ("state", _state(job)),
        ("queue", f"position {job.queue_position}" if job.queue_position else ""),
        ("base model", task.base_model),
        ("export", f"{describe(exported)} of {exported.model}" if job.spec.HasField("export") else ""),
        ("copy", exported.destination.uri),
        ("dataset", task.training_dataset),
        ("labels", ", ".join(f"{key}={value}" for key, value in sorted(job.spec.labels.items()))),
        ("step", f"{progress.step}/{progress.total_steps}" if progress.total_steps else ""),
        ("loss", output.number(progress.loss) if progress.step else ""),
        ("eta", output.duration(progress.eta_seconds) if progress.eta_seconds and not job.end_time.seconds else ""),
        ("attempt", str(job.attempt) if job.attempt > 1 else ""),
        ("next try", output.clock(job.retry_time.seconds) if job.retry_time.seconds else ""),
        ("resumed from", task.resume_from),
        ("model name", task.model_name),
        ("created", output.age(job.create_time)),
        ("took", output.duration(job.end_time.seconds - started) if job.end_time.seconds else ""),
        ("model", job.model_id),
        ("made", job.export_id),
    ]
    if job.HasField("error"):
        rows += [("error", f"{job.error.reason}: {job.error.message}"), ("hint", job.error.hint)]
    return rows
