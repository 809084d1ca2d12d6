"""The parts of the benchmarks that can be checked in seconds: that what they count is what is there."""

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import choose_peer, datasets_check, datasets_rows, machine, report, report_engine
from benchmarks.aims import Aim
from benchmarks.cuda import cells, models, rows, side
from benchmarks.cuda import section as cuda_section
from benchmarks.cuda.shapes import SHAPES
from benchmarks.engine import luthier_side, memory, peer, points, points_section, section, standings, workload
from benchmarks.engine.contestant import EXAMPLES_PER_STEP, Contestant
from benchmarks.engine.field import CannotRun
from benchmarks.engine.flops import training_flops
from benchmarks.engine.passes import Pass, Products, Stopwatch
from benchmarks.load.bare import read_events, write_events
from benchmarks.load.watchers import _lags
from benchmarks.numbers import quantile
from luthier.trainer.v1.task_pb2 import DatasetSource
from luthier.v1.event_pb2 import JobEvent
from luthier.v1.fine_tuning_pb2 import WatchJobResponse
from luthier.v1.job_pb2 import DTYPE_FLOAT32
from luthier_trainer import plan, sft
from luthier_trainer.control import NoControl


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with the benchmark's tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    shape = replace(SHAPES["tiny"], vocabulary=workload.VOCABULARY)
    models.write_description(folder, shape, workload.MAX_LENGTH)
    LlamaForCausalLM(models.config(shape, workload.MAX_LENGTH)).save_pretrained(folder)
    return folder


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


def _pass(seconds: float, *, peak: int = 0, others: float = 0.0, cpu: float = 0.0) -> Pass:
    return Pass(seconds, cpu or 2 * seconds, others, 1000, 600, 1, 9.0, "bfloat16", peak, 100 if peak else 0)


def test_peak_memory_is_what_a_pass_takes_and_gives_back() -> None:
    memory.settle()
    memory.forget_peak()
    before = memory.resident()
    taken = bytearray(b"x") * 2**26
    held = memory.resident()
    del taken
    assert held - before == pytest.approx(2**26, rel=0.1)
    assert memory.peak() - before == pytest.approx(2**26, rel=0.1)
    assert memory.resident() - before < 2**25
    assert _pass(1.0, peak=700).peak_bytes == 600
    assert _pass(1.0).peak_bytes == 0


def test_who_is_much_slower_after_the_first_round_does_not_go_on() -> None:
    seconds = {1: 1.0, 2: 1.05, 4: 1.09, 8: 1.5}
    entries = [
        standings.Entry(Contestant("trl", "float32", "default", batch), {1: _pass(seconds[batch])}) for batch in seconds
    ]
    entries.append(standings.Entry(Contestant("trl", "float32", "packing", 1), problem="it died"))
    assert [each.contestant.batch for each in standings.going_on(entries, 2)] == [1, 2]
    assert [each.contestant.batch for each in standings.going_on(entries, 9)] == [1, 2, 4]
    assert standings.going_on(entries[4:], 2) == []


def test_luthier_is_compared_with_the_best_of_those_who_ran_every_round() -> None:
    ours = standings.Entry(section.AUTO, {n: _pass(1.0, peak=600) for n in (1, 2, 3)})
    lucky = standings.Entry(peer.FLOAT32[0], {1: _pass(1.5, peak=200)})
    slow = standings.Entry(peer.FLOAT32[1], {n: _pass(3.0, peak=300) for n in (1, 2, 3)})
    best = standings.Entry(peer.BFLOAT16[0], {n: _pass(2.0, peak=1100) for n in (1, 2, 3)})
    found = standings.against(ours, [lucky, slow, best], "auto")
    assert found is not None
    assert found["peer"] == peer.BFLOAT16[0].name
    assert (found["ratio"], found["ratio_cpu_time"], found["quiet"]) == (2.0, 2.0, True)
    assert found["peak_mib"] == [0.0, 0.0]
    assert standings.against(ours, [], "auto") is None


def test_no_peer_is_tried_in_bfloat16_where_its_products_are_slow() -> None:
    fast, slow = section._groups(2.0, quick=False), section._groups(0.3, quick=False)
    assert {each.contestant.dtype for each in slow.everybody} == {"float32", "auto"}
    assert [each.contestant for each in fast.auto] == [section.AUTO, *peer.BFLOAT16]
    assert len({each.contestant.name for each in fast.everybody}) == len(fast.everybody)


