"""`luthier dataset validate` and `doctor`: what is wrong with a dataset before a device is touched."""

import json
from typing import TYPE_CHECKING

import click

from luthier_client.cli.lazy import Command, settings
from luthier_client.cli.reading import reading_fields, reading_options
from luthier_client.cli.tokenization import needs_base_model, tokenization_fields, tokenization_options

if TYPE_CHECKING:
    from luthier.v1.dataset_report_pb2 import DatasetReport, TokenReport

_SHOWN = click.option(
    "--findings",
    "shown",
    default=20,
    show_default=True,
    type=click.IntRange(min=0),
    help="Findings printed of each level.",
)


@click.command(
    cls=Command,
    examples="""luthier dataset validate train.jsonl
    luthier dataset validate questions.csv --column prompt=question --column completion=answer""",
)
@click.argument("file", type=click.Path(exists=True))
@reading_options
@_SHOWN
@click.pass_context
def validate(
    ctx: click.Context,
    file: str,
    columns: tuple[str, ...],
    format: str | None,
    file_format: str | None,
    images: str | None,
    shown: int,
) -> None:
    """Check a file or a folder on the server and keep nothing of it. Exit code 1 when there are errors."""
    from luthier_client.cli import output
    from luthier_client.cli.connect import connect
    from luthier_client.cli.transfer import phases

    chosen, fields = settings(ctx), reading_fields(columns, format, file_format)
    with connect(chosen) as client, phases("preparing") as bars:
        report = client.validate_dataset(
            file,
            images=images,
            on_hashing=bars.phase("hashing"),
            on_progress=bars.phase("uploading", then="checking on the server"),
            **fields,
        )
    from luthier_client.cli import reports

    if chosen.output == "json":
        click.echo(json.dumps(output.proto_dict(report), ensure_ascii=False, indent=2))
    elif chosen.output == "table":
        reports.print_report(report, shown)
        _verdict(reports.count_words(report.counts), reports.has_errors(report))
    ctx.exit(1 if reports.has_errors(report) else 0)


@click.command(
    cls=Command,
    examples="""luthier dataset doctor cards
    luthier dataset doctor cards --base-model Qwen/Qwen2.5-0.5B-Instruct --validation cards-heldout""",
)
@click.argument("dataset_id", metavar="ID")
@click.option("--base-model", "--base", "base_model", help="Check what the rows are as its tokens, too.")
@click.option("--validation", metavar="ID", help="A dataset to evaluate on: rows that are in both are found.")
@click.option("--max-length", type=click.IntRange(min=8), metavar="NUMBER", help="Longest example in tokens.")
@tokenization_options
@_SHOWN
@click.pass_context
def doctor(
    ctx: click.Context,
    /,
    dataset_id: str,
    base_model: str | None,
    validation: str | None,
    max_length: int | None,
    shown: int,
    **flags: str | None,
) -> None:
    """Show what is wrong with a dataset, for a base model if one is named. Exit code 1 when there are errors."""
    from luthier_client.cli import ids, output
    from luthier_client.cli.connect import connect
    from luthier_client.cli.transfer import phases

    chosen, tokenization = settings(ctx), tokenization_fields(**flags)
    if base_model is None:
        needs_base_model(tokenization, {"--validation": validation, "--max-length": max_length})
    checked: list[tuple[str, TokenReport]] = []
    with connect(chosen) as client, phases() as bars:
        whole = ids.dataset(client, dataset_id)
        found = client.dataset_report(whole)
        if base_model is not None:
            answer = client.check_dataset(
                found.dataset.id,
                base_model,
                tokenization=tokenization,
                max_length=max_length,
                validation_dataset=ids.dataset(client, validation) if validation else "",
                on_progress=bars.transfer("checking"),
            )
            checked.append(("tokens", answer.training))
            if answer.HasField("validation"):
                checked.append(("validation tokens", answer.validation))
    from luthier_client.cli import reports

    every: list[DatasetReport | TokenReport] = [found.report, *(report for _, report in checked)]
    if chosen.output == "json":
        body = output.proto_dict(found)
        if checked:
            body["token_reports"] = [output.proto_dict(report) for _, report in checked]
        click.echo(json.dumps(body, ensure_ascii=False, indent=2))
    elif chosen.output == "id":
        click.echo(found.dataset.id)
    else:
        reports.heading(output.clean(f"{found.dataset.name}@{found.dataset.version}  {found.dataset.id}"))
        reports.print_report(found.report, shown)
        for title, report in checked:
            reports.print_tokens(report, title, shown)
        counts = [count for report in every for count in report.counts]
        _verdict(reports.count_words(counts), reports.has_errors(*every))
    ctx.exit(1 if reports.has_errors(*every) else 0)


def _verdict(found: str, errors: bool) -> None:
    from luthier_client.cli import output

    unicode = output.speaks_unicode()
    if errors:
        mark, colour = "✗" if unicode else "x", "red"
    else:
        mark, colour = "✓" if unicode else "+", "yellow" if found else "green"
    click.echo(f"{output.colour(mark, colour, bold=True)} {found or 'nothing was found'}")
