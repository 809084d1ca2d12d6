"""A module of this package as a process that answers with JSON."""

import json
import subprocess
import sys
from typing import Any


def run(module: str, *arguments: object, seconds: float = 120) -> Any:
    """What `python -m MODULE ARGUMENTS` prints, parsed. Raises RuntimeError with its last words when it fails."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    if done.returncode:
        raise RuntimeError(f"{module} failed: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout)
