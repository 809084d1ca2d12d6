"""Hyperparameters that are not given: how they are asked for, and how a found rate is shown."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from luthier.v1 import event_pb2 as ev
from luthier.v1.job_pb2 import AutoHyperparameter, Job, JobSpec
from luthier_client.cli.lines import describe
from luthier_client.cli.live import LiveView
from luthier_client.cli.main import cli
from luthier_client.cli.picture import JobPicture
from luthier_client.errors import SpecFileError
from luthier_client.spec import apply_settings, parse_spec, spec_fields

EPOCHS = AutoHyperparameter.AUTO_HYPERPARAMETER_EPOCHS
BATCH = AutoHyperparameter.AUTO_HYPERPARAMETER_BATCH_SIZE
RATE = AutoHyperparameter.AUTO_HYPERPARAMETER_LEARNING_RATE
FOUND = ev.LearningRateFound(
    learning_rate=8.19e-4,
    rates=[1e-5, 1e-4, 1e-3, 1e-2, 1e-1],
    losses=[5.0, 4.5, 3.0, 2.0, 40.0],
    rule="a tenth of 8.19e-03, where the smoothed loss is lowest",
)


def numbers(text: str, *settings: str) -> Any:
    spec = parse_spec(text)
    apply_settings(spec, settings)
    return spec.fine_tune.hyperparameters


def test_a_job_file_may_say_auto_for_a_number_and_is_written_out_by_name() -> None:
    text = "fine_tune: {hyperparameters: {epochs: auto, batch_size: auto, learning_rate: auto}}"
    found = numbers(text)
    assert list(found.auto) == [EPOCHS, BATCH, RATE]
    assert spec_fields(found) == {"auto": ["epochs", "batch_size", "learning_rate"]}
    assert numbers("fine_tune: {hyperparameters: {auto: [epochs, batch_size, learning_rate]}}") == found


@pytest.mark.parametrize("field", ["weight_decay", "max_steps", "seed"])
def test_other_numbers_are_not_decided_by_rules(field: str) -> None:
    with pytest.raises(SpecFileError, match="'auto' is not a"):
        parse_spec(f"fine_tune: {{hyperparameters: {{{field}: auto}}}}")
    with pytest.raises(SpecFileError, match="'auto' is not a"):
        apply_settings(JobSpec(), [f"{field}=auto"])


def test_what_is_set_on_top_takes_the_place_of_what_the_file_says() -> None:
    given = "fine_tune: {hyperparameters: {epochs: 2, batch_size: 8, learning_rate: 1e-4}}"
    found = numbers(given, "epochs=auto", "learning_rate=auto")
    assert (list(found.auto), found.batch_size) == ([EPOCHS, RATE], 8)
    assert not found.HasField("epochs") and not found.HasField("learning_rate")
    found = numbers(given, "find_learning_rate=true")
    assert found.find_learning_rate and not found.HasField("learning_rate")
    decided = "fine_tune: {hyperparameters: {epochs: auto, learning_rate: auto}}"
    found = numbers(decided, "epochs=5")
    assert (list(found.auto), found.epochs) == ([RATE], 5)
    found = numbers(decided, "find_learning_rate=true")
    assert (list(found.auto), found.find_learning_rate) == ([EPOCHS], True)
    found = numbers("fine_tune: {hyperparameters: {find_learning_rate: true}}", "learning_rate=1e-3")
    assert (found.learning_rate, found.HasField("find_learning_rate")) == (1e-3, False)


def test_the_commands_take_auto_and_find_lr_and_refuse_both_at_once(tmp_path: Path) -> None:
    for command in (["job", "create"], ["train"]):
        text = CliRunner().invoke(cli, [*command, "--help"]).output
        assert "--find-lr" in text
        assert "--learning-rate NUMBER|auto" in text
    job = tmp_path / "job.yaml"
    job.write_text("fine_tune: {base_model: builtin/tiny, training_dataset: cards}")
    refused = CliRunner().invoke(cli, ["job", "create", "-f", str(job), "--find-lr", "--learning-rate", "1e-4"])
    assert refused.exit_code == 2
    assert "give --learning-rate or --find-lr, not both" in refused.output


def shown(picture: JobPicture) -> list[str]:
    console = Console(width=100, force_terminal=False)
    with console.capture() as capture:
        console.print(LiveView(picture))
    return capture.get().splitlines()


def test_a_found_rate_is_a_line_with_its_rule_and_in_the_live_view_a_curve() -> None:
    picture = JobPicture(Job(id="job_1"))
    searching = ev.PhaseProgressed(phase=ev.PHASE_FINDING_LEARNING_RATE, completed=3, total=48, unit="passes")
    event = ev.JobEvent(sequence=1, phase_progressed=searching)
    picture.add(event)
    assert picture.activity() == "finding learning rate 3/48 passes"
    assert describe(event, picture) == "finding learning rate 3/48 passes"
    event = ev.JobEvent(sequence=2, learning_rate_found=FOUND)
    picture.add(event)
    assert picture.phase is None
    assert describe(event, picture) == (
        "learning rate  8.19e-04: a tenth of 8.19e-03, where the smoothed loss is lowest"
    )
    (line,) = [each for each in shown(picture) if each.startswith("rate ")]
    assert line.rstrip() in ("rate 8.19e-04 1e-05 ▆▅▃▁█ 1e-01", "rate 8.19e-04 1e-05 .=-_# 1e-01") or "▁" in line


def test_a_rate_without_a_curve_is_shown_alone() -> None:
    picture = JobPicture(Job(id="job_1"))
    picture.add(ev.JobEvent(sequence=1, learning_rate_found=ev.LearningRateFound(learning_rate=2e-4)))
    assert [each.rstrip() for each in shown(picture) if each.startswith("rate ")] == ["rate 2.00e-04"]
