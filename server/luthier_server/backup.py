"""`luthierd backup` and `luthierd restore`: a copy of all that cannot be made again, taken while the server runs.

A backup holds the database (by SQLite's backup API, so a moment of it), and the datasets, models, exports and
checkpoints that the database names. Spools and logs stay behind: a job that was training goes on from its newest
checkpoint.
"""

import argparse
import contextlib
import json
import os
import secrets
import shutil
import sqlite3
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from luthier_server import __version__, settings

_DATABASE = "luthier.db"
_MANIFEST = "backup.json"


class BackupError(Exception):
    """A backup or restore that cannot be made; the message says why."""


def _rows(database: sqlite3.Connection, sql: str) -> Iterator[Path]:
    for row in database.execute(sql):
        yield Path(*row)


def _wanted(database: sqlite3.Connection) -> list[Path]:
    """Paths below the data directory that the database names."""
    return [
        *(Path("blobs") / each for each in _rows(database, "SELECT DISTINCT sha256 FROM datasets")),
        *(Path("models") / each for each in _rows(database, "SELECT id FROM models")),
        *(Path("exports") / each for each in _rows(database, "SELECT id FROM exports")),
        *_rows(database, "SELECT 'jobs', job_id, 'checkpoints', directory FROM checkpoints"),
    ]


def _copy(source: Path, target: Path) -> bool:
    """Copies a file or folder; False when it is gone."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copy2(source, target)
    except (FileNotFoundError, shutil.Error):
        # A checkpoint may be pruned while it is copied; the half of it must not look like one.
        shutil.rmtree(target, ignore_errors=True)
        return False
    return True


def backup(data_dir: Path, target: Path) -> dict[str, int]:
    """Copies a data directory, also one that a server works on. Returns what was copied, by kind.

    The target appears whole, at the end. Raises BackupError.
    """
    if not (data_dir / _DATABASE).is_file():
        raise BackupError(f"{data_dir} holds no {_DATABASE}: is it the right --data-dir?")
    if target.exists():
        raise BackupError(f"{target} exists already: name a new folder")
    aside = target.with_name(f"{target.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    counts = {"blobs": 0, "models": 0, "exports": 0, "jobs": 0, "missing": 0}
    with (
        contextlib.closing(
            sqlite3.connect(f"{(data_dir / _DATABASE).absolute().as_uri()}?mode=ro", uri=True)
        ) as source,
        contextlib.closing(sqlite3.connect(aside / _DATABASE)) as copy,
    ):
        source.backup(copy)
        [[verdict]] = copy.execute("PRAGMA integrity_check(1)")
        if verdict != "ok":
            raise BackupError(f"the database is damaged: {verdict}")
        for path in _wanted(copy):
            kind = path.parts[0]
            copied = _copy(data_dir / path, aside / path)
            gone = not copied and kind != "jobs"  # checkpoints come and go
            counts["missing" if gone else kind] += copied or gone
    manifest = {"version": __version__, "time": int(time.time()), **counts}
    (aside / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    os.sync()
    aside.rename(target)
    return counts


def restore(source: Path, data_dir: Path) -> None:
    """Makes a data directory from a backup, as a new incarnation: positions of the old history are refused by watches.

    Raises BackupError.
    """
    if not (source / _MANIFEST).is_file():
        raise BackupError(f"{source} is no backup: it holds no {_MANIFEST}")
    if data_dir.exists() and any(data_dir.iterdir()):
        raise BackupError(f"{data_dir} is not empty: restore into a new folder")
    aside = data_dir.with_name(f"{data_dir.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(source, aside, ignore=shutil.ignore_patterns(_MANIFEST))
    with contextlib.closing(sqlite3.connect(aside / _DATABASE)) as database, database:
        database.execute("UPDATE meta SET value = ? WHERE key = 'history_id'", (secrets.token_hex(16),))
    os.sync()
    if data_dir.exists():
        data_dir.rmdir()
    aside.rename(data_dir)


def _parser(verb: str, folder: str, text: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"luthierd {verb}", description=text)
    parser.add_argument("folder", metavar="DIR", type=Path, help=folder)
    parser.add_argument("--data-dir", type=Path, help="the data directory (default: as luthierd's)")
    return parser


def _data_dir(chosen: Path | None) -> Path:
    return chosen or settings.read([], os.environ).data_dir


def backup_command(arguments: Sequence[str]) -> int:
    """`luthierd backup DIR`."""
    parser = _parser("backup", "a folder that does not exist yet", "Copy the data directory, also while it is served.")
    options = parser.parse_args(arguments)
    counts = backup(_data_dir(options.data_dir), options.folder)
    sys.stdout.write(
        f"backed up the database, {counts['blobs']} datasets, {counts['models']} models, {counts['exports']} exports"
        f" and {counts['jobs']} checkpoints to {options.folder}\n"
    )
    if counts["missing"]:
        sys.stderr.write(f"{counts['missing']} files that the database names are missing: run luthierd doctor\n")
    return 1 if counts["missing"] else 0


def restore_command(arguments: Sequence[str]) -> int:
    """`luthierd restore DIR --data-dir NEW`."""
    parser = _parser("restore", "a folder that luthierd backup made", "Make a data directory from a backup.")
    options = parser.parse_args(arguments)
    data_dir = _data_dir(options.data_dir)
    restore(options.folder, data_dir)
    sys.stdout.write(f"restored to {data_dir}: start it with luthierd --data-dir {data_dir}\n")
    return 0
