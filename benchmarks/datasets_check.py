"""The structural check: the worker as the server runs it, on one core."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.datasets_memory import Peak
from luthier.v1.dataset_report_pb2 import DatasetReport


def check(path: Path, scratch: Path) -> dict[str, Any]:
    """Checks a file on the first core that there is. Raises RuntimeError when an error is found in it."""
    core = min(os.sched_getaffinity(0))
    worker = [sys.executable, "-m", "luthier_trainer.data.check", "--scratch", str(scratch), str(path)]
    begin = time.perf_counter()
    used = os.times()
    process = subprocess.Popen(["taskset", "-c", str(core), *worker], stdout=subprocess.PIPE)
    with Peak(worker=process.pid) as peak:
        output, _ = process.communicate()
    seconds, spent = time.perf_counter() - begin, os.times()
    report = DatasetReport.FromString(output)
    if process.returncode or any(each.level == 1 for each in report.counts):
        raise RuntimeError(f"the check ended with {process.returncode} and found {report.counts}")
    cpu = spent.children_user + spent.children_system - used.children_user - used.children_system
    size = path.stat().st_size
    return {
        "bytes": size,
        "rows": report.rows,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "mb_per_second": round(size / 1e6 / seconds, 1),
        "mb_per_cpu_second": round(size / 1e6 / cpu, 1),
        "peak_private_mb": round(peak.most["worker"], 1),
    }
