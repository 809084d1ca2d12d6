"""The cache of tokenised rows: what two processes, killed ones, a limit and a full disk do to it."""

import errno
import fcntl
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import warm
from unit.trainer.attempts import wait_for

from luthier.trainer.v1 import task_pb2
from luthier_trainer import durable
from luthier_trainer.data.masks.masking import Masking
from luthier_trainer.data.masks.template import template_of
from luthier_trainer.data.tokens import cache, tokenised
from luthier_trainer.data.tokens.cache import COUNTS
from luthier_trainer.data.tokens.options import Options
from luthier_trainer.data.tokens.overlong import Overlong
from luthier_trainer.inspect import BUILTIN
from luthier_trainer.report import Payload

ROWS = 600


class _Silent:
    def report(self, payload: Payload, *, durable: bool = False) -> None:
        pass


def build(data: Path, cache_dir: Path) -> tokenised.TokenisedRows:
    """What a trainer does with its rows."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BUILTIN / "tiny")
    source = task_pb2.DatasetSource(path=str(data), rows=ROWS)
    options, template = Options(64, Overlong.TRUNCATE, Masking()), template_of(tokenizer)
    return tokenised.load(source, tokenizer, template, options, cache_dir=cache_dir, reporter=_Silent())


def build_when_told(data: Path, cache_dir: Path, told: Path) -> None:
    """Says when a copy is built, and moves it to its place once the file `told` is there."""
    move = cache._move

    def move_when_told(*arguments: Any) -> None:
        sys.stdout.write("built\n")
        sys.stdout.flush()
        wait_for(told.exists)
        move(*arguments)

    cache._move = move_when_told  # type: ignore[assignment]
    rows = build(data, cache_dir)
    sys.stdout.write(f"{len(rows)} {rows.lengths.sum()} {rows.scored.sum()}\n")


def write_rows(path: Path) -> Path:
    row = '{{"messages": [{{"role": "user", "content": "{0}?"}}, {{"role": "assistant", "content": "It is {0}."}}]}}\n'
    path.write_text("".join(row.format(number) for number in range(ROWS)))
    return path


def put(cache_dir: Path, key: str, size: int, *, age: float = 0.0) -> Path:
    """An entry of `size` bytes that was last used so many seconds ago."""
    directory = cache.entry(cache_dir, key)

    def write(aside: Path) -> None:
        (aside / "rows.arrow").write_bytes(b"x" * (size - 2))
        (aside / COUNTS).write_bytes(b"{}")

    cache.build(directory, write, lambda _: True)
    used = time.time() - age
    os.utime(directory / COUNTS, (used, used))
    return directory


def names(cache_dir: Path) -> list[str]:
    return sorted(path.name for path in (cache_dir / "tokenised").iterdir())


def test_two_processes_that_build_at_once_agree_and_leave_one_copy(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    built, told = tmp_path / "cache", tmp_path / "told"
    with ExitStack() as stack:
        processes = [
            stack.enter_context(warm.started(build_when_told, data, built, told, output=tmp_path / f"output-{number}"))
            for number in range(2)
        ]
        for process in processes:
            wait_for(lambda process=process: process.printed() == "built\n", 60)  # type: ignore[misc]
        assert len(names(built)) == 2, "each has built a copy aside"
        told.touch()
        assert [process.wait() for process in processes] == [0, 0]
        answers = [process.printed() for process in processes]
    assert answers[0] == answers[1]
    assert answers[0].startswith(f"built\n{ROWS} ")
    assert [name[0] != "." for name in names(built)] == [True]


def test_nothing_is_printed_or_written_outside_the_cache(tmp_path: Path) -> None:
    home, folder = tmp_path / "home", tmp_path / "cache"
    home.mkdir()
    data = write_rows(tmp_path / "rows.jsonl")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    program = "import sys; from pathlib import Path; from test_data_cache import build; build(*map(Path, sys.argv[1:]))"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", program, data, folder],
        env=environment | {"HOME": str(home), "PYTHONPATH": path},
        cwd=home,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert list(home.rglob("*")) == []
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == [
        "counts.json",
        "report.binpb",
        "rows.arrow",
    ]


def test_over_the_limit_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    for key, age in (("old", 30), ("older", 40), ("new", 10), ("middle", 20)):
        put(tmp_path, key, 1000, age=age)
    assert cache.shrink(tmp_path, 2500) == (2, 2000)
    assert names(tmp_path) == ["middle", "new"]


def test_without_a_limit_and_below_it_nothing_goes(tmp_path: Path) -> None:
    put(tmp_path, "one", 1000)
    assert cache.shrink(tmp_path, 0) == (0, 0)
    assert cache.shrink(tmp_path, 1000) == (0, 0)
    assert cache.shrink(tmp_path / "nothing", 10) == (0, 0)
    assert names(tmp_path) == ["one"]


def test_opening_an_entry_makes_it_the_last_to_go(tmp_path: Path) -> None:
    old = put(tmp_path, "old", 1000, age=30)
    put(tmp_path, "young", 1000, age=20)
    os.close(cache.use(old))
    assert cache.shrink(tmp_path, 1500) == (1, 1000)
    assert names(tmp_path) == ["old"]


def test_an_entry_in_use_stays_however_old_and_large_it_is(tmp_path: Path) -> None:
    used = put(tmp_path, "used", 5000, age=90)
    put(tmp_path, "idle", 1000)
    lock = cache.use(used)
    try:
        assert cache.shrink(tmp_path, 100) == (1, 1000)
        assert cache.drop_unused(tmp_path) == (0, 0)
        assert names(tmp_path) == ["used"]
    finally:
        os.close(lock)
    assert cache.drop_unused(tmp_path) == (1, 5000)
    assert names(tmp_path) == []


def test_an_entry_that_was_deleted_before_its_lock_was_had_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = put(tmp_path, "one", 1000)
    flock = fcntl.flock

    def flock_late(*arguments: int) -> None:
        (directory / COUNTS).unlink()
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", flock_late)
    with pytest.raises(FileNotFoundError):
        cache.use(directory)


def test_what_a_killed_process_left_is_swept_after_a_day(tmp_path: Path) -> None:
    old, young = tmp_path / "tokenised" / ".old", tmp_path / "tokenised" / ".young"
    for path in (old, young):
        path.mkdir(parents=True)
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    put(tmp_path, "new", 100)
    assert (old.exists(), young.exists()) == (False, True)


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache, "_sync", full)
    with pytest.raises(OSError, match="No space") as caught:
        put(tmp_path, "one", 100)
    assert durable.is_full(caught.value)
    assert names(tmp_path) == []


def test_a_builder_that_was_slower_takes_the_others_work_unless_that_is_damaged(tmp_path: Path) -> None:
    directory = put(tmp_path, "one", 1000)

    def write(aside: Path) -> None:
        (aside / COUNTS).write_bytes(b"mine")

    cache.build(directory, write, lambda _: True)
    assert (directory / COUNTS).read_bytes() == b"{}"
    cache.build(directory, write, lambda _: False)
    assert (directory / COUNTS).read_bytes() == b"mine"
    assert names(tmp_path) == ["one"]


def test_what_a_killed_builder_left_goes_soon_and_what_a_living_one_builds_stays(tmp_path: Path) -> None:
    put(tmp_path, "whole", 1000)
    folders = {name: tmp_path / "tokenised" / name for name in (".killed-1", ".young-2", ".living-3")}
    for name, folder in folders.items():
        folder.mkdir()
        (folder / "rows.arrow").write_bytes(b"x")
        if name != ".young-2":
            os.utime(folder, (time.time() - 120,) * 2)
    held = os.open(folders[".living-3"], os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_SH)
    try:
        assert cache.shrink(tmp_path, 5000) == (0, 0)
        assert names(tmp_path) == [".living-3", ".young-2", "whole"]
    finally:
        os.close(held)
    cache.drop_unused(tmp_path)
    assert names(tmp_path) == [".young-2"]