def test_what_a_switch_replaces_is_back_when_it_ends() -> None:
    assert len({each.key for each in points.POINTS}) == len(points.POINTS)
    before = dict(vars(plan))
    with points.switched_off("dtype"):
        assert vars(plan)["bfloat16_gain"](64, 64) == 1.0
    assert vars(plan) == before
    with pytest.raises(AttributeError), points.replaced("luthier_trainer.plan", "no_such_thing", lambda _: None):
        pass


def test_without_a_point_the_engine_trains_the_same_tokens_to_the_same_loss(small_model: Path, tmp_path: Path) -> None:
    chats = workload.sample(8)[:3]
    workload.write_rows(tmp_path / "rows.jsonl", chats)

    def loss(without: str) -> float:
        out = tmp_path / "out" / (without or "as it is")
        asked = luthier_side.task(small_model, tmp_path / "rows.jsonl", 3, out, dtype=DTYPE_FLOAT32)
        clock = luthier_side.PlanClock(Stopwatch())
        with points.switched_off(without):
            sft.train(asked, clock, NoControl())
        assert clock.tokens == sum(each.tokens for each in chats)
        return clock.losses[0]

    expected = loss("")
    for point in points.POINTS:
        if point.key not in ("no-sync", "no-compile"):  # they need a GPU, or a minute
            assert loss(point.key) == pytest.approx(expected, rel=1e-5), point.key


def test_a_points_ratio_is_the_median_of_its_pairs() -> None:
    pairs = [(_pass(1.0, peak=2**20 + 100), _pass(seconds, peak=2**21 + 100)) for seconds in (2.0, 3.0, 9.0)]
    found = points_section.compared(pairs)
    assert found["ratio"] == 3.0
    assert found["peak_mib"] == [1.0, 2.0]
    assert found["ratio_rounds"] == [2.0, 3.0, 9.0]


def test_the_shapes_have_the_weights_of_their_namesakes() -> None:
    assert SHAPES["1B"].parameters == 1_235_814_400
    assert SHAPES["8B"].parameters == 8_030_261_248
    operations = SHAPES["8B"].operations
    assert operations.per_token + operations.per_scored == pytest.approx(4 * (8.03e9 - 0.525e9) + 6 * 41.9e6, rel=0.01)


def test_a_cells_steps_have_their_tokens_for_every_setting() -> None:
    every = cells.cells()
    assert len({each.name for each in every}) == len(every)
    for cell in every:
        for setting in cells.settings(cell, flash=True):
            if not setting.packing:
                assert setting.batch * cells.accumulation(cell, setting) == cell.rows_per_step
    full = cells.Cell("tiny", "lora", 128, step_tokens=512)
    assert [each.tokens for each in rows.rows(full, 2, 512)] == [128] * 8
    chats = rows.rows(cells.Cell("tiny", "lora", 128, "chats", 512), 1, 512)
    assert len(chats) == 16
    assert max(each.tokens for each in chats) <= 128


def test_a_cell_is_measured_on_a_model_that_was_never_saved() -> None:
    found = side.measure("luthier", cells.Cell("tiny", "lora", 64, step_tokens=128), torch.device("cpu"))
    assert found["problem"] == ""
    assert found["tokens"] == 64 * 2 * cells.STEPS
    assert found["steps"] == cells.STEPS
    assert found["tokens_per_second"] > 0
    failed = side.measure("no such engine", cells.Cell("tiny", "lora", 64, step_tokens=128), torch.device("cpu"))
    assert "unsloth" in failed["problem"]


def test_the_speed_on_cuda_is_an_aim_on_the_device_it_was_set_for() -> None:
    def measured(tokens_per_second: float) -> dict[str, Any]:
        return {"problem": "", "tokens_per_second": tokens_per_second}

    cell = asdict(cells.Cell("8B", "lora", 4096))
    found = [{"cell": cell, "name": "8B", "engines": {"luthier": measured(16_000.0), "trl": measured(8_000.0)}}]
    speed, ratio = cuda_section.aims(found, "NVIDIA H200")
    assert (speed.met, speed.wish, ratio.value, ratio.met) == (True, False, 2.0, True)
    assert cuda_section.aims(found, "NVIDIA H100")[0].wish
    assert cuda_section.aims([], "NVIDIA H200") == ()


