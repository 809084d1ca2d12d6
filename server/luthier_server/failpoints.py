"""Places where the fault tests make this server die, wait or fail. Without these variables nothing here acts.

LUTHIER_FAILPOINTS    `NAME=ACTION[@N[+EVERY]],...`: ACTION is exit, raise or sleep:SECONDS, done when the place NAME is
                      reached for the N-th time (by default the first), and at every EVERY-th time after it
LUTHIER_CLOCK_OFFSET  `SECONDS[@AFTER]`: the wall clock is wrong by so much, once the process is AFTER seconds old
LUTHIER_KNOWN_BAD     `publish-before-commit`: a broken build, made for one purpose: the fault tests must catch it
"""

import asyncio
import os
import re
import sqlite3
import sys
import time
from dataclasses import dataclass

EXIT_CODE = 86
"""What a process leaves with whose failpoint said exit."""

PUBLISH_EARLY = os.environ.get("LUTHIER_KNOWN_BAD") == "publish-before-commit"

_POINT = re.compile(r"(\w+)=(exit|raise|sleep:([\d.]+))(?:@(\d+)(?:\+(\d+))?)?")
_STARTED = time.monotonic()


@dataclass
class _Point:
    action: str
    seconds: float
    at: int
    every: int
    reached: int = 0


def _parse(text: str) -> dict[str, _Point]:
    points: dict[str, _Point] = {}
    for part in filter(None, text.split(",")):
        match = _POINT.fullmatch(part)
        if match is None:
            raise ValueError(f"LUTHIER_FAILPOINTS: {part}")
        name, action, seconds, at, every = match.groups()
        points[name] = _Point(action.partition(":")[0], float(seconds or 0), int(at or 1), int(every or 0))
    return points


_POINTS = _parse(os.environ.get("LUTHIER_FAILPOINTS", ""))
_offset, _, _after = os.environ.get("LUTHIER_CLOCK_OFFSET", "0").partition("@")
_OFFSET, _AFTER = float(_offset), float(_after or 0)


async def reach(name: str) -> None:
    """Does what was asked for at this place. Raises sqlite3.OperationalError, as the store would, where that is it."""
    if not _POINTS or name not in _POINTS:
        return
    point = _POINTS[name]
    point.reached += 1
    past = point.reached - point.at
    if past and (past < 0 or not point.every or past % point.every):
        return
    sys.stderr.write(f"failpoint {name}: {point.action} at hit {point.reached}\n")
    if point.action == "exit":
        os._exit(EXIT_CODE)
    if point.action == "sleep":
        await asyncio.sleep(point.seconds)
    else:
        error = sqlite3.OperationalError(f"injected at {name}")
        error.sqlite_errorcode = sqlite3.SQLITE_IOERR
        raise error


def wall_clock() -> float:
    """Seconds since the epoch, as this server believes."""
    if not _OFFSET or time.monotonic() - _STARTED < _AFTER:
        return time.time()
    return time.time() + _OFFSET
