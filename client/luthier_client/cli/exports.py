"""`luthier export`: what `luthier model export` has made."""

import json
import sys
from typing import TYPE_CHECKING

import click

from luthier_client.cli.downloading import download
from luthier_client.cli.lazy import Command, settings

if TYPE_CHECKING:
    from luthier.v1.export_pb2 import Export

_FILES = 40


@click.group()
def export() -> None:
    """List, show, download and delete exports; `luthier model export` makes them."""


@export.command(
    "list", cls=Command, examples="luthier export list\nluthier export list --model support-bot@production -o id"
)
@click.option("--model", "model_id", metavar="ID", help="Only exports of this model.")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(min=1), help="Exports at most.")
@click.pass_context
def list_(ctx: click.Context, model_id: str | None, limit: int) -> None:
    """List exports, newest first."""
    from itertools import islice

    from luthier_client import exports
    from luthier_client.cli import ids, output
    from luthier_client.cli.connect import connect

    with connect(settings(ctx)) as client:
        model = ids.model(client, model_id) if model_id else ""
        found = list(islice(client.list_exports(model=model, page_size=min(limit, 1000)), limit))
    headers = ["ID", "FORMAT", "PROOF", "SIZE", "CREATED", "MODEL", "COPY"]
    rows = [
        [
            each.id,
            exports.describe(each.task),
            "passed" if each.proof.passed else "none",
            output.size(each.size_bytes),
            output.age(each.create_time),
            each.model_id,
            each.destination_uri,
        ]
        for each in found
    ]
    output.resources(settings(ctx), found, headers, rows)


@export.command(cls=Command, examples="luthier export get @latest\nluthier export get @latest -o json | jq .proof")
@click.argument("export_id", metavar="ID")
@click.pass_context
def get(ctx: click.Context, export_id: str) -> None:
    """Show an export: its files, and how it was proven."""
    from luthier_client.cli import ids, output, proof
    from luthier_client.cli.connect import connect

    chosen = settings(ctx)
    with connect(chosen) as client:
        found = client.get_export(ids.export(client, export_id))
    output.resource(chosen, found, _details(found))
    if chosen.output == "table":
        if found.files:
            click.echo()
            output.table(["SIZE", "FILE"], [[output.size(each.size_bytes), each.path] for each in found.files[:_FILES]])
        if len(found.files) > _FILES:
            click.echo(f"and {len(found.files) - _FILES} more: -o json shows all")
        if found.HasField("proof"):
            click.echo()
            proof.print_proof(found.proof)


@export.command(cls=Command, examples="luthier export delete export_01J8\nluthier export delete @latest --yes")
@click.argument("export_id", metavar="ID")
@click.option("-y", "--yes", is_flag=True, help="Do not ask; without a terminal nothing is asked.")
@click.pass_context
def delete(ctx: click.Context, export_id: str, yes: bool) -> None:
    """Delete an export with its files; a copy at a destination stays."""
    from luthier_client.cli import ids
    from luthier_client.cli.connect import connect

    chosen = settings(ctx)
    with connect(chosen) as client:
        whole = ids.export(client, export_id)
        if not yes and sys.stdin.isatty():
            click.confirm(f"delete {whole} with its files?", abort=True, err=True)
        client.delete_export(whole)
    if chosen.output == "json":
        click.echo(json.dumps({"id": whole, "deleted": True}))
    else:
        click.echo(whole if chosen.output == "id" else f"deleted {whole}")


@export.command(
    "download",
    cls=Command,
    examples="""luthier export download @latest --to bot
    luthier export download export_01J8 --tar - | tar -x -C bot""",
)
@click.argument("export_id", metavar="ID")
@click.option("--to", "directory", type=click.Path(), help="A new directory; default: the export's id.")
@click.option("--tar", "tar", type=click.Path(allow_dash=True), help="A new tar instead; - is stdout.")
@click.pass_context
def download_(ctx: click.Context, export_id: str, directory: str | None, tar: str | None) -> None:
    """Download an export; one that broke off goes on where it stopped when the command is given again."""
    from luthier_client.cli import ids
    from luthier_client.cli.connect import connect

    with connect(settings(ctx)) as client:
        whole = ids.export(client, export_id)
    ctx.invoke(download, model_id=whole, directory=directory, tar=tar)


def _details(found: "Export") -> list[tuple[str, str]]:
    from luthier_client import exports
    from luthier_client.cli import output

    return [
        ("id", found.id),
        ("format", exports.describe(found.task)),
        ("model", found.model_id),
        ("job", found.job_id),
        ("size", output.size(found.size_bytes)),
        ("copy", found.destination_uri),
        ("created", output.age(found.create_time)),
    ]
