"""The root of the command `luthier`: global options, and what happens to errors."""

import errno
from typing import Any

import click

from luthier_client import __version__
from luthier_client.cli.lazy import FILE, FORMATS, Command, LazyGroup, Settings, settings
from luthier_client.errors import LuthierError, SpecFileError

USAGE = 2
INTERRUPTED = 130


class Root(LazyGroup):
    """The root group: turns every error into a message on stderr and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        from luthier_client.cli import output

        try:
            return super().invoke(ctx)
        except LuthierError as error:
            output.error(settings(ctx), error)
            ctx.exit(USAGE if isinstance(error, SpecFileError) else 1)
        except ValueError as error:
            output.error(settings(ctx), LuthierError(str(error), reason="USAGE"))
            ctx.exit(USAGE)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            output.error(settings(ctx), LuthierError(_os_message(error), reason="OS_ERROR"))
            ctx.exit(1)
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)


@click.command(
    cls=Root,
    lazy={
        "train": ("train:train", "Fine-tune a model on a file, and watch it."),
        "job": ("jobs:job", "Create, watch, compare, pause, resume, cancel and delete jobs."),
        "dataset": ("datasets:dataset", "Upload, import, check, preview, derive and delete datasets."),
        "model": ("models:model", "Find, name, tag, export, download and delete models."),
        "export": ("exports:export", "List, show, download and delete exports."),
        "version": ("main:version", "Show the versions of client and server."),
    },
    epilog="\b\nExamples:\n"
    "  luthier train data.jsonl --epochs 3\n"
    "  luthier job watch @latest\n"
    "  luthier model register @latest support-bot\n"
    "  luthier model export support-bot --format gguf --type q4_k_m\n"
    "  luthier export download @latest --to my-model\n"
    "\b\n"
    "An ID may be written as @latest or as any beginning that is unique.\n"
    'Completion: eval "$(_LUTHIER_COMPLETE=bash_source luthier)", likewise zsh_source, fish_source.\n'
    "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 the job was cancelled, 130 interrupted.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--endpoint", metavar="HOST:PORT", help="Where luthierd listens.  [env: LUTHIER_ENDPOINT; default: 127.0.0.1:50051]"
)
@click.option("-o", "--output", type=FORMATS, default="table", show_default=True, help="How results are printed.")
@click.option("--token-file", type=FILE, help="A file with the token.  [env: LUTHIER_TOKEN, LUTHIER_TOKEN_FILE]")
@click.option(
    "--tls-ca", type=FILE, help="The authority (PEM) of the server's certificate; asks for TLS.  [env: LUTHIER_TLS_CA]"
)
@click.option("--tls", is_flag=True, help="Speak TLS; https:// before the endpoint does too.")
@click.version_option(__version__, prog_name="luthier", message="%(prog)s %(version)s")
@click.pass_context
def cli(
    ctx: click.Context, endpoint: str | None, output: str, token_file: str | None, tls_ca: str | None, tls: bool
) -> None:
    """Fine-tune language models on a luthierd server."""
    ctx.obj = Settings(endpoint=endpoint, output=output, token_file=token_file, tls_ca=tls_ca, tls=tls)


@click.command(cls=Command, examples="luthier version --server")
@click.option("--server", is_flag=True, help="Ask the server too.")
@click.pass_context
def version(ctx: click.Context, server: bool) -> None:
    """Show the versions of client and server."""
    from luthier_client.cli import output

    facts: dict[str, Any] = {"client": __version__}
    if server:
        from luthier_client.cli.connect import connect

        with connect(settings(ctx), timeout=5) as client:
            info = client.server_info()
        facts.update(server=info.version or "unknown", endpoint=info.endpoint, serving=info.serving)
    output.facts(settings(ctx), facts)


def _os_message(error: OSError) -> str:
    if error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def main() -> None:
    """The entry point."""
    cli(prog_name="luthier")


if __name__ == "__main__":
    main()
