"""`luthier dataset import`: datasets that the server fetches."""

import re
from pathlib import Path
from typing import Any

import click

from luthier_client.cli.lazy import Command, settings
from luthier_client.cli.reading import column_options, reading_fields

_SHA256 = re.compile(r"^[0-9a-fA-F]{64}\Z")
_HUB = re.compile(r"^hf:(?://)?(?:datasets/)?(?P<id>[^@]+)(?:@(?P<revision>.+))?$")


@click.command(
    "import",
    cls=Command,
    examples="""luthier dataset import hf:openai/gsm8k --config main --column prompt=question --column completion=answer
    luthier dataset import https://example.org/cards.jsonl.gz --name cards
    luthier dataset import s3://bucket/cards.parquet --name cards""",
)
@click.argument("source")
@click.option("--name", help="The dataset's name; default: made from the source's.")
@click.option("--config", default="", help="The configuration of a dataset of the hub.")
@click.option("--split", default="", help="The split of a dataset of the hub; default: train.")
@click.option("--revision", default="", help="Branch, tag or commit of a dataset of the hub.")
@click.option("--token-secret", default="", metavar="NAME", help="The name of a secret that the operator configured.")
@click.option("--sha256", default="", metavar="HEX", help="Refuse other bytes than these.")
@column_options
@click.pass_context
def import_(
    ctx: click.Context,
    source: str,
    name: str | None,
    config: str,
    split: str,
    revision: str,
    token_secret: str,
    sha256: str,
    columns: tuple[str, ...],
    format: str | None,
    file_format: str | None,
) -> None:
    """Have the server fetch a dataset from hf:ID, https, s3, gs or file, and keep it."""
    from luthier_client.cli import output
    from luthier_client.cli.connect import connect
    from luthier_client.cli.transfer import phases

    chosen, fields = settings(ctx), reading_fields(columns, format, file_format)
    if sha256 and not _SHA256.match(sha256):
        raise click.BadParameter("a SHA-256 has 64 hexadecimal digits", param_hint="--sha256")
    place: dict[str, Any] = {"url": source}
    found = _HUB.match(source)
    if found is not None:
        place = {
            "hub": found["id"].strip("/"),
            "config": config,
            "split": split,
            "revision": revision or found["revision"] or "",
        }
    elif config or split or revision:
        raise click.UsageError("--config, --split and --revision are for datasets of the hub: hf:ID")
    with connect(chosen) as client, phases() as bars:
        made = client.import_dataset(
            name or _name(source if found is None else found["id"], split),
            token_secret=token_secret,
            sha256=sha256.lower(),
            on_progress=bars.transfer("importing", then="checking on the server"),
            **place,
            **fields,
        )
    if chosen.output == "table":
        click.echo(output.dataset_line(made))
    else:
        output.resource(chosen, made, [])


def _name(source: str, split: str) -> str:
    """A name made of the last part of a source; another split than the default one is told apart."""
    from luthier_client.upload import name_of

    name = name_of(Path(re.split(r"[?#]", source)[0].rstrip("/")))
    return name if split in ("", "train") else name_of(Path(f"{name}-{split}"))
