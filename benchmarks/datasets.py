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
    counts = {(one["rows"], one["tokens"], one["trained_tokens"]) for each in found.values() for one in each}
    if len(counts) > 1:
        raise RuntimeError(f"the contestants differ in (rows, tokens, trained tokens): {counts}")
    [(_, tokens, trained)] = counts
    speeds = {name: [round(rows / one["seconds"], 1) for one in each] for name, each in found.items()}
    medians = {name: median(each) for name, each in speeds.items()}
    whole = {
        name: median([rows / (one["seconds"] + one["loading_seconds"]) for one in each]) for name, each in found.items()
    }
    return {
        "rows": rows,
        "tokens": tokens,
        "trained_tokens": trained,
        "rows_per_second": {name: round(each, 1) for name, each in medians.items()},
        "rounds": speeds,
        "ratio_to_map": round(medians["luthier"] / medians["map"], 2),
        "ratio_to_batched_map": round(medians["luthier"] / medians["batched"], 2),
        "ratio_to_loading_and_map": round(medians["luthier"] / whole["map"], 2),
        "ratio_to_loading_and_batched_map": round(medians["luthier"] / whole["batched"], 2),
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
        ("tokenising", "rows/s", "rounds"),
        [
            (name, f"{tokens['rows_per_second'][name]:,.0f}", " ".join(f"{each:.0f}" for each in rounds))
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
