"""The parts of the benchmarks that can be checked in seconds: that what they count is what is there."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import choose_peer, datasets_check, datasets_rows, machine, report
from benchmarks.aims import Aim
from benchmarks.engine import peer, workload
from benchmarks.engine.contestant import EXAMPLES_PER_STEP, Contestant
from benchmarks.engine.flops import training_flops
from benchmarks.load.bare import read_events, write_events
from benchmarks.load.watchers import _lags
from benchmarks.numbers import quantile
from luthier.trainer.v1.task_pb2 import DatasetSource
from luthier.v1.event_pb2 import JobEvent
from luthier.v1.fine_tuning_pb2 import WatchJobResponse


def test_the_rows_are_the_same_on_every_machine() -> None:
    rows = workload.chats()
    assert len(rows) == workload.CHATS
    assert sum(row.tokens for row in rows) == 149_672
    assert max(row.tokens for row in rows) == workload.MAX_LENGTH


def test_a_pass_has_lengths_spread_like_all_rows() -> None:
    everything, some = workload.chats(), workload.sample(40)
    assert len(set(some)) == 40

    def mean(rows: list[workload.Chat]) -> float:
        return sum(row.tokens for row in rows) / len(rows)

    assert mean(some) == pytest.approx(mean(everything), rel=0.1)
    assert training_flops(some) / sum(row.tokens for row in some) == pytest.approx(
        training_flops(everything) / sum(row.tokens for row in everything), rel=0.05
    )


def test_the_engine_counts_the_tokens_that_the_benchmark_counts(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from luthier_trainer.console import SilentReporter
    from luthier_trainer.data.masks.masking import Masking
    from luthier_trainer.data.masks.template import template_of
    from luthier_trainer.data.tokens import tokenised
    from luthier_trainer.data.tokens.options import Options
    from luthier_trainer.data.tokens.overlong import Overlong

    workload.write_model(tmp_path / "model")
    rows = workload.sample(8)
    workload.write_rows(tmp_path / "rows.jsonl", rows)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    found = tokenised.load(
        DatasetSource(path=str(tmp_path / "rows.jsonl"), rows=8),
        tokenizer,
        template_of(tokenizer),
        Options(workload.MAX_LENGTH, Overlong.TRUNCATE, Masking()),
        cache_dir=tmp_path / "cache",
        reporter=SilentReporter(),
    )
    assert found.lengths.tolist() == [row.tokens for row in rows]
    assert found.scored.tolist() == [row.scored for row in rows]


def test_operations_are_those_of_the_formula_for_a_row_by_hand() -> None:
    row = workload.Chat((), tokens=10, scored=4)
    linear = 8 * (4 * 512 * 512 + 3 * 512 * 1280)
    adapters = 8 * 16 * (4 * 1024 + 3 * 1792)
    attention = 12 * 8 * 512 * 55
    assert training_flops([row]) == 10 * (4 * linear + 6 * adapters) + 4 * 4 * 512 * 8192 + attention


def test_the_pinned_peers_were_candidates_and_step_like_luthier() -> None:
    tried = choose_peer.candidates()
    assert len(tried) == len(set(tried))
    for each in (*peer.FLOAT32, *peer.BFLOAT16, *peer.FOR_INFORMATION):
        assert each in tried
    for each in tried:
        if each.strategy != "packing":
            assert each.batch * each.accumulation == EXAMPLES_PER_STEP
    assert Contestant("trl", "float32", "packing", 2).accumulation == 2


def test_a_quantile_is_a_sample_and_never_below_its_share() -> None:
    assert quantile([3, 1, 2], 0.5) == 2
    assert quantile(range(1, 101), 0.99) == 99
    assert quantile([5], 0.01) == 5
    with pytest.raises(ValueError, match="no samples"):
        quantile([], 0.5)


def test_the_bare_server_reads_the_bytes_that_were_written(tmp_path: Path) -> None:
    payloads = [b"", b"a", b"x" * 70_000]
    write_events(tmp_path / "events", payloads)
    assert read_events(tmp_path / "events") == payloads


def test_a_lag_counts_from_the_events_own_time_and_a_lost_delivery_is_seen() -> None:
    def message(*made: tuple[int, float]) -> bytes:
        events = [JobEvent(sequence=sequence) for sequence, _ in made]
        for event, (_, seconds) in zip(events, made, strict=True):
            event.event_time.FromNanoseconds(int(seconds * 1e9))
        return WatchJobResponse(events=events).SerializeToString()

    early, both, late = message((1, 9.0)), message((2, 10.0), (3, 10.5)), message((4, 12.5))
    logs = [[(9.1, early), (10.6, both), (12.6, late)], [(10.7, both)], [(10.1, message((2, 10.0)))]]
    found = _lags(logs, {body: body for log in logs for _, body in log}, 10.0, 12.0)
    assert found["events"] == 2
    assert found["deliveries"] == 5
    assert found["missing_deliveries"] == 1
    assert found["report_to_receipt_ms"]["most"] == pytest.approx(700)
    assert found["first_to_receipt_ms"]["most"] == pytest.approx(600)


@pytest.mark.parametrize(
    ("value", "better", "met"), [(1.2, "higher", True), (1.19, "higher", False), (2, "lower", False)]
)
def test_an_aim_is_met_on_its_own_side_only(value: float, better: Any, met: bool) -> None:
    assert Aim("key", "text", value, 1.2, better).met is met


def test_a_machine_is_described_without_its_name_or_paths() -> None:
    described = machine.describe()
    assert set(described) == {
        *("cpu", "cpu_family_model", "cores", "memory_gib", "flags", "kernel"),
        *("python", "libraries", "commit", "uncommitted_changes"),
    }
    assert described["cores"] >= 1
    assert described["libraries"]["grpcio"] != "not installed"
    assert machine.slug(described | {"cpu": "AMD EPYC 9554 64-Core Processor", "cores": 2}) == "epyc-2core"


def test_a_missed_aim_is_told_as_missed_on_the_page() -> None:
    result: dict[str, Any] = {
        "date": "2026-01-01",
        "seconds": 1,
        "machine": machine.describe(),
        "load_before": [0.0],
        "load_after": [0.0],
        "aims": [Aim("server_start", "exec to SERVING", 2.0, 1.0, "lower", "s").to_json()],
        "latency": {"warm_seconds": [1.0, 2.0], "cold_seconds": [3.0]},
    }
    text = report.page(result, "x.json")
    assert "| exec to SERVING | 2.00 s | at most 1 | **no** |" in text
    assert "What falls short" in text
    assert "1.50 s" in text


def test_the_chats_that_are_checked_are_the_same_everywhere_and_all_sound(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    size = datasets_rows.write(path, 500)
    assert size == path.stat().st_size
    assert 800 < size / 500 < 1300
    assert hashlib.sha256(path.read_bytes()).hexdigest()[:16] == "9eab5a445200f9b2"
    found = datasets_check.check(path, tmp_path)
    assert found["rows"] == 500
    assert found["peak_private_mb"] > 5
    path.write_bytes(path.read_bytes() + b"{\n")
    with pytest.raises(RuntimeError, match="NOT_JSON"):
        datasets_check.check(path, tmp_path)


def test_the_page_has_the_largest_datasets_that_were_measured(tmp_path: Path) -> None:
    def measured(rows: int) -> dict[str, Any]:
        return {
            "date": f"2026-01-{rows:02}T00:00:00",
            "machine": machine.describe(),
            "datasets": {"rows": rows},
            "aims": [Aim("datasets_check_speed", f"{rows} rows", rows, 20, "higher", "MB/s").to_json()],
        }

    (tmp_path / "small.json").write_text(json.dumps(measured(1)))
    (tmp_path / "large.json").write_text(json.dumps(measured(9)))
    result = {"aims": [Aim("server_start", "exec to SERVING", 1, 1, "lower", "s").to_json()], "datasets": {"rows": 2}}
    found = report.with_large(result, tmp_path)
    assert found["datasets"]["rows"] == 9
    assert [each["text"] for each in found["aims"]] == ["exec to SERVING", "9 rows"]
    assert report.with_large(measured(10), tmp_path) == measured(10)
