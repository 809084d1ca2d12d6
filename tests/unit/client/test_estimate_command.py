"""What `luthier job create --dry-run` shows of an estimate."""

from pathlib import Path

import pytest
from unit.client.command import run

from luthier.v1.estimate_pb2 import SPEED_BASIS_HISTORY, JobEstimate, Room
from luthier_client.cli.estimate import print_estimate

GIB = 2**30


def estimate(**more: object) -> JobEstimate:
    fields = {
        "training_rows": 1000,
        "validation_rows": 50,
        "total_steps": 190,
        "tokens_per_epoch": 60_000,
        "trained_tokens_per_epoch": 20_000,
        "training_tokens": 180_000,
        "counted_rows": 1000,
        "device": "cuda:0",
        "dtype": "bfloat16",
        "micro_batch_tokens": 4096,
        "device_memory": Room(needed_bytes=12 * GIB, total_bytes=24 * GIB, free_bytes=20 * GIB),
        "host_memory": Room(needed_bytes=GIB),
        "disk": Room(needed_bytes=GIB, total_bytes=100 * GIB, free_bytes=50 * GIB),
        "tokens_per_second": 900,
        "speed_basis": SPEED_BASIS_HISTORY,
        "seconds": 250,
        "cost": 1.256,
        "currency": "EUR",
        "fits": True,
    } | more
    return JobEstimate(**fields)  # type: ignore[arg-type]


def test_numbers_bars_time_and_cost_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    print_estimate(estimate())
    shown = capsys.readouterr().out
    for words in (
        "1,000, 50 to evaluate on",
        "190",
        "180,000, 60,000 an epoch, of these 20,000 trained",
        "cuda:0, bfloat16, 4,096 tokens a micro-batch",
        "12.0 GiB of 24.0 GiB, 20.0 GiB free now",
        "1.0 GiB needed",
        "900 tokens/s, by the device's peak and what an earlier job reached",
        "about 4m 10s",
        "1.26 EUR",
        "it fits; nothing was created",
    ):
        assert words in shown
    [memory] = [line for line in shown.splitlines() if line.startswith("memory")]
    assert memory.count("█") == memory.count("░") == 12


def test_a_sample_is_told_and_so_is_what_would_make_the_job_fit(capsys: pytest.CaptureFixture[str]) -> None:
    told = estimate(counted_rows=900, fits=False, remedies=["Lower max_length to 512."], notes=["a \x1b[31mnote"])
    told.ClearField("cost")
    told.device_memory.needed_bytes = 48 * GIB
    told.activation_checkpointing = True
    print_estimate(told)
    shown = capsys.readouterr().out
    assert "about 180,000" in shown
    assert "activations computed twice" in shown
    assert "it does not fit\n  Lower max_length to 512.\n" in shown
    assert "cost" not in shown
    assert "\x1b" not in shown


def test_a_dry_run_goes_with_nothing_that_creates(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("fine_tune: {base_model: builtin/tiny, training_dataset: rows}\n")
    for flags in (["--probe"], ["--dry-run", "--watch"], ["--dry-run", "--validate-only"]):
        refused = run("job", "create", "-f", str(file), *flags, endpoint="127.0.0.1:1")
        assert refused.returncode == 2
        assert "--dry-run" in refused.stderr
