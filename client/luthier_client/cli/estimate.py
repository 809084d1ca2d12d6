"""What `luthier job create --dry-run` prints: what a job would take."""

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from luthier.v1.estimate_pb2 import JobEstimate, Room

_WIDE = 24


def print_estimate(estimate: "JobEstimate") -> None:
    """Prints the numbers, a bar for each kind of room, notes, and what would make the job fit."""
    from luthier_client.cli import output

    rows = [
        ("rows", _rows(estimate)),
        ("steps", f"{estimate.total_steps:,}"),
        ("tokens", _tokens(estimate)),
        ("device", _device(estimate)),
        ("memory", _room(estimate.device_memory)),
        ("host memory", _room(estimate.host_memory)),
        ("disk", _room(estimate.disk)),
        ("speed", _speed(estimate)),
        ("time", f"about {output.duration(estimate.seconds)}" if estimate.seconds else "unknown"),
        ("cost", f"{estimate.cost:,.2f} {estimate.currency}" if estimate.HasField("cost") else ""),
    ]
    output.pairs([(label, value) for label, value in rows if value])
    for note in estimate.notes:
        click.echo(output.colour(f"note: {output.clean(note)}", dim=True))
    if estimate.fits:
        click.echo(output.colour("it fits", "green") + "; nothing was created")
        return
    click.echo(output.colour("it does not fit", "red", bold=True))
    for remedy in estimate.remedies:
        click.echo(f"  {output.clean(remedy)}")


def _rows(estimate: "JobEstimate") -> str:
    validation = f", {estimate.validation_rows:,} to evaluate on" if estimate.validation_rows else ""
    return f"{estimate.training_rows:,}{validation}"


def _tokens(estimate: "JobEstimate") -> str:
    about = "" if estimate.counted_rows >= estimate.training_rows else "about "
    return (
        f"{about}{estimate.training_tokens:,}, {estimate.tokens_per_epoch:,} an epoch, of these"
        f" {estimate.trained_tokens_per_epoch:,} trained"
    )


def _device(estimate: "JobEstimate") -> str:
    twice = ", activations computed twice" if estimate.activation_checkpointing else ""
    return f"{estimate.device}, {estimate.dtype}, {estimate.micro_batch_tokens:,} tokens a micro-batch{twice}"


def _speed(estimate: "JobEstimate") -> str:
    from luthier.v1.estimate_pb2 import SpeedBasis

    if not estimate.tokens_per_second:
        return "unknown"
    basis = {
        SpeedBasis.SPEED_BASIS_FORMULA: "by the device's peak and a usual share of it",
        SpeedBasis.SPEED_BASIS_HISTORY: "by the device's peak and what an earlier job reached",
        SpeedBasis.SPEED_BASIS_PROBE: "measured in two steps",
    }.get(estimate.speed_basis, "")
    return f"{estimate.tokens_per_second:,.0f} tokens/s{f', {basis}' if basis else ''}"


def _room(room: "Room") -> str:
    from luthier_client.cli import output
    from luthier_client.cli.reports import bar

    if not room.total_bytes:
        return f"{output.size(room.needed_bytes)} needed" if room.needed_bytes else ""
    free = f", {output.size(room.free_bytes)} free now" if room.free_bytes else ""
    share = min(1.0, room.needed_bytes / room.total_bytes)
    filled = bar(share, _WIDE).ljust(_WIDE, "░" if output.speaks_unicode() else ".")
    return f"{filled}  {output.size(room.needed_bytes)} of {output.size(room.total_bytes)}{free}"
