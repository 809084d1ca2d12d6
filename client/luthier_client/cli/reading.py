"""The options that say how a dataset's file is read."""

from collections.abc import Callable, Sequence
from typing import Any, TypedDict, TypeVar

import click

from luthier_client.cli.tokenization import Name

C = TypeVar("C", bound=Callable[..., Any])

FILE_FORMATS = ("jsonl", "json", "csv", "parquet", "arrow", "zip")
FORMATS = (
    "messages", "prompt-completion", "instruction", "sharegpt",
    "text", "preference", "unpaired-preference", "prompt-only",
)  # fmt: skip


class ReadingFields(TypedDict):
    """What the client's methods take."""

    file_format: str
    format: str
    columns: dict[str, str]


def column_options(command: C) -> C:
    """Adds `--column`, `--format` and `--file-format`."""
    options: Sequence[Callable[[C], C]] = (
        click.option(
            "--column",
            "columns",
            multiple=True,
            metavar="FIELD=COLUMN",
            help="The file's column that holds a field of the format, such as prompt=question.",
        ),
        click.option("--format", type=Name(FORMATS), help="How rows look; default: detected."),
        click.option("--file-format", type=Name(FILE_FORMATS), help="How the file is written; default: detected."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def reading_options(command: C) -> C:
    """The same for a file at hand, with `--images`."""
    images = click.option(
        "--images", type=click.Path(exists=True, file_okay=False), help="The folder of the images that rows name."
    )
    return column_options(images(command))


def reading_fields(columns: Sequence[str], format: str | None, file_format: str | None) -> ReadingFields:
    """What was given, as the client takes it. Raises click.BadParameter."""
    mapped: dict[str, str] = {}
    for text in columns:
        field, separator, column = text.partition("=")
        if not (field and separator and column):
            raise click.BadParameter(f"{text!r} is not FIELD=COLUMN", param_hint="--column")
        if field in mapped:
            raise click.BadParameter(f"{field!r} is given twice", param_hint="--column")
        mapped[field] = column
    return {"file_format": file_format or "", "format": format or "", "columns": mapped}
