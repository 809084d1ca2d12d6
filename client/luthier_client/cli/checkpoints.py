"""`luthier job checkpoints`: the points of a job that another one can go on from."""

import json

import click

from luthier_client.cli.lazy import Command, settings


@click.command(
    cls=Command,
    examples="""luthier job checkpoints @latest
    luthier train data.jsonl --resume-from "$(luthier job checkpoints @latest -o id | head -n 1)\"""",
)
@click.argument("job_id", metavar="ID")
@click.pass_context
def checkpoints(ctx: click.Context, job_id: str) -> None:
    """List the checkpoints that a job has on disk, newest first."""
    from luthier_client.cli import ids, output
    from luthier_client.cli.connect import connect

    chosen = settings(ctx)
    with connect(chosen) as client:
        found = client.get_job(ids.job(client, job_id)).checkpoints()
    if chosen.output == "json":
        click.echo(json.dumps([output.proto_dict(each) for each in found], ensure_ascii=False, indent=2))
    elif chosen.output == "id":
        for each in found:
            click.echo(each.name)
    elif found:
        rows = [
            [each.name, str(each.step), str(each.attempt), output.size(each.size_bytes), output.age(each.create_time)]
            for each in found
        ]
        output.table(["NAME", "STEP", "ATTEMPT", "SIZE", "SAVED"], rows)
    else:
        click.echo("nothing here yet", err=True)
