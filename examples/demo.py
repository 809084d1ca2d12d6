"""The main job, end to end: `make demo`.

Starts luthierd on a folder of its own, uploads the example dataset, fine-tunes `builtin/tiny` with LoRA while the live
progress runs, and shows what the base and the tuned model answer to 50 questions that were held out of training. Both
sets of answers and both losses come through WatchJob; the example's own `score.py` judges them. Stops what it started.
"""

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib import util
from pathlib import Path
from types import ModuleType

from luthier.v1.event_pb2 import EvaluationCompleted, SamplesGenerated
from luthier_client import Client, JobHandle, load_spec
from luthier_client.cli.follow import follow
from luthier_client.cli.lazy import Settings

EXAMPLE = Path(__file__).parent / "stdlib-cards"
SHOWN = 3
WIDTH = 110


def example_score() -> ModuleType:
    """The example's score.py, which is a script and not a package."""
    spec = util.spec_from_file_location("stdlib_cards_score", EXAMPLE / "score.py")
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def luthierd(data_dir: Path) -> Iterator[str]:
    """A luthierd on a free port of this machine; yields its address, and leaves no process behind."""
    command = [sys.executable, "-m", "luthier_server.main", "--listen", "127.0.0.1:0", "--data-dir", str(data_dir)]
    command.append("--stop-trainers")  # trainers would outlive it
    with open(data_dir / "luthierd.log", "wb") as log:
        # A session of its own: Ctrl-C reaches this program alone, which then stops the daemon in order.
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    try:
        address = data_dir / "address"
        while not address.exists():
            if server.poll() is not None:
                sys.exit(f"luthierd did not start:\n{(data_dir / 'luthierd.log').read_text()}")
            time.sleep(0.02)
        yield address.read_text()
    finally:
        with masked():
            server.send_signal(signal.SIGTERM)
            server.wait()


@contextlib.contextmanager
def masked() -> Iterator[None]:
    """Further Ctrl-C wait: what was started must be stopped."""
    before = {each: signal.signal(each, signal.SIG_IGN) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def questions() -> list[str]:
    """The user messages of the held-out rows."""
    rows = (json.loads(line) for line in (EXAMPLE / "heldout.jsonl").read_text(encoding="utf-8").splitlines())
    return [row["messages"][0]["content"] for row in rows]


def first_and_last(job: JobHandle) -> tuple[list[SamplesGenerated], list[EvaluationCompleted]]:
    """The answers and the evaluations of the base (first) and of the tuned model (last), from the job's log."""
    samples, evaluations = [], []
    for event in job.watch():
        if event.HasField("samples_generated"):
            samples.append(event.samples_generated)
        if event.HasField("evaluation_completed"):
            evaluations.append(event.evaluation_completed)
    return [samples[0], samples[-1]], [evaluations[0], evaluations[-1]]


def show(samples: Sequence[SamplesGenerated], evaluations: Sequence[EvaluationCompleted], seconds: float) -> None:
    """Prints some answers side by side, then the score."""
    score = example_score()
    base, tuned = ([(each.prompt, each.completion) for each in part.samples] for part in samples)
    print("\nHeld-out questions, before and after:")
    for (question, before), (_, after) in list(zip(base, tuned, strict=True))[:SHOWN]:
        print(f"\n  {question[:WIDTH]}")
        print(f"    base   {' '.join(before.split())[:WIDTH]}")
        print(f"    tuned  {' '.join(after.split())[:WIDTH]}")
    first, last = evaluations
    print(f"\n{'':10}{'base':>10}{'tuned':>10}   on {len(base)} held-out rows")
    print(f"{'loss':10}{first.loss:>10.3f}{last.loss:>10.3f}   natural logarithm, per scored token")
    print(
        f"{'valid':10}{score.score(base):>10}{score.score(tuned):>10}   JSON cards of the right form, kind and module"
    )
    for name, judge, words in (
        ("named", score.named_card, "of these, with the very name"),
        ("exact", score.exact_card, "of these, with the very parameters"),
    ):
        counts = [sum(judge(answer, question) for question, answer in part) for part in (base, tuned)]
        print(f"{name:10}{counts[0]:>10}{counts[1]:>10}   {words}")
    print(f"\n{seconds:.0f} s in all; luthierd and everything of this demo is gone. To keep what comes out,")
    print("run `make serve` in one terminal, and in another")
    print("  .venv/bin/luthier train examples/stdlib-cards/train.jsonl --epochs 2 --learning-rate 0.004")


def main() -> int:
    """Runs the demo; the exit status is 0 when the job succeeded."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="luthier-demo-") as folder, luthierd(Path(folder)) as address:
        print(f"luthierd serves on {address}")
        with Client(address) as client:
            for name, file in (("stdlib-cards", "train.jsonl"), ("stdlib-cards-heldout", "heldout.jsonl")):
                dataset = client.upload_dataset(EXAMPLE / file, name=name)
                print(f"uploaded {dataset.name}@{dataset.version}: {dataset.rows:,} rows")
            spec = load_spec(EXAMPLE / "job.yaml")
            spec.fine_tune.evaluation.sample_prompts.extend(questions())
            spec.fine_tune.evaluation.sample_max_tokens = 72  # the longest right card has 52
            job = client.create_job(spec)
            code = follow(Settings(endpoint=address, output="table"), job, hints=False)  # the command line's own view
            if code == 0:
                show(*first_and_last(job), time.monotonic() - started)
            return code


def interrupt(number: int, frame: object) -> None:
    """Ends the demo as Ctrl-C does."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, interrupt)
    try:
        code = main()
    except KeyboardInterrupt:
        code = 130
    if code == 130:
        print("stopped; nothing is left running")
    sys.exit(code)
