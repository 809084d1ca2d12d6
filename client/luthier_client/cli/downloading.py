"""`luthier model download`, `luthier export download`: files onto this machine."""

import json
import sys
from collections.abc import Callable

import click

from luthier_client.cli.lazy import Command, Settings, settings

GOES_ON = "interrupted: give the command again, and the download goes on where it was"


@click.command(
    cls=Command,
    examples="""luthier model download @latest --to my-model
    luthier model download support-bot@production --tar bot.tar
    luthier model download @latest --tar - | ssh host tar -x -C models
    luthier model download job_01J8:step-200 --to checkpoint""",
)
@click.argument("model_id", metavar="ID")
@click.option("--to", "directory", type=click.Path(), help="A new directory; default: the model's id.")
@click.option("--tar", "tar", type=click.Path(allow_dash=True), help="A new tar instead; - is stdout.")
@click.pass_context
def download(ctx: click.Context, model_id: str, directory: str | None, tar: str | None) -> None:
    """Download a model, a checkpoint (JOB:step-N) or an export.

    It appears whole, every hash checked, or not at all. One that broke off goes on where it stopped when the command is
    given again.
    """
    from luthier_client.cli import ids
    from luthier_client.cli.connect import connect

    if directory is not None and tar is not None:
        raise click.UsageError("give --to or --tar, not both.")
    if tar == "-" and sys.stdout.isatty():
        raise click.UsageError("stdout is a terminal, which shows no tar: | tar -x, or --tar FILE.")
    chosen = settings(ctx)
    with connect(chosen) as client:
        whole = ids.files(client, model_id)
        if tar is None:
            target = directory or whole.replace(":", "-")
            _shown(lambda report: client.download_model(whole, target, on_progress=report))
        elif tar == "-":
            # Results go to stderr here, because the tar is what goes to stdout.
            _shown(lambda report: client.download_model_tar(whole, sys.stdout.buffer, on_progress=report), GOES_ON[:11])
            return
        else:
            target = tar
            _shown(lambda report: client.download_model_tar(whole, target, on_progress=report))
    told(chosen, whole, target, "directory" if tar is None else "file")


def _shown(fetch: "Callable[[Callable[[int, int], None]], object]", interrupted: str = GOES_ON) -> None:
    from luthier_client.cli.transfer import phases

    with phases("preparing", interrupted=interrupted) as bars:
        fetch(bars.phase("downloading", then="finishing"))


def told(chosen: Settings, whole: str, target: str, kind: str) -> None:
    """Prints what was downloaded, and where it is."""
    from pathlib import Path

    if chosen.output == "json":
        click.echo(json.dumps({"id": whole, kind: str(Path(target).absolute())}))
    else:
        click.echo(whole if chosen.output == "id" else f"{whole}  {Path(target).absolute()}")
