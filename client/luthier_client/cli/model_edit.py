"""`luthier model tag|describe|delete`."""

import re
import sys
from typing import TYPE_CHECKING

import click

from luthier_client.cli.lazy import Command, settings

if TYPE_CHECKING:
    from luthier.v1.model_pb2 import Model
    from luthier_client.errors import FailedPrecondition

_IDS = re.compile(r"\b(?:job|model|export)_[0-9A-Z]{26}\b")
_ALIAS = re.compile(r"\b([a-z0-9][a-z0-9._-]*)@([a-z][a-z0-9._-]*)")


@click.command(
    cls=Command,
    examples="""luthier model tag @latest team=search stage=trial
    luthier model tag support-bot@3 stage-""",
)
@click.argument("model_id", metavar="ID")
@click.argument("changes", metavar="KEY=VALUE|KEY-...", nargs=-1, required=True)
@click.pass_context
def tag(ctx: click.Context, model_id: str, changes: tuple[str, ...]) -> None:
    """Set tags of a model, or remove them (KEY-)."""
    from luthier_client.cli import ids
    from luthier_client.cli.connect import connect

    added: dict[str, str] = {}
    removed: list[str] = []
    for change in changes:
        key, separator, value = change.partition("=")
        if separator and key:
            added[key] = value
        elif not separator and len(change) > 1 and change.endswith("-"):
            removed.append(change[:-1])
        else:
            raise click.BadParameter(f"{change!r} is neither KEY=VALUE nor KEY-", param_hint="KEY=VALUE")
    if both := added.keys() & set(removed):
        raise click.UsageError(f"{', '.join(sorted(both))}: set and removed at once.")
    with connect(settings(ctx)) as client:
        _told(ctx, client.update_model(ids.model(client, model_id), set_tags=added, remove_tags=removed))


@click.command(
    cls=Command,
    examples="""luthier model describe support-bot@3 "Answers questions about invoices."
    luthier model describe @latest - < about.txt""",
)
@click.argument("model_id", metavar="ID")
@click.argument("text")
@click.pass_context
def describe(ctx: click.Context, model_id: str, text: str) -> None:
    """Say what a model is for; it becomes part of its card. - reads stdin, "" takes the text away."""
    from luthier_client.cli import ids
    from luthier_client.cli.connect import connect

    words = sys.stdin.read().strip() if text == "-" else text
    with connect(settings(ctx)) as client:
        _told(ctx, client.update_model(ids.model(client, model_id), description=words))


@click.command(cls=Command, examples="luthier model delete model_01J8\nluthier model delete @latest --yes")
@click.argument("model_id", metavar="ID")
@click.option("-y", "--yes", is_flag=True, help="Do not ask; without a terminal nothing is asked.")
@click.pass_context
def delete(ctx: click.Context, model_id: str, yes: bool) -> None:
    """Delete a model with its files. Refused while something depends on it."""
    import json

    from luthier_client.cli import ids, output
    from luthier_client.cli.connect import connect
    from luthier_client.errors import FailedPrecondition

    chosen = settings(ctx)
    with connect(chosen) as client:
        whole = ids.model(client, model_id)
        if not whole.startswith("model_") or "@" in whole:
            found = client.get_model(whole).id if ":" not in whole else "the id of a model"
            raise click.UsageError(
                f"delete takes an id, so that no other version is meant: luthier model delete {found}"
            )
        if not yes and sys.stdin.isatty():
            name = output.one_line(client.get_model(whole).name, 60)
            click.confirm(f"delete {whole} ({name}) with its files?", abort=True, err=True)
        try:
            client.delete_model(whole)
        except FailedPrecondition as refused:
            if chosen.output == "table":
                _advise(refused, whole)
            raise
    if chosen.output == "json":
        click.echo(json.dumps({"id": whole, "deleted": True}))
    else:
        click.echo(whole if chosen.output == "id" else f"deleted {whole}")


def _advise(refused: "FailedPrecondition", model_id: str) -> None:
    """Puts the command that resolves it to each thing that depends on the model."""
    advised = []
    for subject, text in refused.violations:
        command = resolving(subject, text, model_id)
        # Most sentences name their subject themselves.
        advised.append(("" if subject in text else subject, f"{text} ({command})" if command else text))
    refused.violations = advised


def resolving(subject: str, text: str, model_id: str) -> str:
    """The command that takes away what a model's deletion was refused for; empty when none is known."""
    for words in (subject, text):
        for found in _IDS.findall(words):
            if found == model_id:
                continue
            kind = found.partition("_")[0]
            if kind == "job":
                return f"luthier job cancel {found}"
            return f"luthier export delete {found}" if kind == "export" else f"luthier model delete {found}"
        if match := _ALIAS.search(words):
            return f"luthier model alias {match[1]} {match[2]} --delete"
    return ""


def _told(ctx: click.Context, changed: "Model") -> None:
    from luthier_client.cli import output
    from luthier_client.cli.models import details

    output.resource(settings(ctx), changed, details(changed))
