"""`python -m mutations`: the long run, which can be interrupted and goes on; its page; or one mutant.

python -m mutations N [--results FILE] [--parallel P]    the mutants 0 to N - 1, as far as they are not recorded
python -m mutations --report [--results FILE]            writes docs/mutations.md
python -m mutations --number NUMBER [--write FILE]       one mutant again; with --write only its file, or its template
"""

import argparse
import contextlib
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mutations import recording
from mutations.mutant import File, Template
from mutations.site import Outcome, Site
from mutations.table import is_template, mutant, mutation_of

_ROOT = Path(__file__).parents[2]
_RESULTS = _ROOT / "benchmarks" / "results" / "mutation-runs.jsonl"
_PAGE = _ROOT / "docs" / "mutations.md"
_BATCH = 250


@contextlib.contextmanager
def sites() -> Iterator[tuple[Site, Site]]:
    """A server for files and one for templates."""
    with tempfile.TemporaryDirectory(prefix="luthier-mutations-", ignore_cleanup_errors=True) as folder:
        files, templates = Site(Path(folder) / "files"), Site(Path(folder) / "templates", real=True)
        try:
            yield files.start(), templates.start()
        finally:
            files.close()
            templates.close()


def throw(numbers: range, both: tuple[Site, Site], parallel: int) -> list[Outcome]:
    """Throws mutants, templates beside the files: they take longer, and two cores are not many."""
    files, templates = both
    of_files = [number for number in numbers if not is_template(mutation_of(number))]
    of_templates = [number for number in numbers if is_template(mutation_of(number))]
    with ThreadPoolExecutor(parallel) as one, ThreadPoolExecutor(1) as other:
        thrown = [
            *(one.submit(lambda number=number: files.throw(mutant(number))) for number in of_files),  # type: ignore[misc]
            *(other.submit(lambda number=number: templates.throw(mutant(number))) for number in of_templates),  # type: ignore[misc]
        ]
        try:
            return [each.result() for each in thrown]
        except BaseException:
            one.shutdown(cancel_futures=True)
            other.shutdown(cancel_futures=True)
            raise


def collect(count: int, results: Path, parallel: int) -> int:
    """Throws what is missing of so many, and records each batch; returns how much was violated."""
    done = {line["batch"] for line in recording.read(results)}
    missing = [batch for batch in range(-(-count // _BATCH)) if batch not in done]
    bad = 0
    with contextlib.ExitStack() as stack:
        both = None
        for batch in missing:
            both = both or stack.enter_context(sites())
            begin = time.monotonic()
            outcomes = throw(range(batch * _BATCH, min(count, (batch + 1) * _BATCH)), both, parallel)
            line = recording.line_of(batch, outcomes, both, time.monotonic() - begin)
            recording.append(results, line)
            bad += len(line["violations"])
            slowest = max(part["seconds"] for part in line["mutations"].values())
            sys.stdout.write(
                f"batch {batch}: {line['mutants']} mutants, {line['seconds']} s, slowest {slowest:.1f} s, luthierd"
                f" {line['server_mib']} MiB, checks {line['check_mib']} MiB, {len(line['violations'])} violations\n"
            )
            sys.stdout.write("".join(f"  VIOLATION {text[:500]}\n" for text in line["violations"]))
            sys.stdout.flush()
            if any(site.daemon.process.poll() is not None for site in both):
                stack.close()
                both = None
    return bad


def again(number: int) -> int:
    """Throws one mutant and tells what came of it; returns how much was violated."""
    made = mutant(number)
    with tempfile.TemporaryDirectory(prefix="luthier-mutations-") as folder:
        site = Site(Path(folder), real=isinstance(made.what, Template))
        try:
            outcome = site.start().throw(made)
            violations = outcome.violations + site.settled()
        finally:
            site.close()
    sys.stdout.write(
        f"{number}: {made.mutation} ({made.what.base}): {outcome.kind} {outcome.reason}, {outcome.seconds:.1f} s,"
        f" {outcome.memory_mib:.0f} MiB\n" + "".join(f"  VIOLATION {text}\n" for text in violations)
    )
    return len(violations)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m mutations", description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=10_000)
    parser.add_argument("--results", type=Path, default=_RESULTS)
    parser.add_argument("--parallel", type=int, default=3)
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--number", type=int)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a run that is ended ends its servers
    if options.number is not None and options.write:
        what = mutant(options.number).what
        content = what.content if isinstance(what, File) else what.tokenization.chat_template.encode()
        options.write.write_bytes(content)
        return 0
    if options.number is not None:
        return bool(again(options.number))
    bad = 0
    try:
        bad = 0 if options.report else collect(options.count, options.results, options.parallel)
    except KeyboardInterrupt:
        sys.stdout.write("interrupted: start it again and it goes on\n")
    if options.results == _RESULTS:
        _PAGE.write_text(recording.page(recording.read(options.results)))
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
