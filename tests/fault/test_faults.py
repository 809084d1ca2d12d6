"""Nothing is lost, whatever dies: the table of faults in small numbers. `make fault` collects the large ones."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from fault.table import TABLE

Run: TypeAlias = tuple[str, int, int, bool]
RUNS: list[Run] = [(name, *each) for name, plan in TABLE.items() for each in plan.ci]
KNOWN_BAD: Run = ("known-bad", 0, 5, False)
_AT_ONCE = 4


def make(run: Run) -> dict[str, Any]:
    """Makes a run in a process of its own."""
    row, seed, count, real = run
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "fault", "--row", row, "--seed", str(seed), "--count", str(count)] + ["--real"] * real,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=170,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.stdout, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Iterator[Mapping[Run, "Future[dict[str, Any]]"]]:
    """The runs of all tests that were asked for: a few are under way at any time, for they mostly wait."""
    tests = [item for item in request.session.items if hasattr(item, "callspec")]
    asked = [item.callspec.params.get("run") for item in tests]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        yield {run: pool.submit(make, run) for run in [KNOWN_BAD, *RUNS] if run in asked or run == KNOWN_BAD}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run[0]}-{run[1]}{'-real' if run[3] else ''}")
def test_nothing_is_lost(run: Run, results: Mapping[Run, "Future[dict[str, Any]]"]) -> None:
    result = results[run].result()
    assert not result["violations"], "\n".join(result["violations"])
    assert result["faults"] >= run[2] or run[0] in ("failpoint", "database-call", "many-watchers")
    assert result["faults"] > 0
    assert result["events"] > 100


@pytest.mark.parametrize("run", [KNOWN_BAD], ids=["publish before commit"])
def test_the_oracle_catches_a_build_that_publishes_before_it_commits(
    run: Run, results: Mapping[Run, "Future[dict[str, Any]]"]
) -> None:
    violations = results[run].result()["violations"]
    assert any("durable before visible" in each for each in violations), violations
