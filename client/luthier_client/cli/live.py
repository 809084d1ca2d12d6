"""The live view of a job on a terminal: one block, drawn four times a second by rich."""

import os
from collections.abc import Iterator, Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.style import Style
from rich.table import Table
from rich.text import Text

from luthier.v1.event_pb2 import LearningRateFound
from luthier_client.cli import output, reports
from luthier_client.cli.lines import resumed
from luthier_client.cli.picture import JobPicture
from luthier_client.cli.proof import proof_line

_BARS = "▁▂▃▄▅▆▇█"
_ASCII_BARS = "_.-=*#"
_SPARK_WIDTH = 40
_AT_REST = ("queued", "preparing", "pausing", "paused", "cancelling")


class LiveView:
    """Draws a picture. What models and servers wrote is cleaned and never read as markup."""

    def __init__(self, picture: JobPicture) -> None:
        self._picture = picture
        # Asked now: while the view is live, stdout is rich's own and names no encoding.
        self._bars = _BARS if output.speaks_unicode() else _ASCII_BARS

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        for line in self._lines(width):
            if isinstance(line, Text):
                line.truncate(width, overflow="ellipsis")
                line.no_wrap = True
            yield line

    def _lines(self, width: int) -> Iterator[Text | Table]:
        picture = self._picture
        yield self._title(width)
        yield self._progress(width)
        if picture.proof is not None:
            style = "green" if picture.proof.passed else "red"
            yield Text(output.one_line(proof_line(picture.proof), 300), style=style)
        if picture.found_rate is not None:
            yield self._rate(picture.found_rate, width)
        if (step := picture.step) is not None:
            yield self._loss(width)
            numbers = [
                f"lr {step.learning_rate:.1e}",
                f"{step.tokens_per_second:,.0f} tokens/s",
                f"epoch {step.epoch:.2f}",
                f"{step.trained_tokens:,} tokens",
            ]
            yield _labelled("pace", " · ".join(numbers))
        if evaluations := picture.metrics.evaluations:
            last = evaluations[-1]
            text = f"{output.number(last.loss)} at step {last.step} · accuracy {last.token_accuracy:.1%}"
            if len(evaluations) > 1:
                text += f" · before {output.number(evaluations[0].loss)}"
            yield _labelled("eval", text)
        if picture.checked is not None:
            yield _labelled("data", reports.token_line(picture.checked.training))
            for sentence in reports.telling(picture.checked, 2):
                yield Text(f"! {sentence}", style="yellow")
        if picture.resumed is not None:
            verified = picture.resumed.verified
            yield Text(output.one_line(resumed(picture.resumed), 300), style="green" if verified else "yellow")
        if picture.state_name == "queued" and picture.retry_at and picture.message:
            yield Text("! " + output.one_line(picture.message, 300), style="yellow")
        if picture.warning:
            yield Text("! " + output.one_line(picture.warning, 300), style="yellow")
        if picture.notice:
            yield Text(output.one_line(picture.notice, 300), style="bold yellow")
        yield Text("Ctrl-C detaches; the job goes on", style="dim")

    def _title(self, width: int) -> Text:
        picture = self._picture
        style = Style(color=output.STATE_COLOURS.get(picture.state_name), bold=True)
        state = Text.assemble((picture.state_name, style))
        if picture.attempt > 1:
            state.append(f" · attempt {picture.attempt}", style="dim")
        if seconds := picture.seconds():
            state.append(f" · {output.duration(seconds)}", style="dim")
        name = Text.assemble((output.one_line(picture.name, 60), "bold"))
        base = picture.job.spec.fine_tune.base_model
        if base and width >= 60:
            name.append(f"  {output.one_line(base, 40)}", style="dim")
        name.truncate(max(1, width - state.cell_len - 2), overflow="ellipsis")
        gap = max(2, width - name.cell_len - state.cell_len)
        return Text.assemble(name, " " * gap, state)

    def _progress(self, width: int) -> Text | Table:
        picture = self._picture
        total, step = picture.total_steps, picture.step
        if step is not None and picture.phase is None and picture.state_name in _AT_REST:
            return Text(f"step {step.step}/{total} · {picture.activity()}")
        if not total or picture.phase is not None or (step is None and picture.state_name != "running"):
            if picture.phase is None or not picture.phase.total:
                return Text(picture.activity())
            return _bar(picture.phase.completed, picture.phase.total, picture.activity(), width)
        done = step.step if step is not None else 0
        text = f"step {done}/{total} · {done / total:.0%}"
        if (eta := picture.eta()) is not None:
            text += f" · ETA {output.duration(eta)}"
        return _bar(done, total, text, width)

    def _rate(self, found: LearningRateFound, width: int) -> Text:
        """The rate that was found, and the range test's losses over its rates; what exploded is cut off."""
        text = _labelled("rate", f"{found.learning_rate:.2e}")
        room = min(_SPARK_WIDTH, width - 36)
        if len(found.losses) > 1 and room >= 4:
            first, lowest = found.losses[0], min(found.losses)
            bars = sparkline([min(loss, 2 * first - lowest) for loss in found.losses], room, self._bars)
            text.append(f" {found.rates[0]:.0e} ", style="dim")
            text.append(bars, style="cyan")
            text.append(f" {found.rates[-1]:.0e}", style="dim")
        return text

    def _loss(self, width: int) -> Text:
        steps = self._picture.metrics.steps
        text = _labelled("loss", output.number(steps[-1].loss))
        room = min(_SPARK_WIDTH, width - 30)
        if len(steps) > 1 and room >= 4:
            text.append(f" {sparkline([row.loss for row in steps], room, self._bars)}", style="cyan")
            text.append(f" from {output.number(steps[0].loss)}", style="dim")
        return text


def sparkline(values: Sequence[float], width: int, bars: str = _BARS) -> str:
    """Values as bars in at most `width` columns (each the mean of its share); infinite ones are left out."""
    finite = [value for value in values if abs(value) < float("inf")]
    if not finite:
        return ""
    columns = min(width, len(finite))
    shares = [finite[len(finite) * index // columns : len(finite) * (index + 1) // columns] for index in range(columns)]
    means = [sum(share) / len(share) for share in shares]
    low, high = min(means), max(means)
    top = len(bars) - 1
    return "".join(bars[round((mean - low) / (high - low) * top) if high > low else 0] for mean in means)


def live(picture: JobPicture) -> Live:
    """The live display of a picture; it vanishes at the end, where the closing card takes its place."""
    console = Console(no_color=bool(os.environ.get("NO_COLOR")) or None, highlight=False)
    return Live(LiveView(picture), console=console, refresh_per_second=4, transient=True, vertical_overflow="crop")


def _labelled(label: str, text: str) -> Text:
    return Text.assemble((f"{label} ", "dim"), text)


def _bar(done: float, total: float, text: str, width: int) -> Table:
    room = width - len(text) - 2
    grid = Table.grid(padding=(0, 2, 0, 0))
    label = Text(text, overflow="ellipsis", no_wrap=True)
    if room < 8:
        grid.add_row(label)
    else:
        bar = ProgressBar(total, min(done, total), min(40, room), complete_style="cyan", finished_style="green")
        grid.add_row(bar, label)
    return grid
