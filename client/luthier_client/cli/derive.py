"""`luthier dataset split|sample|concatenate`: new datasets of others."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from luthier_client.cli.lazy import Command, settings

if TYPE_CHECKING:
    from luthier.v1.dataset_pb2 import Dataset

_SEED = click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Decides which rows; repeats exactly."
)


@click.command(cls=Command, examples="luthier dataset split cards --validation 0.1 --seed 1")
@click.argument("dataset_id", metavar="ID")
@click.option(
    "--validation",
    required=True,
    metavar="SHARE",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Share of the rows for validation, such as 0.1.",
)
@_SEED
@click.option("--training-name", default="", help="Name of the larger part; default: NAME-train.")
@click.option("--validation-name", default="", help="Name of the other part; default: NAME-validation.")
@click.pass_context
def split(
    ctx: click.Context, dataset_id: str, validation: float, seed: int, training_name: str, validation_name: str
) -> None:
    """Split a dataset in two; equal rows stay on one side."""
    from luthier_client.cli import ids
    from luthier_client.cli.connect import connect
    from luthier_client.cli.transfer import phases

    with connect(settings(ctx)) as client, phases("splitting on the server"):
        made = client.split_dataset(
            ids.dataset(client, dataset_id),
            validation=validation,
            seed=seed,
            training_name=training_name,
            validation_name=validation_name,
        )
    _told(ctx, made)


@click.command(cls=Command, examples="luthier dataset sample cards --rows 1000 --seed 1")
@click.argument("dataset_id", metavar="ID")
@click.option("--rows", required=True, type=click.IntRange(min=1), metavar="NUMBER", help="How many rows.")
@_SEED
@click.option("--name", default="", help="Name of the sample; default: NAME-sample.")
@click.pass_context
def sample(ctx: click.Context, dataset_id: str, rows: int, seed: int, name: str) -> None:
    """Take some rows of a dataset, in their order."""
    from luthier_client.cli import ids
    from luthier_client.cli.connect import connect
    from luthier_client.cli.transfer import phases

    with connect(settings(ctx)) as client, phases("sampling on the server"):
        made = client.sample_dataset(ids.dataset(client, dataset_id), rows=rows, seed=seed, name=name)
    _told(ctx, [made])


@click.command(cls=Command, examples="luthier dataset concatenate cards questions@2 --name all")
@click.argument("dataset_ids", metavar="ID ID...", nargs=-1, required=True)
@click.option("--name", required=True, help="Name of the result.")
@click.pass_context
def concatenate(ctx: click.Context, dataset_ids: tuple[str, ...], name: str) -> None:
    """Put datasets one after the other."""
    from luthier_client.cli import ids
    from luthier_client.cli.connect import connect
    from luthier_client.cli.transfer import phases

    if len(dataset_ids) < 2:
        raise click.UsageError("name two datasets or more")
    with connect(settings(ctx)) as client, phases("concatenating on the server"):
        made = client.concatenate_datasets([ids.dataset(client, each) for each in dataset_ids], name=name)
    _told(ctx, [made])


def _told(ctx: click.Context, made: "Sequence[Dataset]") -> None:
    from luthier_client.cli import output

    chosen = settings(ctx)
    if chosen.output == "json":
        click.echo(json.dumps([output.proto_dict(each) for each in made], ensure_ascii=False, indent=2))
        return
    for each in made:
        click.echo(each.id if chosen.output == "id" else output.dataset_line(each))
