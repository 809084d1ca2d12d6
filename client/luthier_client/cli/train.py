"""`luthier train`: from a file to a model in one command."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from luthier_client.cli.lazy import Command, Settings, settings
from luthier_client.cli.numbers import number_options, number_settings
from luthier_client.cli.tokenization import apply_tokenization, tokenization_fields, tokenization_options

if TYPE_CHECKING:
    from luthier_client.client import Client


@click.command(
    cls=Command,
    examples="""luthier train data.jsonl
    luthier train data.jsonl --base Qwen/Qwen2.5-0.5B --epochs 2 --rank 32
    luthier train data.jsonl --validation heldout.jsonl --set sample_prompts='[Hello, Who are you?]'
    luthier train data.jsonl --epochs auto --batch-size auto --find-lr
    luthier train data.jsonl --epochs 5 --resume-from @latest:step-200
    luthier train data.jsonl --model-name support-bot
    luthier train cards@3 --set full= --learning-rate 2e-5 --detach""",
)
@click.argument("data")
@click.option(
    "--base", default="builtin/tiny", show_default=True, help="The base model: a hub id, directory or model id."
)
@click.option("--validation", metavar="FILE", help="A file or dataset to evaluate on.")
@click.option("--name", help="A name for the job.")
@number_options
@click.option("--max-steps", metavar="NUMBER", help="Optimizer steps at most.")
@click.option("--rank", metavar="NUMBER", help="Rank of the LoRA adapter.")
@click.option("--max-length", metavar="NUMBER", help="Longest example in tokens.")
@click.option("--seed", metavar="NUMBER", help="Seed of order, start and dropout.")
@tokenization_options
@click.option("--resume-from", metavar="JOB:step-N", help="Go on from a checkpoint of another job.")
@click.option("--model-name", metavar="NAME", help="What comes out becomes the next version of this name.")
@click.option("--set", "assignments", metavar="KEY=VALUE", multiple=True, help="Set any field; KEY may be shortened.")
@click.option("--detach", is_flag=True, help="Return once the job is created.")
@click.pass_context
def train(
    ctx: click.Context,
    /,
    data: str,
    base: str,
    validation: str | None,
    name: str | None,
    resume_from: str | None,
    model_name: str | None,
    assignments: tuple[str, ...],
    detach: bool,
    find_lr: bool,
    chat_template: str | None,
    train_on: str | None,
    response_template: str | None,
    overlong: str | None,
    **flags: str | None,
) -> None:
    """Fine-tune a model on DATA, a file, a folder or a dataset, and watch it."""
    from luthier.v1.job_pb2 import JobSpec
    from luthier_client.cli import ids, output
    from luthier_client.cli.connect import connect
    from luthier_client.cli.follow import follow
    from luthier_client.spec import apply_settings

    chosen = settings(ctx)
    spec = JobSpec(display_name=name or Path(data).name.removesuffix(".jsonl"))
    spec.fine_tune.base_model = base
    apply_settings(spec, [*number_settings(flags, find_lr), *assignments])
    apply_tokenization(spec, tokenization_fields(chat_template, train_on, response_template, overlong))
    if model_name is not None:
        spec.fine_tune.model_name = model_name
    with connect(chosen) as client:
        spec.fine_tune.training_dataset = _dataset(client, chosen, data)
        if validation is not None:
            spec.fine_tune.validation_dataset = _dataset(client, chosen, validation)
        if resume_from is not None:
            spec.fine_tune.resume_from = ids.checkpoint(client, resume_from)
        handle = client.create_job(spec)
        if not detach:
            ctx.exit(follow(chosen, handle))
        if chosen.output == "table":
            click.echo(f"created {handle.id}")
            click.echo(f"luthier job watch {handle.id}", err=True)
        else:
            output.resource(chosen, handle.proto, [])


def _dataset(client: "Client", chosen: Settings, data: str) -> str:
    """The id of a dataset: uploaded from a file or folder, or found by the name or id that was given."""
    from luthier_client.cli import ids, output
    from luthier_client.cli.transfer import RESUMED, phases

    # A folder is one only when it is written as a path, because datasets have names like folders.
    folder = Path(data).is_dir() and "/" in data
    if not Path(data).is_file() and not folder:
        if Path(data).suffix or "/" in data:
            raise FileNotFoundError(2, "No such file", data)
        return client.get_dataset(ids.dataset(client, data)).id
    with phases("preparing", interrupted=RESUMED) as bars:
        response = client.upload(
            data,
            on_hashing=bars.phase("hashing"),
            on_progress=bars.phase("uploading", then="checking on the server"),
        )
    found = response.dataset
    if chosen.output == "table":
        what = "uploaded" if response.created else "already there:"
        click.echo(
            f"{what} {found.name}@{found.version}  {found.rows:,} rows  {output.size(found.size_bytes)}", err=True
        )
    return found.id
