"""`luthier model names|register|alias|rollback`: which model is meant by a name."""

from typing import TYPE_CHECKING

import click

from luthier_client.cli.lazy import Command, settings

if TYPE_CHECKING:
    from luthier.v1.model_pb2 import ModelAlias, ModelName

_MOVES = 5


@click.command(cls=Command, examples="luthier model names\nluthier model names support-bot -o json")
@click.argument("prefix", metavar="[BEGINNING]", default="")
@click.option("--limit", default=50, show_default=True, type=click.IntRange(min=1), help="Names at most.")
@click.pass_context
def names(ctx: click.Context, prefix: str, limit: int) -> None:
    """List names with their versions and aliases."""
    import json
    from itertools import islice

    from luthier_client.cli import output
    from luthier_client.cli.connect import connect

    chosen = settings(ctx)
    with connect(chosen) as client:
        found = list(islice(client.list_model_names(prefix=prefix, page_size=min(limit, 1000)), limit))
    if chosen.output == "json":
        click.echo(json.dumps([output.proto_dict(each) for each in found], ensure_ascii=False, indent=2))
    elif chosen.output == "id":
        for each in found:
            click.echo(each.name)
    elif found:
        output.table(["NAME", "VERSIONS", "NEWEST", "MODEL", "ALIASES"], [_row(each) for each in found])
    else:
        click.echo("no names yet: luthier model register ID NAME makes one", err=True)


@click.command(
    cls=Command,
    examples="""luthier model register @latest support-bot
    luthier model register job_01J8:step-200 support-bot""",
)
@click.argument("model_id", metavar="ID")
@click.argument("name")
@click.pass_context
def register(ctx: click.Context, model_id: str, name: str) -> None:
    """Make a model, or a checkpoint (JOB:step-N), the next version of a name."""
    import json

    from luthier_client.cli import ids, output
    from luthier_client.cli.connect import connect

    chosen = settings(ctx)
    with connect(chosen) as client:
        made = client.register_model(ids.model(client, model_id), name)
    version = f"{made.name}@{made.version}"
    if chosen.output == "json":
        click.echo(json.dumps(output.proto_dict(made), ensure_ascii=False, indent=2))
    elif chosen.output == "id":
        click.echo(made.model_id)
    else:
        click.echo(output.clean(f"{version}  {made.model_id}"))
        click.echo(output.clean(f"luthier model alias {made.name} production {made.version}"), err=True)


@click.command(
    cls=Command,
    examples="""luthier model alias support-bot production 3
    luthier model alias support-bot production --delete""",
)
@click.argument("name")
@click.argument("alias_name", metavar="ALIAS")
@click.argument("version", required=False, type=click.IntRange(min=1))
@click.option("--delete", is_flag=True, help="Delete the alias; the versions stay.")
@click.pass_context
def alias(ctx: click.Context, name: str, alias_name: str, version: int | None, delete: bool) -> None:
    """Point an alias of NAME, such as production, to a version."""
    import json

    from luthier_client.cli.connect import connect

    if delete and version is not None:
        raise click.UsageError("--delete takes no version.")
    if not delete and version is None:
        raise click.UsageError(f"say which version: luthier model alias {name} {alias_name} 3; or --delete.")
    chosen = settings(ctx)
    with connect(chosen) as client:
        if delete:
            client.delete_model_alias(name, alias_name)
            if chosen.output == "json":
                click.echo(json.dumps({"name": name, "alias": alias_name, "deleted": True}))
            else:
                click.echo(f"{name}@{alias_name}" if chosen.output == "id" else f"deleted {name}@{alias_name}")
            return
        assert version is not None
        _told(ctx, client.set_model_alias(name, alias_name, version))


@click.command(cls=Command, examples="luthier model rollback support-bot production")
@click.argument("name")
@click.argument("alias_name", metavar="ALIAS")
@click.pass_context
def rollback(ctx: click.Context, name: str, alias_name: str) -> None:
    """Point an alias to where it pointed before its last move."""
    from luthier_client.cli.connect import connect

    with connect(settings(ctx)) as client:
        _told(ctx, client.rollback_model_alias(name, alias_name))


def _told(ctx: click.Context, moved: "ModelAlias") -> None:
    import json

    from luthier_client.cli import output

    chosen = settings(ctx)
    if chosen.output == "json":
        click.echo(json.dumps(output.proto_dict(moved), ensure_ascii=False, indent=2))
    elif chosen.output == "id":
        click.echo(moved.model_id)
    else:
        arrow = "→" if output.speaks_unicode() else "->"
        click.echo(output.clean(f"{moved.name}@{moved.alias} {arrow} {moved.name}@{moved.version}  {moved.model_id}"))
        before = [f"@{each.version}" for each in moved.history[1 : 1 + _MOVES]]
        if before:
            more = ", ..." if len(moved.history) > 1 + _MOVES else ""
            click.echo(output.colour(f"before: {', '.join(before)}{more}", dim=True))


def _row(found: "ModelName") -> list[str]:
    newest = found.versions[0] if found.versions else None
    aliases = ", ".join(f"{each.alias}=@{each.version}" for each in found.aliases)
    if newest is None:
        return [found.name, "0", "", "", aliases]
    return [found.name, str(len(found.versions)), f"@{newest.version}", newest.model_id, aliases]
