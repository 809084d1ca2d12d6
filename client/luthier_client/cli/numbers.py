"""The options for the hyperparameters that the server can decide, for `job create` and `train`."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

C = TypeVar("C", bound=Callable[..., Any])


def number_options(command: C) -> C:
    """Adds the options; the command gets `epochs`, `batch_size`, `learning_rate` and `find_lr`."""
    options: tuple[Callable[[C], C], ...] = (
        click.option("--epochs", metavar="NUMBER|auto", help="Passes over the rows."),
        click.option("--batch-size", metavar="NUMBER|auto", help="Examples per optimizer step."),
        click.option("--learning-rate", metavar="NUMBER|auto", help="Peak learning rate; auto: by the server's rule."),
        click.option("--find-lr", is_flag=True, help="Find the learning rate by a range test before the first step."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def number_settings(numbers: Mapping[str, str | None], find_lr: bool) -> list[str]:
    """What was given, as `--set` takes it. Raises click.UsageError for a rate that is given and to be found."""
    if find_lr and numbers.get("learning_rate") is not None:
        raise click.UsageError("give --learning-rate or --find-lr, not both")
    given = [f"{name}={value}" for name, value in numbers.items() if value is not None]
    return [*given, "find_learning_rate=true"] if find_lr else given
