"""`luthier model export`: a model in the form that others load, proven equal."""

from typing import TYPE_CHECKING

import click

from luthier_client.cli.lazy import Command, settings

if TYPE_CHECKING:
    from luthier_client.exports import Format

FORMATS = ("adapter", "merged", "gguf")
_MERGED = ("bf16", "f16", "f32", "nf4")
_GGUF = ("f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k")
_ALSO = {"fp16": "f16", "fp32": "f32"}


@click.command(
    cls=Command,
    examples="""luthier model export @latest --format gguf --type q4_k_m
    luthier model export support-bot@production --format merged --to hf://me/support-bot --secret hub
    luthier model export @latest --format adapter --to s3://models/bot --secret s3
    luthier model export @latest --format gguf --adapter-only --no-wait -o id""",
)
@click.argument("model_id", metavar="ID")
@click.option("--format", "form", required=True, type=click.Choice(FORMATS), help="What is written.")
@click.option(
    "--type",
    "weights",
    metavar="TYPE",
    help=f"How weights are held; merged: {', '.join(_MERGED)} [bf16]; gguf: {', '.join(_GGUF)} [f16].",
)
@click.option("--adapter-only", is_flag=True, help="gguf: the adapter alone, for a GGUF of its base.")
@click.option("--shard-bytes", type=click.IntRange(min=1), metavar="NUMBER", help="merged: bytes of a file at most.")
@click.option("--dataset", metavar="ID", help="The rows that prove it; default: those it was evaluated on.")
@click.option("--rows", type=click.IntRange(1, 1000), metavar="NUMBER", help="How many rows are compared; default: 16.")
@click.option("--to", "uri", metavar="URI", help="A copy goes to s3://, gs://, az://, file:// or hf://OWNER/NAME.")
@click.option("--secret", default="", metavar="NAME", help="The name of the operator's secret with the credentials.")
@click.option("--public", is_flag=True, help="A new repository of the Hub is public; default: private.")
@click.option("--no-wait", is_flag=True, help="Return once the job is created.")
@click.pass_context
def export(
    ctx: click.Context,
    /,
    model_id: str,
    form: str,
    weights: str | None,
    adapter_only: bool,
    shard_bytes: int | None,
    dataset: str | None,
    rows: int | None,
    uri: str | None,
    secret: str,
    public: bool,
    no_wait: bool,
) -> None:
    """Write a model, or a checkpoint (JOB:step-N), in the form that others load.

    The export is loaded by what will load it and compared with the tuned model; one that differs is a failed job. -o
    json and -o id print the export.
    """
    from luthier_client import exports
    from luthier_client.cli import ids, output
    from luthier_client.cli.connect import connect
    from luthier_client.cli.follow import CANCELLED, follow
    from luthier_client.errors import JobCancelled

    if uri is None and (secret or public):
        raise click.UsageError("--secret and --public are for a destination: --to URI.")
    asked = form_of(form, weights, adapter_only, shard_bytes)
    chosen = settings(ctx)
    with connect(chosen) as client:
        handle = client.export_model(
            ids.model(client, model_id),
            asked,
            proof_dataset=ids.dataset(client, dataset) if dataset else "",
            proof_rows=rows,
            destination=None if uri is None else exports.destination(uri, secret=secret, public=public),
        )
        if no_wait:
            if chosen.output == "table":
                click.echo(f"created {handle.id}")
                click.echo(f"luthier job watch {handle.id}", err=True)
            else:
                output.resource(chosen, handle.proto, [])
        elif chosen.output == "table":
            ctx.exit(follow(chosen, handle))
        else:
            try:
                made = client.get_export(handle.wait(check=True).export_id)
            except JobCancelled as cancelled:
                output.error(chosen, cancelled)
                ctx.exit(CANCELLED)
            output.resource(chosen, made, [])


def form_of(form: str, weights: str | None, adapter_only: bool, shard_bytes: int | None) -> "Format":
    """What was asked for. Raises click.UsageError for options that the format does not have."""
    from luthier_client import exports

    if adapter_only and form != "gguf":
        raise click.UsageError("--adapter-only is for --format gguf; --format adapter is PEFT's adapter.")
    if shard_bytes is not None and form != "merged":
        raise click.UsageError("--shard-bytes is for --format merged.")
    if form == "adapter":
        if weights is not None:
            raise click.UsageError("an adapter is exported as it was trained: leave out --type.")
        return exports.adapter()
    given = _ALSO.get((weights or "").lower(), weights or "")
    types = _MERGED if form == "merged" else _GGUF
    if given and given.lower().replace("-", "_") not in types:
        raise click.BadParameter(f"{weights!r} is no type of {form}: {', '.join(types)}", param_hint="--type")
    if form == "merged":
        return exports.merged(given or "bf16", max_shard_bytes=shard_bytes)
    return exports.gguf(given or "f16", adapter_only=adapter_only)
