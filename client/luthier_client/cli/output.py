"""Tables, JSON and errors, and how numbers are written. Nothing here needs grpc or rich."""

import json
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import click

from luthier_client.cli.lazy import Settings
from luthier_client.errors import InvalidDataset, LuthierError

STATE_COLOURS = {
    "succeeded": "green",
    "failed": "red",
    "cancelled": "yellow",
    "running": "cyan",
    "preparing": "cyan",
    "pausing": "yellow",
    "paused": "yellow",
    "queued": "blue",
    "validating": "blue",
}


def clean(text: str) -> str:
    """The text without anything that a terminal would obey. What models and servers write may hold escape sequences."""
    return "".join(
        character if character == "\n" or unicodedata.category(character)[0] != "C" else " " for character in text
    )


def one_line(text: str, limit: int) -> str:
    """The text on one line of at most `limit` columns."""
    flat = " ".join(clean(text).split())
    return flat if _width(flat) <= limit else _cut(flat, limit)


def coloured(*, err: bool = False) -> bool:
    """Whether colours are shown: the stream is a terminal and NO_COLOR is not set."""
    stream = sys.stderr if err else sys.stdout
    return not os.environ.get("NO_COLOR") and stream.isatty()


def colour(text: str, name: str | None = None, *, bold: bool = False, dim: bool = False, err: bool = False) -> str:
    """The text in a colour, where colours are shown."""
    if not coloured(err=err):
        return text
    return click.style(text, fg=name, bold=bold or None, dim=dim or None)


def speaks_unicode() -> bool:
    """Whether stdout can show check marks, arrows and sparklines."""
    try:
        "✓→▁…".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def columns() -> int:
    """Width of the terminal."""
    return shutil.get_terminal_size().columns


def duration(seconds: float) -> str:
    """`42s`, `3m 05s`, `2h 07m`, `3d 4h`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600}h"


def size(count: int) -> str:
    """Bytes for people: `512 B`, `4.0 KiB`."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def age(timestamp: Any) -> str:
    """How long ago a Timestamp was; empty when it is not set."""
    if not timestamp.seconds:
        return ""
    return duration(datetime.now(UTC).timestamp() - timestamp.seconds) + " ago"


def clock(seconds: float) -> str:
    """A moment as the clock of this machine shows it, with the date when it is not today's."""
    moment = datetime.fromtimestamp(seconds)
    return moment.strftime("%H:%M:%S" if moment.date() == datetime.now().date() else "%Y-%m-%d %H:%M:%S")


def done_of(completed: int, total: int, unit: str) -> str:
    """How far something is: `8/16 rows`, `1.0 MiB of 4.3 MiB`."""
    if unit == "bytes":
        return f"{size(completed)} of {size(total)}"
    return f"{completed:,}/{total:,} {unit}".rstrip()


def number(value: float) -> str:
    """A loss, a rate or a count, as short as it can be read."""
    if abs(value) >= 1e4:
        return f"{value:,.0f}"
    return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.4f}"


def dataset_line(dataset: Any) -> str:
    """A dataset in one line."""
    return clean(f"{dataset.id}  {dataset.name}@{dataset.version}  {dataset.rows:,} rows  {size(dataset.size_bytes)}")


def proto_dict(message: Any) -> dict[str, Any]:
    """A message as proto JSON under the contract's field names, defaults included."""
    from google.protobuf import json_format

    converted: dict[str, Any] = json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return converted


def json_line(message: Any) -> str:
    """A message as proto JSON on one line."""
    return json.dumps(proto_dict(message), ensure_ascii=False)


def resource(chosen: Settings, message: Any, rows: Iterable[tuple[str, str]]) -> None:
    """Prints one resource: its rows, its JSON, or its id."""
    if chosen.output == "json":
        click.echo(json.dumps(proto_dict(message), ensure_ascii=False, indent=2))
    elif chosen.output == "id":
        click.echo(message.id)
    else:
        pairs([(label, value) for label, value in rows if value])


