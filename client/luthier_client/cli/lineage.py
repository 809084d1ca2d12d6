"""`luthier model lineage|card`: what a model was made of, what was made of it, and its card."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from luthier_client.cli.lazy import Command, settings

if TYPE_CHECKING:
    from luthier.v1.model_pb2 import LineageNode
    from luthier.v1.models_pb2 import GetModelLineageResponse

Edges = dict[str, list[tuple[str, str]]]
"""From a piece of lineage to (relation, piece) of each one that hangs on it."""

_BRANCHES = {True: ("├─ ", "└─ ", "│  "), False: ("|- ", "`- ", "|  ")}


@click.command(
    cls=Command, examples="luthier model lineage support-bot@production\nluthier model lineage @latest -o json"
)
@click.argument("model_id", metavar="ID")
@click.pass_context
def lineage(ctx: click.Context, model_id: str) -> None:
    """Show what a model was made of, and what was made of it."""
    from luthier_client.cli import ids, output
    from luthier_client.cli.connect import connect

    chosen = settings(ctx)
    with connect(chosen) as client:
        whole = ids.model(client, model_id)
        if not whole.startswith("model_"):
            whole = client.get_model(whole).id
        found = client.model_lineage(whole)
    if chosen.output == "json":
        click.echo(json.dumps(output.proto_dict(found), ensure_ascii=False, indent=2))
    elif chosen.output == "id":
        for node in found.nodes:
            click.echo(node.id)
    else:
        for line in tree(found, whole):
            click.echo(line)


@click.command(
    cls=Command,
    examples="""luthier model card support-bot@production
    luthier model card @latest --to README.md""",
)
@click.argument("model_id", metavar="ID")
@click.option("--to", "file", type=click.Path(dir_okay=False), help="A new file for it.")
@click.pass_context
def card(ctx: click.Context, model_id: str, file: str | None) -> None:
    """Print a model's card: Markdown, with the metadata that the Hugging Face Hub reads."""
    from luthier_client.cli import ids, output
    from luthier_client.cli.connect import connect

    chosen = settings(ctx)
    with connect(chosen) as client:
        whole = ids.model(client, model_id)
        text = client.model_card(whole)
    if file is not None:
        with open(file, "x", encoding="utf-8") as written:
            written.write(text)
    if chosen.output == "json":
        click.echo(json.dumps({"id": whole, "markdown": text, "file": file}, ensure_ascii=False))
    elif chosen.output == "id":
        click.echo(whole)
    elif file is not None:
        click.echo(f"{whole}  {file}")
    else:
        click.echo(output.clean(text).rstrip())


def tree(found: "GetModelLineageResponse", root: str) -> Iterator[str]:
    """The lines of both trees. What stands there already is named again, and not drawn again."""
    from luthier_client.cli import output

    nodes = {node.id: node for node in found.nodes}
    before: Edges = {}
    after: Edges = {}
    for edge in found.edges:
        before.setdefault(edge.to_id, []).append((edge.relation, edge.from_id))
        after.setdefault(edge.from_id, []).append((edge.relation, edge.to_id))
    yield output.colour(_words(root, nodes), bold=True)
    for title, edges in (("made of", before), ("made of it", after)):
        yield output.colour(title, dim=True)
        yield from _branches(root, edges, nodes, "  ", {root}) if root in edges else ["  nothing"]


def _branches(at: str, edges: Edges, nodes: "dict[str, LineageNode]", indent: str, drawn: set[str]) -> Iterator[str]:
    from luthier_client.cli import output

    fork, last, passing = _BRANCHES[output.speaks_unicode()]
    following = edges.get(at, [])
    for number, (relation, other) in enumerate(following, 1):
        is_last = number == len(following)
        again = other in drawn and other in edges
        words = f"{output.clean(relation)}  {_words(other, nodes)}" + ("  (above)" if again else "")
        yield f"{indent}{last if is_last else fork}{words}"
        if other not in drawn:
            drawn.add(other)
            yield from _branches(other, edges, nodes, indent + ("   " if is_last else passing), drawn)


def _words(each: str, nodes: "dict[str, LineageNode]") -> str:
    """A piece of lineage in one line."""
    from luthier_client.cli import output

    node = nodes.get(each)
    if node is None:
        return output.one_line(each, 200)
    name = node.name if node.name != node.id else ""
    facts = [name, f"({node.licence})" if node.licence else "", "[deleted]" if node.deleted else ""]
    return "  ".join(output.one_line(fact, 200) for fact in [each, *facts] if fact)
