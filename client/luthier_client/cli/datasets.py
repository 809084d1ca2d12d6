"""`luthier dataset`: upload, list, get, delete."""

from typing import TYPE_CHECKING

import click

from luthier_client.cli.lazy import Command, settings

if TYPE_CHECKING:
    from luthier.v1.dataset_pb2 import Dataset


@click.group()
def dataset() -> None:
    """Upload, list and delete datasets."""


@dataset.command(
    cls=Command, examples="luthier dataset upload train.jsonl\nluthier dataset upload train.jsonl --name cards"
)
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.option("--name", help="The dataset's name; default: made from the file's.")
@click.pass_context
def upload(ctx: click.Context, file: str, name: str | None) -> None:
    """Upload a file of JSON lines. The server checks every row first."""
    from luthier_client.cli import output
    from luthier_client.cli.connect import connect
    from luthier_client.cli.transfer import progress

    chosen = settings(ctx)
    with connect(chosen) as client, progress("uploading") as report:
        response = client.upload(file, name=name, on_progress=report)
    found = response.dataset
    if chosen.output == "table":
        known = "" if response.created else "  (these bytes were there already)"
        click.echo(
            f"{found.id}  {found.name}@{found.version}  {found.rows:,} rows  {output.size(found.size_bytes)}{known}"
        )
    else:
        output.resource(chosen, found, [])


@dataset.command("list", cls=Command, examples="luthier dataset list --name cards")
@click.option("--name", default="", help="Only versions of this dataset.")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(min=1), help="Datasets at most.")
@click.pass_context
def list_(ctx: click.Context, name: str, limit: int) -> None:
    """List datasets, newest first."""
    from itertools import islice

    from luthier_client.cli import output
    from luthier_client.cli.connect import connect

    with connect(settings(ctx)) as client:
        found = list(islice(client.list_datasets(name=name, page_size=min(limit, 1000)), limit))
    headers = ["ID", "VERSION", "ROWS", "SIZE", "CREATED", "NAME"]
    rows = [
        [
            each.id,
            str(each.version),
            f"{each.rows:,}",
            output.size(each.size_bytes),
            output.age(each.create_time),
            each.name,
        ]
        for each in found
    ]
    output.resources(settings(ctx), found, headers, rows)


@dataset.command(cls=Command, examples="luthier dataset get cards\nluthier dataset get cards@2 -o json")
@click.argument("dataset_id", metavar="ID")
@click.pass_context
def get(ctx: click.Context, dataset_id: str) -> None:
    """Show a dataset by its id, `name` (newest version) or `name@3`."""
    from luthier_client.cli import ids, output
    from luthier_client.cli.connect import connect

    with connect(settings(ctx)) as client:
        found = client.get_dataset(ids.dataset(client, dataset_id))
    output.resource(settings(ctx), found, _details(found))


@dataset.command(cls=Command, examples="luthier dataset delete cards@2")
@click.argument("dataset_id", metavar="ID")
@click.pass_context
def delete(ctx: click.Context, dataset_id: str) -> None:
    """Delete one version, named exactly: its id or `name@3`."""
    from luthier_client.cli import ids, output
    from luthier_client.cli.connect import connect

    chosen = settings(ctx)
    with connect(chosen) as client:
        found = client.delete_dataset(ids.dataset(client, dataset_id))
    if chosen.output == "table":
        click.echo(f"deleted {found.id}  {found.name}@{found.version}")
    else:
        output.resource(chosen, found, [])


def _details(found: "Dataset") -> list[tuple[str, str]]:
    from luthier.v1.dataset_pb2 import DatasetFormat
    from luthier_client import enums
    from luthier_client.cli import output

    return [
        ("id", found.id),
        ("name", f"{found.name}@{found.version}"),
        ("format", enums.short(DatasetFormat.DESCRIPTOR, found.format)),
        ("rows", f"{found.rows:,}"),
        ("size", output.size(found.size_bytes)),
        ("sha256", found.sha256),
        ("created", output.age(found.create_time)),
    ]
