"""`python -m benchmarks.report`: docs/benchmarks.md from the newest result."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.causes import cause
from benchmarks.numbers import median
from benchmarks.report_engine import cuda, engine, markdown, origin, points

_HERE = Path(__file__).parent
_RESULTS = _HERE / "results"
_PAGE = _HERE.parent / "docs" / "benchmarks.md"
_SIGNS = {"higher": "at least", "lower": "at most"}


def newest() -> Path:
    """The newest result by its date. Raises FileNotFoundError when there is none."""
    found = [path for path in _RESULTS.glob("*.json") if "aims" in json.loads(path.read_text())]
    if not found:
        raise FileNotFoundError("there is no result yet: run python -m benchmarks")
    return max(found, key=lambda path: str(json.loads(path.read_text())["date"]))


def with_large(result: dict[str, Any], parts: Path = _RESULTS / "parts") -> dict[str, Any]:
    """The result with the datasets of the newest of its parts that measured more rows, and their aims."""
    found = {path.name: json.loads(path.read_text()) for path in parts.glob("*.json")}
    rows = result.get("datasets", {}).get("rows", 0)
    larger = {name: each for name, each in found.items() if each.get("datasets", {}).get("rows", 0) > rows}
    if not larger:
        return result
    name = _newest_of(larger)
    aims = [each for each in result["aims"] if not each["key"].startswith("datasets")]
    return result | _part(larger[name], name, "datasets") | {"aims": [*aims, *_aims_of(larger[name], "datasets")]}


def with_apart(result: dict[str, Any], parts: Path = _RESULTS / "parts") -> dict[str, Any]:
    """The result with the sections that no whole run has, points and cuda, of the newest of its parts that measured
    them, and their aims."""
    found = {path.name: json.loads(path.read_text()) for path in parts.glob("*.json")}
    for section in ("points", "cuda"):
        having = {name: each for name, each in found.items() if section in each}
        if section in result or not having:
            continue
        name = _newest_of(having)
        aims = [*result["aims"], *_aims_of(having[name], section)]
        result = result | _part(having[name], name, section) | {"aims": aims}
    return result


def _newest_of(parts: dict[str, dict[str, Any]]) -> str:
    return max(parts, key=lambda each: str(parts[each]["date"]))


def _part(part: dict[str, Any], name: str, section: str) -> dict[str, Any]:
    told = f"on {part['date'][:10]} at commit {part['machine']['commit'][:12]}, `parts/{name}`"
    return {section: part[section] | {"origin": told}}


def _aims_of(part: dict[str, Any], section: str) -> list[dict[str, Any]]:
    return [each for each in part["aims"] if each["key"].startswith(section)]


def page(result: dict[str, Any], source: str) -> str:
    """The page as Markdown."""
    parts = [
        "# Benchmarks\n\n"
        f"Written by `python -m benchmarks.report` from `benchmarks/results/{source}`; do not edit. `make bench` "
        "measures anew, and [benchmarks/README.md](../benchmarks/README.md) tells how.\n",
        _machine(result),
        _aims(result["aims"]),
    ]
    parts += [
        write(result[name])
        for name, write in (
            ("engine", engine),
            ("points", points),
            ("cuda", cuda),
            ("latency", _latency),
            ("server", _server),
            ("watch", _watch),
            ("datasets", _datasets),
        )
        if name in result
    ]
    return "\n".join(parts)


def _machine(result: dict[str, Any]) -> str:
    machine = result["machine"]
    flags = [flag for flag, has in machine["flags"].items() if has]
    lacking = [flag for flag, has in machine["flags"].items() if not has]
    libraries = ", ".join(f"{name} {version}" for name, version in machine["libraries"].items())
    changed = " with uncommitted changes" if machine["uncommitted_changes"] else ""
    return (
        "## Machine\n\n"
        f"- {result['date']}, {result['seconds']} s in all\n"
        f"- {machine['cpu']} (family/model {machine['cpu_family_model']}), {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB; has {', '.join(flags)}; lacks {', '.join(lacking) or 'nothing of note'}\n"
        f"- Linux {machine['kernel']}, Python {machine['python']}, {libraries}\n"
        f"- commit {machine['commit'][:12]}{changed}\n"
        f"- load average before {result['load_before']}, after {result['load_after']}; what ran before the start is in "
        "it too, so the stars below tell better which passes were disturbed\n"
    )


def _aims(aims: Sequence[dict[str, Any]]) -> str:
    rows = [
        (
            each["text"],
            f"{each['value']:.2f} {each['unit']}".strip(),
            ("wish: " if each.get("wish") else "") + f"{_SIGNS[each['better']]} {each['aim']:g}",
            "yes" if each["met"] else "no" if each.get("wish") else "**no**",
        )
        for each in aims
    ]
    text = "## Aims\n\n" + markdown(("aim", "measured", "aimed at", "met"), rows)
    text += "\n### What falls short\n\n"
    missed = [
        f"- {each['text']}{' (a wish)' if each.get('wish') else ''}: {cause(each['key']) or 'no cause is known yet.'}\n"
        for each in aims
        if not each["met"]
    ]
    text += "".join(missed) or "Nothing: every aim is met.\n"
    return text


def _latency(found: dict[str, Any]) -> str:
    rows = []
    for name, key in (
        ("warm trainer host", "warm_seconds"),
        ("cold: the trainer imports torch", "cold_seconds"),
        ("warm, 100 chats, not tokenised yet", "few_rows_seconds"),
        ("warm, 100,000 chats, not tokenised yet", "many_rows_seconds"),
    ):
        if key not in found:
            continue
        samples = sorted(found[key])
        rows.append((name, f"{median(samples):.2f} s", f"{samples[0]:.2f}", f"{samples[-1]:.2f}", str(len(samples))))
    return (
        "## Latency of a job\n\nFrom CreateJob to the first StepCompleted at the client, `builtin/tiny`, each job on a "
        "dataset not seen before.\n\n" + markdown(("", "median", "least", "most", "jobs"), rows)
    )


def _server(found: dict[str, Any]) -> str:
    starts, memory = sorted(found["start_seconds"]), found["idle_memory_mib"]
    calls = [
        (
            name.replace("@", ", ") + " at a time",
            f"{each['p50_ms']:.1f} ms",
            f"{each['p99_ms']:.1f} ms",
            f"{each['calls_per_second']:,.0f}",
        )
        for name, each in found["calls"].items()
    ]
    return (
        "## Server\n\n"
        f"From exec to SERVING {median(starts):.2f} s ({starts[0]:.2f} to {starts[-1]:.2f}, {len(starts)} starts). "
        f"Idle memory {memory['rss']:.0f} MiB resident (PSS {memory['pss']:.0f}, its own {memory['uss']:.0f}).\n\n"
        + markdown(("call", "p50", "p99", "calls/s"), calls)
    )


def _watch(found: dict[str, Any]) -> str:
    replay = [
        (
            f"{each['watchers']:,} x {each['events']:,}",
            f"{each['luthier']['events_per_second']:,}",
            f"{each['bare']['events_per_second']:,}",
            f"{each['ratio']:.1f}",
            f"{each['luthier']['server_cpu_us_per_event']:.1f} / {each['luthier']['client_cpu_us_per_event']:.1f}",
            f"{each['bare']['server_cpu_us_per_event']:.1f} / {each['bare']['client_cpu_us_per_event']:.1f}",
        )
        for each in found["replay"]
    ]
    live = found["live"]
    lag, spread = live["report_to_receipt_ms"], live["first_to_receipt_ms"]
    shares = ("p50", "p99", "most")
    return (
        "## Watching\n\nA finished job replayed, against a bare grpc.aio stream server that sends the same bytes from "
        "memory, one message an event. CPU microseconds an event are the server's / the watchers' (one process, "
        "messages not parsed).\n\n"
        + markdown(
            ("watchers x events", "Luthier, events/s", "bare, events/s", "ratio", "CPU, Luthier", "CPU, bare"), replay
        )
        + f"\nLive: {live['watchers']:,} watchers of a job that makes {live['events_per_second']:.0f} events a second "
        f"({live['deliveries']:,} deliveries, {live['missing_deliveries']} missing, "
        f"{live['messages_per_second']:,.0f} messages a second; the server used {live['server_cores']:.2f} cores, the "
        f"watchers {live['client_cores']:.2f}). Time is counted from the event's own time, which is the trainer's and "
        "before the commit: an upper bound of commit to receipt. First to receipt is the fan-out alone.\n\n"
        + markdown(
            ("", *shares),
            [
                ("report to receipt", *(f"{lag[each]:.0f} ms" for each in shares)),
                ("first to receipt", *(f"{spread[each]:.0f} ms" for each in shares)),
            ],
        )
    )


def _datasets(found: dict[str, Any]) -> str:
    check, resumed, tokens = found["check"], found["resumed"], found["tokenise"]
    names = {
        "luthier": "Luthier, its reading of the file included",
        "map": "`datasets.map`, row by row",
        "batched": "`datasets.map`, 1,000 rows a call",
    }
    tokenised = [
        (names[name], f"{tokens['rows_per_second'][name]:,.0f}", " ".join(f"{each:,.0f}" for each in rounds))
        for name, rounds in tokens["rounds"].items()
    ]
    uploads = [
        (
            f"{each['bytes'] / 1e6:,.0f} MB",
            *(f"{each[key]:,.0f}" for key in ("hash_mb_per_second", "transfer_mb_per_second", "whole_mb_per_second")),
            f"{each['cpu_seconds']['server']:.1f} / {each['cpu_seconds']['client']:.1f}",
            f"{each['server_idle_mb']:.0f}, {each['server_peak_mb']:.0f} / {each['client_peak_mb']:.0f}",
        )
        for each in found["upload"]
    ]
    checked = (
        f"{check['rows']:,} rows",
        f"{check['mb_per_second']:.1f}",
        f"{check['mb_per_cpu_second']:.1f}",
        f"{check['rows'] / check['seconds']:,.0f}",
        f"{check['peak_private_mb']:.0f} MB",
    )
    keys = ("map", "loading_and_map", "batched_map", "loading_and_batched_map")
    ratios = [f"{tokens[f'ratio_to_{key}']:.2f}" for key in keys]
    return (
        "## Datasets\n\n"
        f"{found['rows']:,} chats as JSONL, {found['bytes'] / 1e6:,.0f} MB, made from a seed{origin(found)}. MB are "
        "10^6 bytes; memory is private memory, shared pages are not counted.\n\n"
        + markdown(("structural check, one core", "MB/s", "MB per CPU second", "rows/s", "most memory"), [checked])
        + f"\nTokenising {tokens['rows']:,} of these rows with `builtin/tiny`: {tokens['tokens']:,} tokens of which "
        f"{tokens['trained_tokens']:,} are trained, the same for all. One process each, interleaved; `datasets` calls "
        "`apply_chat_template` for tokens and the mask of the assistant's. Imports and its loading of the file are not "
        f"timed. Luthier is {ratios[0]} times as fast as `map` row by row ({ratios[1]} with its loading) and "
        f"{ratios[2]} times as fast as with 1,000 rows a call ({ratios[3]} with its loading).\n\n"
        + markdown(("", "rows/s, median", "rounds"), tokenised)
        + "\nUploads over loopback by the Python client, until the server begins to check the file. Seconds of "
        "processor time are the server's / the client's; memory is the server's idle, its most / the client's most.\n\n"
        + markdown(("", "hashing MB/s", "transfer MB/s", "both MB/s", "CPU s", "MB"), uploads)
        + f"\nWhen the client was killed half-way, a second one sent {resumed['sent_again_share']:.1%} of the bytes, "
        "and the dataset has the hash of the file.\n"
    )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("result", nargs="?", type=Path, help="a result file (default: the newest)")
    chosen = parser.parse_args().result or newest()
    _PAGE.parent.mkdir(exist_ok=True)
    _PAGE.write_text(page(with_apart(with_large(json.loads(chosen.read_text()))), chosen.name))
    print(f"wrote docs/{_PAGE.name} from {chosen.name}")


if __name__ == "__main__":
    main()
