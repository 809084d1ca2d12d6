"""The options that say how rows become tokens, for every command that asks."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from luthier.v1.job_pb2 import JobSpec

C = TypeVar("C", bound=Callable[..., Any])

TRAIN_ON = ("assistant", "last-turn", "all-tokens")
OVERLONG = ("truncate", "drop", "split", "error")
TEMPLATES = ("chatml", "llama-3", "gemma", "mistral", "qwen")
_ENDINGS = (".jinja", ".jinja2", ".j2", ".txt")


class Name(click.Choice[str]):
    """A choice whose words may be joined by `_`, as job files do."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(super().convert(str(value).replace("_", "-"), param, ctx))


def tokenization_options(command: C) -> C:
    """Adds the options; the command gets `chat_template`, `train_on`, `response_template` and `overlong`."""
    options: Sequence[Callable[[C], C]] = (
        click.option(
            "--chat-template",
            metavar="NAME|FILE",
            help="A template that Luthier brings (chatml, llama-3, gemma, mistral, qwen), or a file with one.",
        ),
        click.option("--train-on", type=Name(TRAIN_ON), help="Which tokens are trained."),
        click.option("--response-template", metavar="TEXT", help="Train what follows this text, up to the turn's end."),
        click.option("--overlong", type=Name(OVERLONG), help="What happens to rows longer than the limit."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def tokenization_fields(
    chat_template: str | None, train_on: str | None, response_template: str | None, overlong: str | None
) -> dict[str, str]:
    """The fields that were given, as a job file has them. Raises OSError for a template that cannot be read, and
    click.BadParameter for one that does not exist."""
    given = {"train_on": train_on, "response_template": response_template, "overlong": overlong}
    fields = {name: value for name, value in given.items() if value is not None}
    if chat_template is not None:
        name, text = _template(chat_template)
        fields[name] = text
    return fields


def needs_base_model(tokenization: Mapping[str, str], more: Mapping[str, object]) -> None:
    """Refuses options about tokens where no base model says whose. Raises click.UsageError."""
    given = ["--chat-template" if name.startswith("chat_template") else _flag(name) for name in tokenization]
    given += [name for name, value in more.items() if value]
    if given:
        raise click.UsageError(f"{' and '.join(given)} need{'s' if len(given) == 1 else ''} --base-model")


def apply_tokenization(spec: "JobSpec", fields: dict[str, str]) -> None:
    """Sets the fields of a job, on top of what is there; a template takes the place of another one."""
    from luthier_client.dataset_requests import tokenization_of

    if not fields:
        return
    target = spec.fine_tune.tokenization
    if {"chat_template", "chat_template_name"} & fields.keys():
        target.ClearField("chat_template")
        target.ClearField("chat_template_name")
    made = tokenization_of(fields)
    if made is not None:
        target.MergeFrom(made)


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def _template(given: str) -> tuple[str, str]:
    if given.startswith("@"):
        return "chat_template", Path(given[1:]).read_text(encoding="utf-8")
    if "{%" in given or "{{" in given:
        return "chat_template", given
    if "/" in given or given.endswith(_ENDINGS):
        return "chat_template", Path(given).read_text(encoding="utf-8")
    if given not in TEMPLATES:
        import difflib

        near = difflib.get_close_matches(given, TEMPLATES, 1)
        how = f'did you mean "{near[0]}"?' if near else f"there are {', '.join(TEMPLATES)}; a file needs a / or .jinja"
        raise click.BadParameter(f'no template "{given}": {how}', param_hint="--chat-template")
    return "chat_template_name", given