def test_the_page_tells_wishes_from_aims_and_has_the_parts_that_were_measured_apart(tmp_path: Path) -> None:
    pairs = [(_pass(1.0, peak=2**20 + 100), _pass(2.0, peak=2**21 + 100))]
    described = {"number": 1, "key": "documents", "engine": "attention per document", "instead": "padded batches"}
    lacking = {"number": 8, "key": "no-sync", "engine": "no host sync", "instead": "a sync", "problem": "no GPU"}
    part = {
        "date": "2026-01-02T00:00:00",
        "machine": machine.describe(),
        "points": {
            "work": {"rows": 4, "tokens": 700},
            "points": [described | points_section.compared(pairs), lacking],
            "warm_start": {"warm_seconds": [0.5], "cold_seconds": [4.0], "ratio": 8.0},
        },
        "aims": [],
    }
    reached = {"problem": "", "setting": "batch 1", "tokens_per_second": 9.0, "flops_utilisation": 0.5, "peak_gib": 1.0}
    other = part | {
        "cuda": {
            "device": "NVIDIA H200",
            "libraries": {"flash_attn": True},
            "cells": [{"name": "8B", "engines": {"luthier": reached, "trl": {"problem": "out of memory"}}}],
        },
        "aims": [Aim("cuda_speed", "8B", 9.0, 15_000.0, "higher", "tokens/s").to_json()],
    }
    del other["points"]
    (tmp_path / "points.json").write_text(json.dumps(part))
    (tmp_path / "cuda.json").write_text(json.dumps(other))
    result = report.with_apart(
        {
            "date": "2026-01-01",
            "seconds": 1,
            "machine": machine.describe(),
            "load_before": [0.0],
            "load_after": [0.0],
            "aims": [Aim("engine_wish", "twice TRL's best", 1.7, 2.0, "higher", wish=True).to_json()],
        },
        tmp_path,
    )
    text = report.page(result, "x.json")
    assert "| twice TRL's best | 1.70 | wish: at least 2 | no |" in text
    assert "| 8B | 9.00 tokens/s | at least 15000 | **no** |" in text
    assert "| 1. attention per document | padded batches | 1,000 | 500 | 2.00 | 2.00 | 1 / 2 |" in text
    assert "8.0 times as long" in text
    assert "- 8, no host sync: no GPU" in text
    assert "- 8B, trl: out of memory" in text


def test_the_newest_recorded_result_can_be_read() -> None:
    recorded = report.newest()
    assert "## Engine" in report.page(report.with_apart(json.loads(recorded.read_text())), recorded.name)


class _FieldOfSpeeds:
    """Stands in for the processes: everybody's passes take what `seconds` says of the contestant."""

    def __init__(self, seconds: Callable[[Contestant], float]) -> None:
        self._seconds = seconds
        self.ran: list[Contestant] = []
        self.retired: list[Contestant] = []

    def products(self, dtype: str) -> Products:
        return Products(100.0, 50.0) if dtype == "float32" else Products(400.0, 200.0)

    def run(self, contestant: Contestant, rows: int) -> Pass:
        if contestant.dtype == "bfloat16":
            raise CannotRun("no such dtype")
        self.ran.append(contestant)
        return _pass(self._seconds(contestant), peak=2**20 * (100 + contestant.batch))

    def retire(self, contestant: Contestant) -> None:
        self.retired.append(contestant)

    def last_words(self, contestant: Contestant) -> list[str]:
        return []


def test_a_run_has_three_rounds_of_those_who_can_win_however_little_time_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def seconds(contestant: Contestant) -> float:
        return (1.0 if contestant.engine == "luthier" else 1.7) * (2.0 if contestant.dtype == "float32" else 1.0)

    runs = _FieldOfSpeeds(seconds)
    monkeypatch.setattr(section, "open_field", lambda _work: contextlib.nullcontext(runs))
    found = section.measure(quick=False, seconds=0.0)
    passes = {each["name"]: len(each["rounds"]) for each in found.numbers["contestants"]}
    assert passes[section.AUTO.name] == passes[section.FLOAT32.name] == 3
    assert passes[peer.BFLOAT16[0].name] == passes[peer.FLOAT32[0].name] == passes[peer.TRAINER_BFLOAT16[0].name] == 3
    assert passes[peer.BFLOAT16[1].name] == passes[peer.FOR_INFORMATION[0].name] == 1
    assert passes["TRL group_by_length, batch 4, bfloat16"] == 0
    assert {*runs.ran} - {*runs.retired} == {each for each in runs.ran if runs.ran.count(each) == 3}
    aims = {each.key: each for each in found.aims}
    assert aims["engine_auto"].met
    assert aims["engine_auto"].value == aims["engine_wish"].value == 1.7
    assert not aims["engine_wish"].met
    assert aims["engine_memory"].value == pytest.approx(100 / 104, abs=0.01)
    assert aims["engine_utilisation"].wish
    assert "Trainer group_by_length" in report_engine.engine(found.numbers)
