"""The structural check of a dataset file: `python -m luthier_trainer.data.check FILE`.

Writes a serialized `luthier.trainer.v1.DatasetReport` to standard output and nothing else, and exits with 0 whenever it
could judge the file, whatever it found; with 2 and a line on standard error when there is no such file. Loads the
standard library, orjson and protobuf only. No file makes it crash, hang or take more than MEMORY_LIMIT.
"""

import resource
import sys
from pathlib import Path

from luthier.trainer.v1 import report_pb2
from luthier.v1 import dataset_pb2
from luthier_trainer.data.formats import Format, Problem, conversations

MAX_FINDINGS = 100
MEMORY_LIMIT = 4 * 1024**3

_FORMATS = {
    Format.MESSAGES: dataset_pb2.DATASET_FORMAT_MESSAGES,
    Format.PROMPT_COMPLETION: dataset_pb2.DATASET_FORMAT_PROMPT_COMPLETION,
    Format.INSTRUCTION: dataset_pb2.DATASET_FORMAT_INSTRUCTION,
}


def check(path: Path) -> report_pb2.DatasetReport:
    """Judges a file: its format, its rows, and the first problem of each wrong line (all counted, MAX_FINDINGS kept).

    Raises OSError when the file cannot be read.
    """
    report = report_pb2.DatasetReport()
    rows = 0

    def found(line: int, problem: Problem) -> None:
        report.finding_count += 1
        if len(report.findings) < MAX_FINDINGS:
            report.findings.add(line=line, code=problem.code, message=problem.message)

    try:
        for line, row_format, row in conversations(path):
            rows += line > 0
            if row_format is not None and not report.format:
                report.format = _FORMATS[row_format]
            if isinstance(row, Problem):
                found(line, row)
    except MemoryError:
        found(0, Problem("FILE_TOO_LARGE", "The file does not fit in memory. Write it as JSONL, one object a line."))
    report.rows = rows
    return report


def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m luthier_trainer.data.check FILE\n")
        return 2
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY_LIMIT if hard == resource.RLIM_INFINITY else min(MEMORY_LIMIT, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    path = Path(arguments[0])
    if path.exists() and not path.is_file():
        sys.stderr.write("cannot read the file: it is not a regular one\n")
        return 2
    try:
        report = check(path)
    except OSError as error:
        sys.stderr.write(f"cannot read the file: {error.strerror}\n")
        return 2
    sys.stdout.buffer.write(report.SerializeToString())
    sys.stdout.buffer.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
