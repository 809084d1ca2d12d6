"""What is said when a watch ends: how it went, what came out, what to do next."""

import json

import click

from luthier_client.cli import output, reports
from luthier_client.cli.picture import JobPicture
from luthier_client.cli.proof import print_proof

_MARKS = {"succeeded": ("✓", "+"), "failed": ("✗", "x"), "cancelled": ("■", "-")}
_LOG_LINES = 10


def closing_card(picture: JobPicture) -> None:
    """Prints the card of a job that has ended."""
    state = picture.state_name
    mark = _MARKS.get(state, ("·", "-"))[0 if output.speaks_unicode() else 1]
    title = output.colour(f"{mark} {state}", output.STATE_COLOURS.get(state), bold=True)
    name = output.one_line(picture.exports or picture.job.spec.display_name, 60)
    click.echo(f"{title}  {picture.job.id}" + (f"  {name}" if name else ""))
    output.pairs(_rows(picture), indent="  ")
    _samples(picture)
    if picture.proof is not None:
        click.echo()
        print_proof(picture.proof, indent="  ")
    if picture.error is not None:
        _failure(picture)


def next_commands(picture: JobPicture) -> None:
    """Prints what can be done with the model, with a snippet of Python that loads it."""
    if picture.export_id:
        _next_of_export(picture)
    if not picture.model_id or picture.exports:
        return
    task = picture.job.spec.fine_tune
    directory = task.suffix or picture.model_id
    click.echo()
    click.echo(output.colour("next", bold=True))
    click.echo(f"  luthier model download {picture.model_id} --to {directory}")
    click.echo()
    for line in loading_snippet(output.clean(task.base_model), directory, full=task.HasField("full")):
        click.echo(f"  {line}" if line else "")


def _next_of_export(picture: JobPicture) -> None:
    """What can be done with an export."""
    asked = picture.job.spec.export
    click.echo()
    click.echo(output.colour("next", bold=True))
    click.echo(f"  luthier export download {picture.export_id}")
    if asked.HasField("gguf") and not asked.gguf.adapter_only:
        click.echo(f"  ollama create my-model -f {picture.export_id}/Modelfile")


def loading_snippet(base: str, directory: str, *, full: bool) -> list[str]:
    """Lines of Python that load a downloaded model."""
    if full:
        return [
            "from transformers import AutoModelForCausalLM",
            f"model = AutoModelForCausalLM.from_pretrained({_quoted(directory)})",
        ]
    imports = ["from peft import PeftModel", "from transformers import AutoModelForCausalLM"]
    source = _quoted(base)
    if base.startswith("builtin/"):
        imports.insert(0, "from importlib.resources import files")
        source = f'files("luthier_trainer") / {source}'
    elif base.startswith("model_"):
        source = f'"BASE"  # what {base} was made from'
    return [
        *imports,
        f"base = {source}",
        "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), " + f"{_quoted(directory)})",
    ]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _rows(picture: JobPicture) -> list[tuple[str, str]]:
    arrow = "→" if output.speaks_unicode() else "->"
    rows = [("model", picture.model_id)] if picture.model_id else []
    if picture.exports:
        rows = [("export", picture.export_id), ("copy", picture.job.spec.export.destination.uri)]
    steps, evaluations = picture.metrics.steps, picture.metrics.evaluations
    if steps:
        last = steps[-1]
        done = f"{last.step} steps" if last.step == last.total_steps else f"{last.step} of {last.total_steps} steps"
        rows.append(("loss", f"{output.number(steps[0].loss)} {arrow} {output.number(last.loss)}  ({done})"))
    if len(evaluations) > 1:
        first, final = evaluations[0], evaluations[-1]
        rows.append(
            (
                "eval loss",
                f"{output.number(first.loss)} {arrow} {output.number(final.loss)}  "
                f"(accuracy {first.token_accuracy:.1%} {arrow} {final.token_accuracy:.1%})",
            )
        )
    if picture.found_rate is not None:
        rows.append(("rate", f"{picture.found_rate.learning_rate:.2e}, found by a range test"))
    if seconds := picture.seconds():
        attempts = f", {picture.attempt} attempts" if picture.attempt > 1 else ""
        rows.append(("time", output.duration(seconds) + attempts))
    if picture.checked is not None:
        rows.append(("data", reports.token_line(picture.checked.training)))
    if steps:
        rows.append(("tokens", f"{steps[-1].trained_tokens:,}"))
    if (check := picture.resumed) is not None:
        rows.append(("resumed", f"at step {check.step}, " + ("verified" if check.verified else "NOT verified")))
    return [(label, value) for label, value in rows if value]


def _samples(picture: JobPicture) -> None:
    if not picture.samples:
        return
    room = max(20, output.columns() - 12)
    first, last = picture.samples[min(picture.samples)], list(picture.samples.values())[-1]
    for index, sample in enumerate(last.samples[:3]):
        rows = [("prompt", output.one_line(sample.prompt, room))]
        if first is not last and index < len(first.samples):
            rows.append(("before", output.one_line(first.samples[index].completion, room)))
        rows.append(("after", output.one_line(sample.completion, room)))
        click.echo()
        output.pairs(rows, indent="  ")


def _failure(picture: JobPicture) -> None:
    error = picture.error
    assert error is not None
    click.echo()
    click.echo(f"  {output.colour(error.reason or 'FAILED', 'red', bold=True)}  {output.clean(error.message)}")
    if error.hint:
        click.echo(f"  {output.colour('hint:', 'yellow')} {output.clean(error.hint)}")
    if error.log_lines:
        click.echo(output.colour("  the trainer's last lines:", dim=True))
        for line in error.log_lines[-_LOG_LINES:]:
            click.echo(f"    {output.one_line(line, 500)}")
