"""Luthier's engine, TRL and transformers' Trainer, in interleaved rounds over the same rows."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.aims import Aim, Section
from benchmarks.console import say, step
from benchmarks.engine import peer, workload
from benchmarks.engine.contestant import Contestant
from benchmarks.engine.field import CannotRun, Field
from benchmarks.engine.field import field as open_field
from benchmarks.engine.flops import training_flops
from benchmarks.engine.standings import Entry, against, going_on, numbers
from benchmarks.engine.tables import show, show_ratios

FLOAT32 = Contestant("luthier", "float32")
AUTO = Contestant("luthier", "auto")
_AIMS = {"float32": 1.2, "auto": 1.6}
_WISH, _WISHED_UTILISATION = 2.0, 0.7
_ROWS = 40
_FEWEST_ROUNDS, _MOST_ROUNDS = 3, 7
_BESIDE = 1.5
"""Seconds that a pass takes beside those that are timed: its set-up, and the product before it."""

_WORTHLESS_GAIN = 1.0
"""Where products in bfloat16 are not even so many times as fast as in float32, no peer is tried in it."""


@dataclass(frozen=True)
class _Groups:
    """Everybody who takes part, by what the best of them is the best of."""

    float32: list[Entry]
    auto: list[Entry]
    trainer: list[Entry]
    information: list[Entry]

    @property
    def everybody(self) -> list[Entry]:
        """In the order of a round."""
        return [*self.float32, *self.auto, *self.trainer, *self.information]

    def after_the_first_round(self, rivals: int) -> list[Entry]:
        """Luthier's two, the `rivals` best of TRL in each dtype, and the best Trainer."""
        return [
            self.float32[0],
            *going_on(self.float32[1:], rivals),
            self.auto[0],
            *going_on(self.auto[1:], rivals),
            *going_on(self.trainer, 1),
        ]


def measure(*, quick: bool, seconds: float) -> Section:
    """A first round of everybody, then rounds of those who can win, until the next would last beyond `seconds`: at most
    seven, and at least three, since a median of fewer says little. A quick run has one."""
    rows = 8 if quick else _ROWS
    sample = workload.sample(rows)
    tokens = sum(each.tokens for each in sample)
    say(f"Engine: 28M Llama, LoRA r{workload.RANK}, {rows} of {workload.CHATS} chats, {tokens} tokens a pass")
    begin = time.perf_counter()
    with (
        tempfile.TemporaryDirectory(prefix="luthier-bench-", ignore_cleanup_errors=True) as work,
        open_field(Path(work)) as runs,
    ):
        groups = _groups(runs.products("bfloat16").per_second / runs.products("float32").per_second, quick=quick)
        _round(runs, groups.everybody, 1, rows)
        left = seconds - (time.perf_counter() - begin)
        entries = groups.after_the_first_round(2)
        if _lasts(entries) * (_FEWEST_ROUNDS - 1) > left:
            entries = groups.after_the_first_round(1)
        for each in groups.everybody:
            if each not in entries:
                runs.retire(each.contestant)
        for number in range(2, 2 if quick else _MOST_ROUNDS + 1):
            started = time.perf_counter()
            _round(runs, entries, number, rows)
            now = time.perf_counter()
            if number >= _FEWEST_ROUNDS and now - begin + (now - started) > seconds:
                break
    flops = training_flops(sample)
    found = [numbers(each, flops) for each in groups.everybody]
    show(found)
    in_float32, in_auto = groups.float32[1:], groups.auto[1:]
    compared = {
        "float32": against(groups.float32[0], in_float32, "float32"),
        "auto": against(groups.auto[0], [*in_float32, *in_auto], "auto"),
    }
    trainer = against(groups.auto[0], groups.trainer, "trainer")
    comparisons = [each for each in (*compared.values(), trainer) if each]
    show_ratios(comparisons)
    described = {
        "work": {
            "rows": rows,
            "tokens": tokens,
            "scored_tokens": sum(each.scored for each in sample),
            "flops_per_token": round(flops / tokens / 1e6, 1) * 1e6,
        },
        "contestants": found,
        "comparisons": comparisons,
    }
    ours = found[groups.everybody.index(groups.auto[0])]
    return Section(described, (*(_aim(name, each) for name, each in compared.items()), *_aims(compared["auto"], ours)))


