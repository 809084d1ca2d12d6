"""ListJobs over 100,000 jobs: `python -m benchmarks.listing`. The aim is a p99 under 20 ms, first page and last alike.

One real job is made through the server; its row is then copied, each with an id and a spec of its own.
"""

import contextlib
import json
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.console import say, step, table
from benchmarks.daemon import Daemon
from benchmarks.numbers import quantile
from luthier.v1 import fine_tuning_pb2 as ft
from luthier_server.ids import Ids

_JOBS = 100_000
_PAGE = 50
_CALLS = 300
_FLAGS = ("--warm", "off", "--puppet", '{"steps": 1}')


def _fill(path: Path, count: int) -> None:
    """Copies the one job of a database, with other ids and names."""
    ids = Ids()
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.row_factory = sqlite3.Row
        [job] = database.execute("SELECT * FROM jobs").fetchall()
        columns = job.keys()

        def rows() -> Iterator[list[Any]]:
            specs = {name: json.loads(job[name]) for name in ("spec", "resolved_spec")}
            for number in range(count):
                changed = {name: json.dumps(spec | {"displayName": f"job {number}"}) for name, spec in specs.items()}
                row = dict(job) | changed | {"id": ids.new("job"), "request_id": None}
                yield [row[name] for name in columns]

        marks = ", ".join("?" * len(columns))
        database.executemany(f"INSERT INTO jobs ({', '.join(columns)}) VALUES ({marks})", rows())


def _timed(daemon: Daemon, token: str) -> tuple[float, str]:
    begin = time.perf_counter()
    page = daemon.fine_tuning.ListJobs(ft.ListJobsRequest(page_size=_PAGE, page_token=token))
    return time.perf_counter() - begin, page.next_page_token


def measure() -> dict[str, Any]:
    """Milliseconds of a walk over all pages, each read for the first time, and of the first and last page again."""
    with tempfile.TemporaryDirectory(prefix="luthier-bench-") as folder:
        data_dir = Path(folder)
        with contextlib.closing(Daemon(data_dir, *_FLAGS)) as daemon:
            daemon.upload("rows")
            daemon.wait(daemon.create("rows").id)
        (data_dir / "address").unlink()
        with step(f"making {_JOBS:,} jobs"):
            _fill(data_dir / "luthier.db", _JOBS)
        with contextlib.closing(Daemon(data_dir, *_FLAGS)) as daemon:
            walk, tokens = [], [""]
            with step("walking over every page"):
                while True:
                    seconds, token = _timed(daemon, tokens[-1])
                    walk.append(seconds)
                    if not token:
                        break
                    tokens.append(token)
            samples = {"walk": walk}
            for name, token in (("first page", tokens[0]), ("last page", tokens[-1])):
                with step(name):
                    samples[name] = [_timed(daemon, token)[0] for _ in range(_CALLS)]
    return {
        name: {
            "calls": len(each),
            "p50_ms": round(quantile(each, 0.5) * 1e3, 2),
            "p99_ms": round(quantile(each, 0.99) * 1e3, 2),
        }
        for name, each in samples.items()
    }


def main() -> None:
    """Measures, prints a table, and writes the result beside the others."""
    before = machine.load_average()
    pages = measure()
    described = machine.describe()
    say()
    table(
        ("ListJobs, 50 of 100,000", "calls", "p50 ms", "p99 ms"),
        [(name, str(each["calls"]), str(each["p50_ms"]), str(each["p99_ms"])) for name, each in pages.items()],
    )
    now = datetime.now(UTC)
    result = {
        "date": now.isoformat(timespec="seconds"),
        "machine": described,
        "load_before": before,
        "load_after": machine.load_average(),
        "jobs": _JOBS,
        "page_size": _PAGE,
        "list_jobs": pages,
    }
    target = Path(__file__).parent / "results" / f"listing-{machine.slug(described)}.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    say(f"  written to benchmarks/results/{target.name}")


if __name__ == "__main__":
    main()
