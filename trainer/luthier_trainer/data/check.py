"""The structural check of a dataset file: `python -m luthier_trainer.data.check [--reading FILE] [--scratch DIR] FILE`.

`--reading` names a file with a serialized `luthier.v1.DatasetReading`, `--scratch` a folder for what does not fit in
memory. Writes a serialized `luthier.v1.DatasetReport` to standard output and nothing else, and exits with 0 whenever
it could judge the file, whatever it found; with 2 and a line on standard error when there is no such file, or no room
in the folder. Streams: memory is bounded, whatever the file's size. No file makes it crash, hang, take more memory than
MEMORY_LIMIT or more time than CPU_SECONDS.
"""

import argparse
import gc
import resource
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from google.protobuf.message import DecodeError

from luthier.v1 import dataset_pb2, dataset_report_pb2
from luthier_trainer.data.doctor.duplicates import Duplicates, content, digests
from luthier_trainer.data.doctor.encodings import may_be_odd, odd_encoding
from luthier_trainer.data.doctor.findings import Findings
from luthier_trainer.data.doctor.sensitive import may_be_sensitive, sensitive
from luthier_trainer.data.doctor.statistics import Statistics
from luthier_trainer.data.doctor.texts import texts_of
from luthier_trainer.data.files.rows import MAX_PROBLEMS
from luthier_trainer.data.formats import records
from luthier_trainer.data.problem import Level, Problem
from luthier_trainer.data.reading import Reading
from luthier_trainer.data.records import Chat, Preference, Record, Text

MEMORY_LIMIT = 4 * 1024**3
CPU_SECONDS = 15 * 60

_TOO_MANY = Problem("TOO_MANY_PROBLEMS", f"{MAX_PROBLEMS:,} rows are wrong. The rest of the file is not looked at.")
_TOO_LARGE = Problem("FILE_TOO_LARGE", "The file does not fit in memory. Write it as JSONL, one object a line.")
_TOO_SLOW = Problem(
    "CHECK_TOO_LONG",
    f"The check was stopped after {CPU_SECONDS // 60} minutes.",
    "Split the file into several datasets.",
)


class OutOfTime(BaseException):
    """The process has used its time. No Exception, so that nothing on the way takes it for a problem of a row."""


def check(path: Path, reading: Reading, scratch: Path) -> dataset_report_pb2.DatasetReport:
    """Judges a file: how it is read, its rows, what is wrong with them and what is worth knowing.

    Raises OSError when the file cannot be read or `scratch` cannot be written.
    """
    findings, statistics, duplicates = Findings(), Statistics(), Duplicates(scratch)
    rows = 0
    try:
        with records(path, reading) as source:
            for line, record, _ in source:
                rows += line > 0
                if isinstance(record, Problem):
                    findings.add(line, record)
                    if findings.errors >= MAX_PROBLEMS:
                        findings.add(0, _TOO_MANY)
                        break
                    continue
                statistics.add(line, record)
                for problem in _doubts(record):
                    findings.add(line, problem)
                prompt, rest = content(record)
                duplicates.add(line, *digests(prompt, rest))
                whole = rest if prompt is None else prompt + rest
                if may_be_sensitive(whole):
                    for problem in sensitive(record):
                        findings.add(line, problem)
                if may_be_odd(whole):
                    for problem in odd_encoding(record):
                        findings.add(line, problem)
            reading = source.reading
        duplicates.judge(findings)
    except MemoryError:
        findings.add(0, _TOO_LARGE)
    except OutOfTime:
        findings.add(0, _TOO_SLOW)
    if outliers := statistics.outliers():
        findings.add(*outliers)
    return dataset_report_pb2.DatasetReport(
        reading=reading.to_proto(),
        rows=rows,
        findings=findings.listed(),
        counts=findings.counts(),
        statistics=statistics.report(),
    )


def limit_resources() -> None:
    """Bounds the memory and the time of this process; OutOfTime is raised when its time is up. For the main thread."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_lower(MEMORY_LIMIT, hard), hard))
    signal.signal(signal.SIGXCPU, _out_of_time)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    # A call that never comes back to Python ends with the hard limit.
    last = _lower(CPU_SECONDS + 60, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (min(CPU_SECONDS, last), last))
    # Rows hold no cycles, and there are many objects a row.
    gc.set_threshold(100_000)


def unreadable(path: Path) -> str:
    """Why a path cannot be a dataset's file, or an empty text. Devices and pipes are never opened."""
    if path.exists() and not path.is_file():
        return "it is not a regular one"
    return ""


def _lower(limit: int, hard: int) -> int:
    return limit if hard == resource.RLIM_INFINITY else min(limit, hard)


def _out_of_time(_signal: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGXCPU, signal.SIG_IGN)  # it comes again every second
    raise OutOfTime


def _doubts(record: Record) -> Iterator[Problem]:
    """What a valid row says that is probably not meant."""
    if isinstance(record, Text):
        if not record.text.strip():
            yield Problem("EMPTY_ROW", "The text is blank.", "Remove the row.", Level.WARNING)
    elif isinstance(record, Preference):
        if record.chosen == record.rejected:
            yield Problem("SAME_ANSWERS", "The two answers are equal.", "Remove the row.", Level.WARNING)
    elif isinstance(record, Chat):
        messages = record.messages
        for number, turn in enumerate(messages, 1):
            text = turn["content"]
            if (
                isinstance(text, str)
                and (not text or text.isspace())
                and turn["role"] != "tool"  # a tool may well return nothing
                and not any(map(str.strip, texts_of(turn)))
            ):
                message = f"Turn {number} ({turn['role']}) is blank."
                yield Problem("BLANK_TURN", message, "Remove the row, or write what was said.", Level.WARNING)
                break
        if messages and messages[-1]["role"] != "assistant":
            message = "The row goes on after its last answer: what follows is not learnt."
            yield Problem("NOTHING_AFTER_LAST_ANSWER", message, "Add the answer, or remove the last turns.", Level.NOTE)


def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m luthier_trainer.data.check", description="Checks a dataset file.")
    parser.add_argument("--reading", type=Path, help="a file with a serialized luthier.v1.DatasetReading")
    parser.add_argument("--scratch", type=Path, help="a folder for what does not fit in memory")
    parser.add_argument("file", type=Path)
    options = parser.parse_args(arguments)
    limit_resources()
    if reason := unreadable(options.file):
        sys.stderr.write(f"cannot read the file: {reason}\n")
        return 2
    try:
        reading = Reading()
        if options.reading is not None:
            reading = Reading.from_proto(dataset_pb2.DatasetReading.FromString(options.reading.read_bytes()))
        with tempfile.TemporaryDirectory(prefix="check-", dir=options.scratch) as scratch:
            report = check(options.file, reading, Path(scratch))
    except (DecodeError, ValueError) as error:
        sys.stderr.write(f"cannot read the reading: {error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"cannot read the file: {error.strerror}\n")
        return 2
    sys.stdout.buffer.write(report.SerializeToString())
    sys.stdout.buffer.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
