"""Datasets: how fast a file is checked, tokenised and uploaded, and what memory that takes."""

import tempfile
from pathlib import Path
from typing import Any

from benchmarks import child, datasets_check, datasets_rows, datasets_upload
from benchmarks.aims import Aim, Section
from benchmarks.console import say, step, table
from benchmarks.datasets_tokens import CONTESTANTS
from benchmarks.numbers import median

_ROUNDS = 3
_QUIET_CORES = 0.2
"""A round is quiet when other processes used no more of the cores; Luthier is judged by these, if there are two."""


def measure(*, quick: bool, full: bool = False) -> Section:
    """The check, the tokenising and the upload of chats: 200,000 rows (200 MB); `full` a million (1 GB)."""
    say("Datasets: check, tokenise, upload")
    rows = 1_000_000 if full else 20_000 if quick else 200_000
    with tempfile.TemporaryDirectory(prefix="luthier-bench-") as name:
        folder = Path(name)
        path = folder / "chats.jsonl"
        with step(f"writing {rows:,} rows"):
            size = datasets_rows.write(path, rows)
        with step(f"checking {size / 1e6:,.0f} MB on one core"):
            checked = datasets_check.check(path, folder)
        with step(f"uploading {size / 1e6:,.0f} MB"):
            uploads = [datasets_upload.upload(path) for _ in range(1 if quick else _ROUNDS)]
        with step(f"uploading {size / 1e6:,.0f} MB, killed half-way"):
            resumed = datasets_upload.resumed(path)
        path.unlink()
        tokenised = _tokenised(folder, 2000 if quick else 20_000 if full else 8000, 1 if quick else _ROUNDS)
    numbers = {
        "rows": rows,
        "bytes": size,
        "check": checked,
        "upload": uploads,
        "resumed": resumed,
        "tokenise": tokenised,
    }
    _say(numbers)
    return Section(numbers, _aims(numbers))


def _tokenised(folder: Path, rows: int, rounds: int) -> dict[str, Any]:
    """Interleaved rounds over the same rows. Raises RuntimeError unless all came to the same tokens."""
    path = folder / "rows.jsonl"
    datasets_rows.write(path, rows)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTESTANTS}
    for number in range(rounds):
        for name in CONTESTANTS:
            said = f"tokenising {rows:,} rows, {name}, round {number + 1} of {rounds}"
            with step(said), tempfile.TemporaryDirectory(dir=folder) as own:
                found[name].append(child.run("benchmarks.datasets_tokens", name, path, own, seconds=600))
    counts = {tuple(one["counts"]) for each in found.values() for one in each}
    if len(counts) > 1:
        raise RuntimeError(f"the contestants differ in (rows, tokens, trained tokens): {counts}")
    [(_, tokens, trained)] = counts
    others = {name: [round(one["work"]["other_cores"], 2) for one in each] for name, each in found.items()}
    quiet = [number for number in range(rounds) if all(each[number] <= _QUIET_CORES for each in others.values())]
    judged = "seconds" if len(quiet) > 1 else "cpu_seconds"
    kept = quiet if len(quiet) > 1 else list(range(rounds))

    def speeds(name: str, clock: str, *parts: str) -> list[float]:
        return [round(rows / sum(one[part][clock] for part in parts), 1) for one in found[name]]

    def ratio(peer: str, *parts: str) -> float:
        ours, theirs = speeds("luthier", judged, "work"), speeds(peer, judged, *parts)
        return round(median([ours[n] for n in kept]) / median([theirs[n] for n in kept]), 2)

    return {
        "rows": rows,
        "tokens": tokens,
        "trained_tokens": trained,
        "rows_per_second": {name: median([speeds(name, "seconds", "work")[n] for n in kept]) for name in CONTESTANTS},
        "rows_per_cpu_second": {name: median(speeds(name, "cpu_seconds", "work")) for name in CONTESTANTS},
        "rounds": {name: speeds(name, "seconds", "work") for name in CONTESTANTS},
        "other_cores": others,
        "judged_by": "the clock, in quiet rounds"
        if judged == "seconds"
        else "processor time, as others used the cores",
        "ratio_to_map": ratio("map", "work"),
        "ratio_to_loading_and_map": ratio("map", "loading", "work"),
        "ratio_to_batched_map": ratio("batched", "work"),
        "ratio_to_loading_and_batched_map": ratio("batched", "loading", "work"),
    }


def _aims(numbers: dict[str, Any]) -> tuple[Aim, ...]:
    check, uploads, resumed, tokens = (numbers[name] for name in ("check", "upload", "resumed", "tokenise"))
    transfer = median([each["transfer_mb_per_second"] for each in uploads])
    server = max(each["server_peak_mb"] for each in uploads)
    client = max(each["client_peak_mb"] for each in uploads)
    size = f"{numbers['bytes'] / 1e9:.1f} GB"
    return (
        Aim(
            "datasets_check_speed", f"{size} of chats checked on one core", check["mb_per_second"], 20, "higher", "MB/s"
        ),
        Aim("datasets_check_memory", "private memory of that check", check["peak_private_mb"], 400, "lower", "MB"),
        Aim("datasets_tokens", "rows/s tokenised, times those of datasets.map", tokens["ratio_to_map"], 1, "higher"),
        Aim(
            "datasets_tokens_batched",
            "rows/s tokenised, times those of datasets.map with 1,000 rows a call, both from the file on",
            tokens["ratio_to_loading_and_batched_map"],
            1,
            "higher",
        ),
        Aim("datasets_upload", f"transfer of {size} over loopback, median", transfer, 100, "higher", "MB/s"),
        Aim("datasets_upload_server", "private memory of luthierd meanwhile", server, 150, "lower", "MB"),
        Aim("datasets_upload_client", "private memory of the client meanwhile", client, 150, "lower", "MB"),
        Aim("datasets_resumed", "share sent again, killed half-way", resumed["sent_again_share"], 0.51, "lower"),
    )


def _say(numbers: dict[str, Any]) -> None:
    check, resumed, tokens = (numbers[name] for name in ("check", "resumed", "tokenise"))
    table(
        ("check on one core", "MB/s", "MB/CPU s", "private MB"),
        [(f"{check['rows']:,} rows", *(str(check[key]) for key in _CHECKED))],
    )
    table(
        ("tokenising", "rows/s", "rows/CPU s", "rounds"),
        [
            (
                name,
                f"{tokens['rows_per_second'][name]:,.0f}",
                f"{tokens['rows_per_cpu_second'][name]:,.0f}",
                " ".join(f"{each:.0f}" for each in rounds),
            )
            for name, rounds in tokens["rounds"].items()
        ],
    )
    table(
        ("upload", "hash MB/s", "transfer MB/s", "both MB/s", "server MB", "client MB"),
        [(f"{each['bytes'] / 1e6:,.0f} MB", *(str(each[key]) for key in _UPLOADED)) for each in numbers["upload"]],
    )
    say(f"  killed half-way: {resumed['sent_again_share']:.1%} was sent again, and the hash is right\n")


_CHECKED = ("mb_per_second", "mb_per_cpu_second", "peak_private_mb")
_UPLOADED = (
    *("hash_mb_per_second", "transfer_mb_per_second", "whole_mb_per_second"),
    *("server_peak_mb", "client_peak_mb"),
)
