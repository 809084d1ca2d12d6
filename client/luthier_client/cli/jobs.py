"""`luthier job`: create, list, get, watch, wait, cancel, logs; and what `rest`, `checkpoints` and `diff` add."""

import sys
from typing import TYPE_CHECKING

import click

from luthier_client.cli.checkpoints import checkpoints
from luthier_client.cli.diff import diff
from luthier_client.cli.lazy import Command, settings
from luthier_client.cli.numbers import number_options, number_settings
from luthier_client.cli.rest import delete, pause, resume, told
from luthier_client.cli.tokenization import apply_tokenization, tokenization_fields, tokenization_options

if TYPE_CHECKING:
    from luthier.v1.job_pb2 import Job, JobSpec
    from luthier_client.client import Client

TIMED_OUT = 124
_STATES = [
    "validating", "queued", "preparing", "running", "pausing",
    "paused", "cancelling", "succeeded", "failed", "cancelled",
]  # fmt: skip


@click.group()
def job() -> None:
    """Create, watch, compare, pause, resume, cancel and delete jobs."""


@job.command(
    cls=Command,
    examples="""luthier job create -f job.yaml --watch
    luthier job create -f job.yaml --set lora.rank=16 --set learning_rate=1e-4
    luthier job create -f job.yaml --find-lr --watch
    luthier job create -f job.yaml --epochs auto --batch-size auto --learning-rate auto
    luthier job create -f job.yaml --resume-from @latest:step-200
    luthier job create --from support-bot@production --set learning_rate=1e-4 --model-name support-bot
    luthier job create -f job.yaml --validate-only
    luthier job create -f job.yaml --dry-run && luthier job create -f job.yaml
    luthier job create -f job.yaml --set lora.rank=64 --dry-run --probe""",
)
@click.option("-f", "--file", type=click.Path(allow_dash=True), help="A job as YAML or JSON; - is stdin.")
@click.option("--from", "model_id", metavar="MODEL", help="The job of a model, again; other options go over it.")
@click.option("--set", "assignments", metavar="KEY=VALUE", multiple=True, help="Set a field; KEY may be shortened.")
@number_options
@tokenization_options
@click.option("--resume-from", metavar="JOB:step-N", help="Go on from a checkpoint of another job.")
@click.option("--model-name", metavar="NAME", help="What comes out becomes the next version of this name.")
@click.option("--watch", is_flag=True, help="Watch the job to its end.")
@click.option("--validate-only", is_flag=True, help="Check the job and show what would be created.")
@click.option("--dry-run", is_flag=True, help="Show what the job would take; exit code 1 when it does not fit.")
@click.option("--probe", is_flag=True, help="With --dry-run: make two real steps first, in a free slot.")
@click.pass_context
def create(
    ctx: click.Context,
    /,
    file: str | None,
    model_id: str | None,
    assignments: tuple[str, ...],
    resume_from: str | None,
    model_name: str | None,
    watch: bool,
    validate_only: bool,
    epochs: str | None,
    batch_size: str | None,
    learning_rate: str | None,
    find_lr: bool,
    dry_run: bool,
    probe: bool,
    **flags: str | None,
) -> None:
    """Create a job from a file, or from a model."""
    from luthier_client.cli import again, ids, output
    from luthier_client.cli.connect import connect
    from luthier_client.cli.follow import follow
    from luthier_client.errors import NotFound
    from luthier_client.spec import apply_settings, load_spec, parse_spec

    if probe and not dry_run:
        raise click.UsageError("--probe goes with --dry-run.")
    if dry_run and (watch or validate_only):
        raise click.UsageError("--dry-run creates nothing: leave out --watch and --validate-only.")
    if (file is None) == (model_id is None):
        raise click.UsageError("give --file or --from, one of them.")
    numbers = {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate}
    given = [*assignments, *number_settings(numbers, find_lr)]
    tokenization = tokenization_fields(**flags)
    spec = None if file is None else parse_spec(sys.stdin.read(), "stdin") if file == "-" else load_spec(file)
    chosen = settings(ctx)
    with connect(chosen) as client:
        before = None
        if spec is None:
            before = again.spec_of(client, ids.model(client, str(model_id)))
            spec = again.without(before, given)
        apply_settings(spec, given)
        apply_tokenization(spec, tokenization)
        if model_name is not None:
            spec.fine_tune.model_name = model_name
        if before is not None and chosen.output == "table":
            again.tell(before, spec)
        if resume_from is not None:
            spec.fine_tune.resume_from = ids.checkpoint(client, resume_from)
        if dry_run:
            _dry_run(ctx, client, spec, probe)
            return
        try:
            handle = client.create_job(spec, validate_only=validate_only)
        except NotFound as missing:
            if before is not None and before.fine_tune.resume_from and resume_from is None:
                missing.metadata.setdefault("hint", "train from the base model instead: --set resume_from=")
            raise
        if validate_only:
            _show_plan(ctx, handle.proto.resolved_spec)
        elif watch:
            ctx.exit(follow(chosen, handle))
        elif chosen.output == "table":
            click.echo(f"created {handle.id}")
            click.echo(f"luthier job watch {handle.id}", err=True)
        else:
            output.resource(chosen, handle.proto, [])


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


for command in (pause, resume, delete, checkpoints, diff):
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
    if not name and job.spec.HasField("export"):
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
        ("created", output.age(job.create_time)),
        ("took", output.duration(job.end_time.seconds - started) if job.end_time.seconds else ""),
        ("model", job.model_id),
        ("made", job.export_id),
    ]
    if job.HasField("error"):
        rows += [("error", f"{job.error.reason}: {job.error.message}"), ("hint", job.error.hint)]
    return rows


def _dry_run(ctx: click.Context, client: "Client", spec: "JobSpec", probe: bool) -> None:
    """Prints what a job would take. Exits with 1 when it does not fit."""
    from luthier_client.cli import output
    from luthier_client.cli.estimate import print_estimate
    from luthier_client.cli.transfer import phases

    with phases("making two steps" if probe else "estimating"):
        response = client.estimate_job(spec, probe=probe)
    if settings(ctx).output == "json":
        output.resource(settings(ctx), response, [])
    else:
        print_estimate(response.estimate)
    if not response.estimate.fits:
        ctx.exit(1)


def _show_plan(ctx: click.Context, spec: "JobSpec") -> None:
    """Prints what the server would make of a spec."""
    import json

    from luthier_client.spec import spec_fields

    fields = spec_fields(spec)
    if settings(ctx).output == "json":
        click.echo(json.dumps(fields, ensure_ascii=False, indent=2))
        return
    import yaml

    click.echo("# valid; nothing was created")
    click.echo(yaml.safe_dump(fields, sort_keys=False, allow_unicode=True).rstrip())
