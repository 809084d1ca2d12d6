"""`luthier job create`: a job from a file, or the job of a model again."""

import sys
from typing import TYPE_CHECKING

import click

from luthier_client.cli.lazy import Command, settings
from luthier_client.cli.numbers import number_options, number_settings
from luthier_client.cli.tokenization import apply_tokenization, tokenization_fields, tokenization_options

if TYPE_CHECKING:
    from luthier.v1.job_pb2 import JobSpec
    from luthier_client.client import Client


@click.command(
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
