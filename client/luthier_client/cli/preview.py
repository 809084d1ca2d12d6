"""`luthier dataset preview`: rows as the model will see them, the mask visible with and without colour."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import click

from luthier_client.cli.lazy import Command, settings
from luthier_client.cli.tokenization import needs_base_model, tokenization_fields, tokenization_options

if TYPE_CHECKING:
    from luthier.v1.datasets_pb2 import PreviewDatasetResponse, PreviewRow, PreviewSequence, PreviewToken, PreviewTurn

CONTEXT, TRAINED, LOST = "context", "trained", "lost"
_UNICODE_MARKS = {TRAINED: ("⟦", "⟧"), LOST: ("⟪", "⟫")}
_ASCII_MARKS = {TRAINED: ("[[", "]]"), LOST: ("<<", ">>")}
# Two shades of each, taken in turns, so that the edges of tokens can be seen.
_SHADES = {CONTEXT: (245, 250), TRAINED: (22, 28), LOST: (160, 167)}


@click.command(
    cls=Command,
    examples="""luthier dataset preview cards --base-model Qwen/Qwen2.5-0.5B-Instruct
    luthier dataset preview cards --line 17 --line 40 --train-on last-turn --base-model builtin/tiny""",
)
@click.argument("dataset_id", metavar="ID")
@click.option("--base-model", "--base", "base_model", default="", help="Whose tokens to show; without it the turns.")
@click.option("-n", "--count", default=3, show_default=True, type=click.IntRange(1, 50), help="Rows, from the first.")
@click.option("--line", "lines", multiple=True, type=click.IntRange(min=1), metavar="N", help="This row instead.")
@click.option("--max-length", type=click.IntRange(min=8), metavar="NUMBER", help="Longest example in tokens.")
@tokenization_options
@click.pass_context
def preview(
    ctx: click.Context,
    /,
    dataset_id: str,
    base_model: str,
    count: int,
    lines: tuple[int, ...],
    max_length: int | None,
    **flags: str | None,
) -> None:
    """Show rows as the model will see them, and which tokens are trained."""
    import json

    from luthier_client.cli import ids, output
    from luthier_client.cli.connect import connect
    from luthier_client.cli.transfer import phases

    chosen, tokenization = settings(ctx), tokenization_fields(**flags)
    if not base_model:
        needs_base_model(tokenization, {"--max-length": max_length})
    with connect(chosen) as client, phases():
        response = client.preview_dataset(
            ids.dataset(client, dataset_id),
            base_model=base_model,
            tokenization=tokenization,
            max_length=max_length,
            count=count,
            lines=lines,
        )
    if chosen.output == "json":
        click.echo(json.dumps(output.proto_dict(response), ensure_ascii=False, indent=2))
    else:
        print_preview(response)


def print_preview(response: "PreviewDatasetResponse") -> None:
    """Prints every row, a legend, and how the mask is known."""
    from luthier_client.cli import output

    click.echo(_legend(any(sequence.tokens for row in response.rows for sequence in row.sequences)))
    for row in response.rows:
        click.echo()
        _print_row(row)
    told = [f"trained tokens are known by {response.mask_method}"] if response.mask_method else []
    told += [f"template {response.template_sha256[:12]}"] if response.template_sha256 else []
    if told:
        click.echo()
        click.echo(output.colour(output.clean(", ".join(told)), dim=True))


def _legend(tokens: bool) -> str:
    kinds = [CONTEXT, TRAINED, LOST] if tokens else [CONTEXT, TRAINED]
    words = {CONTEXT: "context", TRAINED: "trained", LOST: "lost: beyond the limit"}
    return "legend: " + "  ".join(shown([(words[kind], kind, 0)]) for kind in kinds)


def _print_row(row: "PreviewRow") -> None:
    from luthier.v1.dataset_report_pb2 import FINDING_LEVEL_ERROR
    from luthier_client.cli import output
    from luthier_client.cli.reports import print_finding

    # Of a row in error nothing is trained, whatever it would be without the error.
    wrong = any(finding.level == FINDING_LEVEL_ERROR for finding in row.findings)
    for sequence in row.sequences:
        name = f" {output.one_line(sequence.name, 40)}" if sequence.name else ""
        title = output.colour(f"line {row.line:,}{name}", bold=True)
        click.echo(f"{title}  {_counts(sequence)}".rstrip())
        if sequence.tokens:
            _print_text(shown(pieces(sequence.tokens)))
            if len(sequence.tokens) < sequence.token_count:
                click.echo(output.colour(f"  ... the first {len(sequence.tokens):,} tokens are shown", dim=True))
        elif sequence.turns:
            for turn in sequence.turns:
                _print_turn(turn, wrong)
        else:
            _print_text(shown([(sequence.text, CONTEXT if wrong else TRAINED, 0)]))
    if not row.sequences:
        click.echo(output.colour(f"line {row.line:,}", bold=True))
    if row.reference_json:
        click.echo(f"  {output.colour('reference', dim=True)} {output.one_line(row.reference_json, 1000)}")
    for finding in row.findings:
        print_finding(finding)


def _print_turn(turn: "PreviewTurn", wrong: bool) -> None:
    from luthier_client.cli import output

    click.echo(f"  {output.colour(output.one_line(turn.role, 40), 'cyan')}")
    kind = TRAINED if turn.trained and not wrong else CONTEXT
    if turn.content:
        _print_text(shown([(turn.content, kind, 0)]), indent="    ")
    if turn.tool_calls_json:
        _print_text(shown([(turn.tool_calls_json, kind, 0)]), indent="    ")


def _print_text(text: str, indent: str = "  ") -> None:
    for line in text.removesuffix("\n").split("\n"):
        click.echo(indent + line)


def _counts(sequence: "PreviewSequence") -> str:
    if not sequence.tokens:
        return ""
    lost = sum(token.lost for token in sequence.tokens)
    more = f", {lost:,} lost" if lost else ""
    return f"trained {sequence.trained_count:,} of {sequence.token_count:,} tokens{more}"


def pieces(tokens: Iterable["PreviewToken"]) -> Iterator[tuple[str, str, int]]:
    """Each token as its text, what becomes of it, and its place."""
    for place, token in enumerate(tokens):
        yield token.text, LOST if token.lost else TRAINED if token.trained else CONTEXT, place


def shown(parts: Iterable[tuple[str, str, int]]) -> str:
    """Texts with the mask on them: colours on a terminal, else marks around what is trained and what is lost.

    Nothing that the texts hold is obeyed by a terminal. A line's end is shown where a colour would not show it.
    """
    from luthier_client.cli import output

    return _coloured(parts) if output.coloured() else _marked(parts)


def _coloured(parts: Iterable[tuple[str, str, int]]) -> str:
    from luthier_client.cli import output

    ending = "↵" if output.speaks_unicode() else ""
    written: list[str] = []
    for text, kind, place in parts:
        shade = _SHADES[kind][place % 2]
        *lines, last = output.clean(text).split("\n")
        written += [_styled(line + ending, kind, shade) + "\n" for line in lines]
        written.append(_styled(last, kind, shade))
    return "".join(written)


def _styled(text: str, kind: str, shade: int) -> str:
    if not text:
        return ""
    if kind == TRAINED:
        return click.style(text, fg=231, bg=shade)
    return click.style(text, fg=shade, strikethrough=kind == LOST or None)


def _marked(parts: Iterable[tuple[str, str, int]]) -> str:
    from luthier_client.cli import output

    marks = _UNICODE_MARKS if output.speaks_unicode() else _ASCII_MARKS
    written: list[str] = []
    inside = CONTEXT
    for text, kind, _ in parts:
        if not text:
            continue
        if kind != inside:
            written += [marks[inside][1] if inside in marks else "", marks[kind][0] if kind in marks else ""]
            inside = kind
        written.append(output.clean(text))
    written.append(marks[inside][1] if inside in marks else "")
    return "".join(written)
