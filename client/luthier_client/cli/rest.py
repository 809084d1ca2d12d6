"""`luthier job pause|resume|delete`: letting a job rest, and letting go of it."""

import sys
from typing import TYPE_CHECKING

import click

from luthier_client.cli.lazy import Command, settings

if TYPE_CHECKING:
    from luthier.v1.job_pb2 import Job


@click.command(cls=Command, examples="luthier job pause @latest")
@click.argument("job_id", metavar="ID")
@click.pass_context
def pause(ctx: click.Context, job_id: str) -> None:
    """Let a job rest: it saves a checkpoint and frees its slot."""
    from luthier_client.cli import ids
    from luthier_client.cli.connect import connect

    with connect(settings(ctx)) as client:
        told(ctx, client.get_job(ids.job(client, job_id)).pause())


@click.command(cls=Command, examples="luthier job resume @latest")
@click.argument("job_id", metavar="ID")
@click.pass_context
def resume(ctx: click.Context, job_id: str) -> None:
    """Put a paused job back into the queue; it goes on from its newest checkpoint."""
    from luthier_client.cli import ids
    from luthier_client.cli.connect import connect

    with connect(settings(ctx)) as client:
        told(ctx, client.get_job(ids.job(client, job_id)).resume())


@click.command(cls=Command, examples="luthier job delete job_01J8\nluthier job delete @latest --yes")
@click.argument("job_id", metavar="ID")
@click.option("-y", "--yes", is_flag=True, help="Do not ask; without a terminal nothing is asked.")
@click.pass_context
def delete(ctx: click.Context, job_id: str, yes: bool) -> None:
    """Delete a job that has ended or is paused, with its events and checkpoints. Its model stays."""
    from luthier_client.cli import ids, output
    from luthier_client.cli.connect import connect

    chosen = settings(ctx)
    with connect(chosen) as client:
        handle = client.get_job(ids.job(client, job_id))
        if not yes and sys.stdin.isatty():
            name = output.one_line(handle.proto.spec.display_name, 60)
            what = f"{handle.id} ({name})" if name else handle.id
            click.confirm(f"delete {what} with its events and checkpoints?", abort=True, err=True)
        deleted = handle.delete()
    if chosen.output == "table":
        click.echo(f"deleted {deleted.id}")
    else:
        output.resource(chosen, deleted, [])


def told(ctx: click.Context, job: "Job") -> None:
    """Prints the state that a request brought a job into."""
    from luthier.v1.job_pb2 import JobState
    from luthier_client import enums
    from luthier_client.cli import output

    if settings(ctx).output == "table":
        click.echo(f"{enums.short(JobState.DESCRIPTOR, job.state)} {job.id}")
    else:
        output.resource(settings(ctx), job, [])
