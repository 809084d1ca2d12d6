"""`luthierd doctor`: looks at everything a server depends on, says what is wrong, and what to do about it."""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from luthier.trainer import attempt
from luthier.v1.models_pb2 import DownloadManifest
from luthier_server import settings
from luthier_server.settings import Settings

OK, NOTE, BAD = "ok", "note", "BAD"
_LOW_SPACE = 5 * 2**30
_TORCH = (
    "import json, torch; print(json.dumps([torch.__version__, torch.cuda.is_available() and"
    " [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]]))"
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One look: its level, what was looked at, what was seen, and what to do."""

    level: str
    subject: str
    text: str
    advice: str = ""


def examine(chosen: Settings, *, deep: bool = False) -> Iterator[Finding]:
    """Everything that can be looked at without changing anything; `deep` reads every byte of datasets too."""
    data_dir = chosen.data_dir
    if not data_dir.is_dir():
        yield Finding(NOTE, "data directory", f"{data_dir} does not exist", "luthierd makes it at its first start")
    else:
        yield from _disk(data_dir)
        yield from _lock(data_dir)
        yield from _database(data_dir, deep)
    yield from _sqlite()
    yield from _limits(chosen)
    yield from _torch(chosen)


def _disk(data_dir: Path) -> Iterator[Finding]:
    free = shutil.disk_usage(data_dir).free
    text = f"{free / 2**30:.1f} GiB free in {data_dir}"
    if not os.access(data_dir, os.W_OK):
        yield Finding(BAD, "disk", f"{data_dir} is not writable", "give it to the user that runs luthierd")
    elif free < _LOW_SPACE:
        yield Finding(NOTE, "disk", text, "make room: a full disk pauses jobs until there is some")
    else:
        yield Finding(OK, "disk", text)
    if data_dir.stat().st_mode & 0o077:
        yield Finding(NOTE, "disk", f"{data_dir} can be read by other users", f"chmod 700 {data_dir}")


def _lock(data_dir: Path) -> Iterator[Finding]:
    path = data_dir / "luthierd.lock"
    if not path.exists():
        return
    with open(path) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            yield Finding(OK, "server", "luthierd works on this data directory")
        else:
            yield Finding(OK, "server", "no luthierd works on this data directory")


def _database(data_dir: Path, deep: bool) -> Iterator[Finding]:
    path = data_dir / "luthier.db"
    if not path.exists():
        yield Finding(NOTE, "database", "there is none yet")
        return
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            database.row_factory = sqlite3.Row
            [[verdict]] = database.execute("PRAGMA integrity_check(1)")
            [[version]] = database.execute("PRAGMA user_version")
            broken = database.execute("PRAGMA foreign_key_check").fetchall()
            known = sum(each.name.endswith(".sql") for each in _migrations())
            if verdict != "ok" or broken:
                detail = verdict if verdict != "ok" else f"{len(broken)} rows point nowhere"
                yield Finding(BAD, "database", detail, "stop luthierd and restore a backup")
                return
            if version > known:
                yield Finding(
                    BAD, "database", f"schema {version}; this Luthier knows {known}", "start the newer version"
                )
                return
            yield Finding(OK, "database", f"sound, schema {version}, {path.stat().st_size / 2**20:.1f} MiB")
            if version == known:
                yield from _events(database)
                yield from _spools(database, data_dir)
                yield from _blobs(database, data_dir, deep)
                yield from _models(database, data_dir)
                yield from _exports(database, data_dir)
                yield from _checkpoints(database, data_dir)
    except sqlite3.DatabaseError as error:
        yield Finding(BAD, "database", str(error), "stop luthierd and restore a backup")


def _migrations() -> Iterator[Path]:
    with resources.as_file(resources.files("luthier_server.store").joinpath("migrations")) as folder:
        yield from folder.iterdir()


def _events(database: sqlite3.Connection) -> Iterator[Finding]:
    gaps = database.execute(
        "SELECT jobs.id FROM jobs LEFT JOIN events ON events.job_id = jobs.id GROUP BY jobs.id"
        " HAVING count(sequence) != last_sequence - compacted_sequence OR max(sequence) != last_sequence"
    ).fetchall()
    for row in gaps[:20]:
        yield Finding(BAD, "events", f"the log of {row['id']} is not dense", "report this: it must never happen")
    if not gaps:
        [[count]] = database.execute("SELECT count(*) FROM events")
        yield Finding(OK, "events", f"{count:,} events, every log dense")


def _spools(database: sqlite3.Connection, data_dir: Path) -> Iterator[Finding]:
    found = database.execute("SELECT job_id, number, spool_offset FROM attempts WHERE end_time = 0").fetchall()
    for row in found:
        directory = data_dir / "jobs" / row["job_id"] / f"attempt-{row['number']}"
        name = f"{row['job_id']} attempt {row['number']}"
        spool = directory / attempt.SPOOL
        size = spool.stat().st_size if spool.exists() else 0
        if size < row["spool_offset"]:
            yield Finding(BAD, "spools", f"{name}: {size} bytes, {row['spool_offset']} were read", "it ends as lost")
        else:
            rest = size - row["spool_offset"]
            yield Finding(OK, "spools", f"{name}: in progress, {rest} bytes not read yet")


def _blobs(database: sqlite3.Connection, data_dir: Path, deep: bool) -> Iterator[Finding]:
    found = database.execute("SELECT name, version, sha256, size_bytes FROM datasets").fetchall()
    bad = 0
    for row in found:
        blob = data_dir / "blobs" / row["sha256"]
        sound = blob.is_file() and blob.stat().st_size == row["size_bytes"]
        if sound and deep:
            with open(blob, "rb") as file:
                sound = hashlib.file_digest(file, "sha256").hexdigest() == row["sha256"]
        if not sound:
            bad += 1
            name = f"{row['name']}@{row['version']}"
            yield Finding(BAD, "datasets", f"{name} is missing or damaged", "delete it and upload the file again")
    if not bad:
        yield Finding(OK, "datasets", f"{len(found)} {'read and ' if deep else ''}sound")


def _models(database: sqlite3.Connection, data_dir: Path) -> Iterator[Finding]:
    found = [row["id"] for row in database.execute("SELECT id FROM models")]
    gone = [each for each in found if not (data_dir / "models" / each).is_dir()]
    for each in gone:
        yield Finding(BAD, "models", f"the files of {each} are gone", "restore a backup")
    if not gone:
        yield Finding(OK, "models", f"{len(found)} there")


def _exports(database: sqlite3.Connection, data_dir: Path) -> Iterator[Finding]:
    sound = 0
    for row in database.execute("SELECT id, files FROM exports"):
        files = DownloadManifest.FromString(row["files"]).files
        wrong = [each.path for each in files if _size(data_dir / "exports" / row["id"] / each.path) != each.size_bytes]
        if wrong:
            text = f"{row['id']}: {', '.join(wrong[:5])} is missing or damaged"
            yield Finding(BAD, "exports", text, "delete it and export the model again")
        else:
            sound += 1
    yield Finding(OK, "exports", f"{sound} sound")


def _size(path: Path) -> int:
    """Bytes of a file; -1 for none."""
    return path.stat().st_size if path.is_file() else -1


def _checkpoints(database: sqlite3.Connection, data_dir: Path) -> Iterator[Finding]:
    sound = 0
    for row in database.execute("SELECT job_id, directory FROM checkpoints"):
        directory = data_dir / "jobs" / row["job_id"] / "checkpoints" / row["directory"]
        if not directory.is_dir():
            continue  # pruned
        if damage := _damage(directory):
            text = f"{row['job_id']} {row['directory']}: {damage}"
            yield Finding(BAD, "checkpoints", text, "nothing to do: the one before is taken, and said so")
        else:
            sound += 1
    yield Finding(OK, "checkpoints", f"{sound} sound")


def _damage(directory: Path) -> str:
    """What differs from a checkpoint's manifest; empty when nothing does, or there is none (a puppet's)."""
    manifest = directory / "manifest.json"
    if not manifest.exists():
        return ""
    try:
        for name, noted in json.loads(manifest.read_bytes())["files"].items():
            with open(directory / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != noted["sha256"]:
                    return f"{name} differs from its manifest"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"unreadable: {error}"
    return ""


def _sqlite() -> Iterator[Finding]:
    version = sqlite3.sqlite_version_info
    text = f"SQLite {sqlite3.sqlite_version}"
    if version < (3, 37):
        yield Finding(BAD, "sqlite", f"{text}: STRICT tables need 3.37", "use a newer Python or SQLite")
    elif version <= (3, 51, 2):
        yield Finding(
            OK, "sqlite", f"{text}: has the WAL-reset bug, which luthierd avoids (one connection checkpoints)"
        )
    else:
        yield Finding(OK, "sqlite", text)


def _limits(chosen: Settings) -> Iterator[Finding]:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files < 1024:
        yield Finding(NOTE, "limits", f"{files} open files", "raise it (ulimit -n) for more than a few hundred clients")
    else:
        yield Finding(OK, "limits", f"{files:,} open files")
    socket = attempt.socket_path(chosen.data_dir, "host")
    if socket.parent != chosen.data_dir.resolve():
        yield Finding(OK, "limits", f"the path is long, so sockets lie in {socket.parent}")


def _torch(chosen: Settings) -> Iterator[Finding]:
    try:
        run = subprocess.run(
            [chosen.trainer_python, "-c", _TORCH], capture_output=True, text=True, timeout=120, check=False
        )
        version, devices = json.loads(run.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        yield Finding(
            BAD,
            "torch",
            f"{chosen.trainer_python} cannot import it",
            "install luthier-trainer there, or --trainer-python",
        )
        return
    yield Finding(OK, "torch", f"{version}, {', '.join(devices) if devices else 'no GPU: trains on the CPU'}")


def command(arguments: Sequence[str]) -> int:
    """`luthierd doctor`: 0 when nothing is bad."""
    parser = argparse.ArgumentParser(prog="luthierd doctor", description="Look for what is wrong, and say what to do.")
    parser.add_argument("--data-dir", help="the data directory (default: as luthierd's)")
    parser.add_argument("--deep", action="store_true", help="read every byte of every dataset")
    options = parser.parse_args(arguments)
    flags = ["--data-dir", options.data_dir] if options.data_dir else []
    worst = 0
    for finding in examine(settings.read(flags, os.environ), deep=options.deep):
        advice = f"\n{'':20}-> {finding.advice}" if finding.advice else ""
        sys.stdout.write(f"{finding.level:5} {finding.subject:14}{finding.text}{advice}\n")
        worst |= finding.level == BAD
    return worst
