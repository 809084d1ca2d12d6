"""What a result was measured on. No host name and no path."""

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

_LIBRARIES = ("torch", "transformers", "trl", "peft", "grpcio", "protobuf", "aiosqlite")
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")


def describe() -> dict[str, Any]:
    """The processor, the memory, the versions and the commit."""
    cpu = _cpu()
    return {
        "cpu": cpu.get("model name", platform.processor() or platform.machine()),
        "cpu_family_model": f"{cpu.get('cpu family', '?')}/{cpu.get('model', '?')}",
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "flags": {flag: flag in cpu.get("flags", "").split() for flag in _FLAGS},
        "kernel": platform.release(),
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def slug(machine: dict[str, Any]) -> str:
    """A short name for files: `epyc-2core`."""
    words = re.findall(r"[a-z][a-z0-9-]+", machine["cpu"].lower())
    plain = [word for word in words if word not in ("amd", "intel", "cpu", "core", "processor", "gen", "th", "ghz")]
    return f"{plain[0] if plain else 'cpu'}-{machine['cores']}core"


def load_average() -> list[float]:
    """Runnable processes, averaged over 1, 5 and 15 minutes."""
    return [round(each, 2) for each in os.getloadavg()]


def _cpu() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
