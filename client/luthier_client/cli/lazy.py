"""Groups and commands that cost nothing until they run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import click


@dataclass(frozen=True)
class Settings:
    """What holds for every command."""

    endpoint: str | None
    """As given; None leaves it to LUTHIER_ENDPOINT and the default."""
    output: str
    """`table`, `json` or `id`."""
    token_file: str | None = None
    """As given; None leaves it to LUTHIER_TOKEN and LUTHIER_TOKEN_FILE."""
    tls_ca: str | None = None
    """As given; None leaves it to LUTHIER_TLS_CA."""
    tls: bool = False
    """Whether TLS was asked for; it also is by an endpoint with https:// and by a private authority."""


FORMATS = click.Choice(["table", "json", "id"])
FILE = click.Path(exists=True, dir_okay=False)


def settings(ctx: click.Context) -> Settings:
    """The settings of this run, which the root command made."""
    found: Settings = ctx.find_root().obj
    return found


def _override(name: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def store(ctx: click.Context, _: click.Parameter, value: Any) -> None:
        if value and ctx.find_root().obj is not None:
            ctx.find_root().obj = replace(settings(ctx), **{name: value})

    return store


class Command(click.Command):
    """A command with examples, which also takes the global options, as people write them at the end."""

    def __init__(self, *args: Any, examples: str = "", **kwargs: Any) -> None:
        if examples:
            kwargs["epilog"] = "\b\nExamples:\n" + "\n".join(
                f"  {line.strip()}" for line in examples.strip().splitlines()
            )
        super().__init__(*args, **kwargs)
        self.params += [
            click.Option(
                ["--endpoint"],
                metavar="HOST:PORT",
                expose_value=False,
                callback=_override("endpoint"),
                help="Where luthierd listens.",
            ),
            click.Option(
                ["-o", "--output"],
                type=FORMATS,
                expose_value=False,
                callback=_override("output"),
                help="How results are printed.",
            ),
            # Hidden here, because the help of the root shows them.
            click.Option(
                ["--token-file"],
                type=FILE,
                expose_value=False,
                hidden=True,
                callback=_override("token_file"),
            ),
            click.Option(["--tls-ca"], type=FILE, expose_value=False, hidden=True, callback=_override("tls_ca")),
            click.Option(["--tls"], is_flag=True, expose_value=False, hidden=True, callback=_override("tls")),
        ]


class LazyGroup(click.Group):
    """A group whose commands are loaded when they run; their short help stands here."""

    def __init__(self, *args: Any, lazy: Mapping[str, tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lazy = dict(lazy)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._lazy:
            return None
        module, _, name = self._lazy[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(f"luthier_client.cli.{module}"), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self._lazy.items()])
