"""`luthier model`: list, get, and what the files beside this one add."""

from typing import TYPE_CHECKING

import click

from luthier_client.cli.downloading import download
from luthier_client.cli.export import export
from luthier_client.cli.lazy import Command, settings
from luthier_client.cli.lineage import card, lineage
from luthier_client.cli.model_edit import delete, describe, tag
from luthier_client.cli.model_names import alias, names, register, rollback

if TYPE_CHECKING:
    from luthier.v1.model_pb2 import Model


@click.group()
def model() -> None:
    """Find, name, tag, export, download and delete models.

    An ID is model_..., any beginning of it that is unique, @latest, or a name: support-bot (its newest version),
    support-bot@3, support-bot@production.
    """


@model.command(
    "list",
    cls=Command,
    examples="""luthier model list
    luthier model list --name support-bot
    luthier model list --tag team=search -o id""",
)
@click.option("--name", default="", help="Only versions of this name.")
@click.option("--tag", "tags", multiple=True, metavar="KEY=VALUE", help="Only models with this tag.")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(min=1), help="Models at most.")
@click.pass_context
def list_(ctx: click.Context, name: str, tags: tuple[str, ...], limit: int) -> None:
    """List models, newest first."""
    from itertools import islice

    from luthier_client.cli import output
    from luthier_client.cli.connect import connect

    wanted = dict(_tag(text) for text in tags)
    with connect(settings(ctx)) as client:
        found = list(islice(client.list_models(name=name, tags=wanted, page_size=min(limit, 1000)), limit))
    headers = ["ID", "VERSION", "KIND", "STEP", "SIZE", "CREATED", "NAME"]
    rows = [
        [
            each.id,
            ", ".join(f"{version.name}@{version.version}" for version in each.versions),
            each.adaptation,
            str(each.step),
            output.size(each.size_bytes),
            output.age(each.create_time),
            each.name,
        ]
        for each in found
    ]
    output.resources(settings(ctx), found, headers, rows)


@model.command(
    cls=Command, examples="luthier model get @latest\nluthier model get support-bot@production -o json | jq .metrics"
)
@click.argument("model_id", metavar="ID")
@click.pass_context
def get(ctx: click.Context, model_id: str) -> None:
    """Show a model."""
    from luthier_client.cli import ids, output
    from luthier_client.cli.connect import connect

    with connect(settings(ctx)) as client:
        found = client.get_model(ids.model(client, model_id))
    output.resource(settings(ctx), found, details(found))


for command in (names, register, alias, rollback, tag, describe, lineage, card, export, download, delete):
    model.add_command(command)


def details(found: "Model") -> list[tuple[str, str]]:
    """What people want to know of a model."""
    from luthier_client.cli import output

    base = found.base_model + (f" at {found.base_model_revision}" if found.base_model_revision else "")
    rows = [
        ("id", found.id),
        ("name", found.name),
        ("versions", ", ".join(f"{each.name}@{each.version}" for each in found.versions)),
        ("aliases", ", ".join(found.aliases)),
        ("tags", ", ".join(f"{key}={value}" for key, value in sorted(found.tags.items()))),
        ("about", found.description),
        ("kind", found.adaptation),
        ("base model", base),
        ("licence", found.base_licence),
        ("goes on from", found.parent_model),
        ("checkpoint", found.checkpoint),
        ("trained on", found.training_dataset),
        ("validated on", found.validation_dataset),
        ("job", found.job_id),
        ("step", str(found.step)),
        ("size", output.size(found.size_bytes)),
        ("created", output.age(found.create_time)),
    ]
    return rows + [(name, output.number(value)) for name, value in sorted(found.metrics.items())]


def _tag(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator:
        raise click.BadParameter(f"{text!r} is not KEY=VALUE", param_hint="--tag")
    return key, value