def _groups(gain: float, *, quick: bool) -> _Groups:
    """Who takes part where bfloat16 products are `gain` times as fast as those in float32."""
    narrow = gain > _WORTHLESS_GAIN
    trainer = peer.TRAINER_BFLOAT16 if narrow else peer.TRAINER_FLOAT32
    bfloat16: tuple[Contestant, ...] = peer.BFLOAT16 if narrow else ()
    if quick:
        return _Groups(
            [Entry(each) for each in (FLOAT32, peer.FLOAT32[0])],
            [Entry(each) for each in (AUTO, *bfloat16[:1])],
            [Entry(trainer[0])],
            [],
        )
    if not narrow:
        say(f"  bfloat16 products run at {gain:.1f} times the speed of float32 here: no peer is tried in it")
    return _Groups(
        [Entry(each) for each in (FLOAT32, *peer.FLOAT32)],
        [Entry(each) for each in (AUTO, *bfloat16)],
        [Entry(each) for each in trainer],
        [Entry(each) for each in peer.FOR_INFORMATION],
    )


def _lasts(entries: Sequence[Entry]) -> float:
    """Seconds of a round, about."""
    return sum(each.passes[max(each.passes)].seconds + _BESIDE for each in entries if each.passes)


def _round(runs: Field, entries: Sequence[Entry], number: int, rows: int) -> None:
    for entry in entries:
        if entry.problem:
            continue
        with step(f"round {number}: {entry.contestant.name}"):
            try:
                entry.products[number] = runs.products("float32" if entry.contestant.dtype == "float32" else "bfloat16")
                entry.passes[number] = done = runs.run(entry.contestant, rows)
                if done.dtype == "float32" and entry.contestant.dtype != "float32":
                    entry.products[number] = runs.products("float32")
            except CannotRun as error:
                entry.problem = str(error)
                entry.passes.pop(number, None)
                say(f"    cannot run: {error}")
                for line in runs.last_words(entry.contestant):
                    say(f"    {line}")
                continue
        say(f"    {done.tokens_per_second:,.0f} tokens/s, {done.peak_bytes / 2**20:,.0f} MiB")


def _aim(name: str, comparison: dict[str, Any] | None) -> Aim:
    """A comparison that a side could not run for is an aim missed, not one forgotten."""
    if comparison is None:
        text = f"Luthier, {name}, against TRL: one of them did not run"
        return Aim(f"engine_{name}", text, 0.0, _AIMS[name], "higher")
    text = f"{comparison['luthier']}: tokens/s, times those of {comparison['peer']}"
    return Aim(f"engine_{name}", text + _by(comparison), _ratio(comparison), _AIMS[name], "higher")


def _aims(auto: dict[str, Any] | None, ours: dict[str, Any]) -> list[Aim]:
    """What else is aimed at, and what is wished for, with what Luthier chooses by itself."""
    if auto is None:
        return []
    found = []
    if auto["ratio_memory"] is not None:
        text = f"{auto['luthier']}: peak memory, times that of {auto['peer']}"
        found.append(Aim("engine_memory", text, auto["ratio_memory"], 1.0, "lower"))
    text = f"{auto['luthier']}: tokens/s, times those of {auto['peer']}{_by(auto)}"
    found.append(Aim("engine_wish", text, _ratio(auto), _WISH, "higher", wish=True))
    reached = ours["flops_utilisation"] if ours["quiet"] else ours["flops_utilisation_cpu"]
    text = f"{ours['name']}: share of the roofline (MFU)" + ("" if ours["quiet"] else " in CPU time")
    found.append(Aim("engine_utilisation", text, reached, _WISHED_UTILISATION, "higher", wish=True))
    return found


def _ratio(comparison: dict[str, Any]) -> float:
    return float(comparison["ratio"] if comparison["quiet"] else comparison["ratio_cpu_time"])


def _by(comparison: dict[str, Any]) -> str:
    return "" if comparison["quiet"] else " (in CPU time: the machine was never quiet)"
