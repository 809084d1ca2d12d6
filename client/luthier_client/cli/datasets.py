"""`luthier dataset`: upload, list, get, delete; and what other modules add."""

from typing import TYPE_CHECKING

import click

from luthier_client.cli.derive import concatenate, sample, split
from luthier_client.cli.doctor import doctor, validate
from luthier_client.cli.lazy import Command, settings
from luthier_client.cli.preview import preview
from luthier_client.cli.reading import reading_fields, reading_options
from luthier_client.cli.sources import import_

if TYPE_CHECKING:
    from luthier.v1.dataset_pb2 import Dataset
    from luthier.v1.dataset_report_pb2 import TokenReport
    from luthier.v1.datasets_pb2 import GetDatasetResponse


@click.group()
def dataset() -> None:
    """Upload, import, check, preview, derive and delete datasets."""


@dataset.command(
    cls=Command,
    examples="""luthier dataset upload train.jsonl
    luthier dataset upload questions.csv --name cards --column prompt=question --column completion=answer
    luthier dataset upload photos.jsonl --images photos""",
)
@click.argument("file", type=click.Path(exists=True))
@click.option("--name", help="The dataset's name; default: made from the file's.")
@reading_options
@click.pass_context
def upload(
    ctx: click.Context,
    file: str,
    name: str | None,
    columns: tuple[str, ...],
    format: str | None,
    file_format: str | None,
    images: str | None,
) -> None:
    """Upload a file, or a folder with rows and images. The server checks every row first.

    An upload that broke off goes on where it was when the command is given again.
    """
    from luthier_client.cli import output
    from luthier_client.cli.connect import connect
    from luthier_client.cli.transfer import RESUMED, phases

    chosen, fields = settings(ctx), reading_fields(columns, format, file_format)
    with connect(chosen) as client, phases("preparing", interrupted=RESUMED) as bars:
        response = client.upload(
            file,
            name=name,
            images=images,
            on_hashing=bars.phase("hashing"),
            on_progress=bars.phase("uploading", then="checking on the server"),
            **fields,
        )
    found = response.dataset
    if chosen.output != "table":
        output.resource(chosen, found, [])
        return
    known = "" if response.created else "  (these bytes were there already)"
    click.echo(output.dataset_line(found) + known)
    from luthier_client.cli import reports

    if words := reports.count_words(response.report.counts):
        click.echo(f"{words}: luthier dataset doctor {found.id}", err=True)


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
        found = client.dataset_report(ids.dataset(client, dataset_id))
    output.resource(settings(ctx), found.dataset, _details(found))


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
        click.echo(output.clean(f"deleted {found.id}  {found.name}@{found.version}"))
    else:
        output.resource(chosen, found, [])


for command in (import_, validate, doctor, preview, split, sample, concatenate):
    dataset.add_command(command)


def _details(response: "GetDatasetResponse") -> list[tuple[str, str]]:
    from luthier.v1.dataset_pb2 import DatasetFormat
    from luthier_client import enums
    from luthier_client.cli import output, reports

    found = response.dataset
    rows = [
        ("id", found.id),
        ("name", f"{found.name}@{found.version}"),
        ("format", enums.short(DatasetFormat.DESCRIPTOR, found.format)),
        ("read as", reports.reading(found.reading)),
        ("rows", f"{found.rows:,}"),
        ("size", output.size(found.size_bytes)),
        ("sha256", found.sha256),
        ("source", found.source),
        ("made by", _lineage(found)),
        ("created", output.age(found.create_time)),
        ("findings", reports.count_words(response.report.counts)),
    ]
    rows += [(f"tokens {place}", _tokens(each)) for place, each in enumerate(response.token_reports, 1)]
    return rows


def _tokens(report: "TokenReport") -> str:
    from luthier_client.cli import reports

    return f"{report.base_model}: {reports.token_line(report)}"


def _lineage(found: "Dataset") -> str:
    """`split of ds_... (part=training, seed=1)`; empty for a dataset that was not made of others."""
    if not found.HasField("lineage"):
        return ""
    lineage = found.lineage
    given = ", ".join(f"{name}={value}" for name, value in sorted(lineage.parameters.items()))
    return f"{lineage.operation} of {', '.join(lineage.parents)}" + (f" ({given})" if given else "")