def resources(chosen: Settings, messages: Sequence[Any], headers: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a list of resources: a table whose last column may be cut, a JSON array, or the ids."""
    if chosen.output == "json":
        click.echo(json.dumps([proto_dict(each) for each in messages], ensure_ascii=False, indent=2))
    elif chosen.output == "id":
        for each in messages:
            click.echo(each.id)
    elif messages:
        table(headers, list(rows))
    else:
        click.echo("nothing here yet", err=True)


def facts(chosen: Settings, values: dict[str, Any]) -> None:
    """Prints names and values."""
    if chosen.output == "json":
        click.echo(json.dumps(values))
    else:
        pairs([(name, str(value)) for name, value in values.items()])


def pairs(rows: Sequence[tuple[str, str]], indent: str = "") -> None:
    """Prints labels and values in two columns."""
    wide = max((len(label) for label, _ in rows), default=0)
    for label, value in rows:
        first, *rest = clean(value).split("\n")
        click.echo(
            f"{indent}{colour(label.ljust(wide), dim=True)}  {_state_coloured(first) if label == 'state' else first}"
        )
        for line in rest:
            click.echo(f"{indent}{' ' * wide}  {line}")


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], indent: str = "") -> None:
    """Prints columns. On a terminal the last column is cut to the width."""
    cells = [[one_line(cell, 1000) for cell in row] for row in rows]
    widths = [max(_width(row[index]) for row in [list(headers), *cells]) for index in range(len(headers))]
    room = columns() - len(indent) - sum(widths[:-1]) - 2 * (len(widths) - 1) if sys.stdout.isatty() else 1000
    click.echo(indent + colour(_row(headers, widths, room), dim=True))
    for row in cells:
        line = indent + _row(row, widths, room)
        click.echo(_state_coloured(line) if sys.stdout.isatty() else line)


def error(chosen: Settings, failure: LuthierError) -> None:
    """Prints an error on stderr: a sentence, what violates what, and what to try."""
    if chosen.output == "json":
        described = [{"field": field, "description": text} for field, text in failure.violations]
        body = {
            "message": failure.message,
            "reason": failure.reason,
            "code": failure.code,
            "violations": described,
            "metadata": failure.metadata,
        }
        click.echo(json.dumps({"error": body}, ensure_ascii=False), err=True)
        return
    message, violations = failure.message, failure.violations
    if violations and message.startswith(f"{violations[0][0]}: "):
        # The message repeats the first violation.
        total = failure.findings if isinstance(failure, InvalidDataset) else len(violations)
        kind = "errors" if isinstance(failure, InvalidDataset) else "mistakes"
        message, violations = (f"{total:,} {kind}", violations) if total > 1 else (message, [])
    elif len(violations) == 1 and violations[0][0] == "file" and _same(violations[0][1], message):
        violations = []
    elif len(violations) == 1 and violations[0][1] == message:
        # The other way round: the message leaves out what the violation is about.
        subject = "" if violations[0][0] in message else f"{violations[0][0]}: "
        message, violations = subject + message, []
    click.echo(f"{colour('error:', 'red', bold=True, err=True)} {clean(message)}", err=True)
    for field, text in violations:
        click.echo("  " + clean(": ".join(part for part in (field, text) if part)), err=True)
    if isinstance(failure, InvalidDataset) and failure.findings > len(failure.violations):
        rest = [str(line) for line in failure.lines if f"line {line}" not in {field for field, _ in failure.violations}]
        more = f" (lines {', '.join(rest[:20])}{', ...' if len(rest) > 20 else ''})" if rest else ""
        click.echo(f"  and {failure.findings - len(failure.violations)} more{more}", err=True)
        click.echo("  `luthier dataset validate FILE --findings 1000` shows up to a thousand", err=True)
    if hint := failure.metadata.get("hint"):
        click.echo(f"{colour('hint:', 'yellow', err=True)} {clean(hint)}", err=True)


def _same(violation: str, message: str) -> bool:
    """Whether a violation says what the message does, but for a code in brackets; both may be cut short."""
    said = re.sub(r" \[[A-Z_]+\]$", "", violation)
    return said[:100] == message[:100]


def _state_coloured(line: str) -> str:
    for state, name in STATE_COLOURS.items():
        padded = f" {state} "
        if line == state:
            return colour(line, name)
        if padded in line:
            return line.replace(padded, f" {colour(state, name)} ", 1)
    return line


def _row(cells: Sequence[str], widths: Sequence[int], room: int) -> str:
    *head, last = cells
    padded = [cell + " " * (wide - _width(cell)) for cell, wide in zip(head, widths, strict=False)]
    return "  ".join([*padded, _cut(last, room) if _width(last) > room else last]).rstrip()


def _cut(text: str, limit: int) -> str:
    kept, used = "", 0
    for character in text:
        used += _width(character)
        if used > limit - 1:
            break
        kept += character
    return kept + ("…" if speaks_unicode() else "~") if limit > 0 else ""


def _width(text: str) -> int:
    """Columns of a text on a terminal."""
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in text
    )
