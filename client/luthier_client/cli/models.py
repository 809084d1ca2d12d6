"""`luthier model`: list, get, download."""

from typing import TYPE_CHECKING

import click

from luthier_client.cli.lazy import Command, settings

if TYPE_CHECKING:
    from luthier.v1.model_pb2 import Model


@click.group()
def model() -> None:
    """List and download models."""


@model.command("list", cls=Command, examples="luthier model list\nluthier model list -o id")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(min=1), help="Models at most.")
@click.pass_context
def list_(ctx: click.Context, limit: int) -> None:
    """List models, newest first."""
    from itertools import islice

    from luthier_client.cli import output
    from luthier_client.cli.connect import connect

    with connect(settings(ctx)) as client:
        found = list(islice(client.list_models(page_size=min(limit, 1000)), limit))
    headers = ["ID", "KIND", "STEP", "SIZE", "CREATED", "NAME"]
    rows = [
        [
            each.id,
            each.adaptation,
            str(each.step),
            output.size(each.size_bytes),
            output.age(each.create_time),
            each.name,
        ]
        for each in found
    ]
    output.resources(settings(ctx), found, headers, rows)


@model.command(cls=Command, examples="luthier model get @latest")
@click.argument("model_id", metavar="ID")
@click.pass_context
def get(ctx: click.Context, model_id: str) -> None:
    """Show a model."""
    from luthier_client.cli import ids, output
    from luthier_client.cli.connect import connect

    with connect(settings(ctx)) as client:
        found = client.get_model(ids.model(client, model_id))
    output.resource(settings(ctx), found, _details(found))


@model.command(
    cls=Command,
    examples="""luthier model download @latest --to my-model
    luthier model download job_01J8:step-200 --to checkpoint""",
)
@click.argument("model_id", metavar="ID")
@click.option("--to", "directory", type=click.Path(), help="A new directory; default: the model's id.")
@click.pass_context
def download(ctx: click.Context, model_id: str, directory: str | None) -> None:
    """Download a model, or a checkpoint (JOB:step-N). The directory appears whole or not at all."""
    import json

    from luthier_client.cli import ids
    from luthier_client.cli.connect import connect
    from luthier_client.cli.transfer import progress

    chosen = settings(ctx)
    with connect(chosen) as client:
        whole = ids.model(client, model_id)
        with progress("downloading") as report:
            target = client.download_model(whole, directory or whole.replace(":", "-"), on_progress=report)
    if chosen.output == "json":
        click.echo(json.dumps({"id": whole, "directory": str(target)}))
    else:
        click.echo(whole if chosen.output == "id" else f"{whole}  {target}")


def _details(found: "Model") -> list[tuple[str, str]]:
    from luthier_client.cli import output

    rows = [
        ("id", found.id),
        ("name", found.name),
        ("kind", found.adaptation),
        ("base model", found.base_model),
        ("job", found.job_id),
        ("step", str(found.step)),
        ("size", output.size(found.size_bytes)),
        ("created", output.age(found.create_time)),
    ]
    return rows + [(name, output.number(value)) for name, value in sorted(found.metrics.items())]
