"""Debian's documentation packages: what is taken of them, from where, and under which licence.

Only packages whose documentation is under a licence that permits use and redistribution without conditions on works
derived from it beyond notices: PSF, BSD, MIT, Apache-2.0, public domain.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pretraining.pages import page_text

PACKAGES = {
    "python3.11-doc": "PSF-2.0",
    "docutils-doc": "public domain, BSD-2-Clause in parts",
    "python-aiohttp-doc": "Apache-2.0",
    "python-attr-doc": "MIT",
    "python-babel-doc": "BSD-3-Clause",
    "python-click-doc": "BSD-3-Clause",
    "python-coverage-doc": "Apache-2.0",
    "python-cryptography-doc": "Apache-2.0",
    "python-django-doc": "BSD-3-Clause",
    "python-flask-doc": "BSD-3-Clause",
    "python-gevent-doc": "MIT",
    "python-greenlet-doc": "MIT",
    "python-jinja2-doc": "BSD-3-Clause",
    "python-markdown-doc": "BSD-3-Clause",
    "python-pygments-doc": "BSD-2-Clause",
    "python-pyparsing-doc": "MIT",
    "python-pytest-doc": "MIT",
    "python-requests-doc": "Apache-2.0",
    "python-sqlalchemy-doc": "MIT",
    "python-tornado-doc": "Apache-2.0",
    "python-werkzeug-doc": "BSD-3-Clause",
    "sphinx-doc": "BSD-2-Clause",
    "sqlite3-doc": "public domain",
}
"""Names of packages, and the licence that their copyright files give for what is read of them."""
PYTHON = "python3.11-doc"
_LEFT_OUT = re.compile(
    r"(^|/)(_modules|_static|_sources|releases|releaselog|announce|genindex|search|py-modindex|http-routingtable"
    r"|contents|history|license|copyright|changelog|changes|changes_\w+)([-./]|$)",
    re.IGNORECASE,
)
"""Pages without prose of their own, lists of changes, and texts of licences."""


@dataclass(frozen=True)
class Package:
    """An unpacked package: its .deb's name, version and hash, and the folder that it was unpacked to."""

    name: str
    version: str
    sha256: str
    root: Path

    @property
    def copyright_file(self) -> Path:
        return self.root / "usr/share/doc" / self.name / "copyright"


def fetch(folder: Path) -> list[Package]:
    """Downloads what `folder` lacks with apt-get, and unpacks it there; nothing is installed. Raises
    CalledProcessError when apt-get or dpkg fails."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for name in sorted(PACKAGES):
        if not list(folder.glob(f"{name}_*.deb")):
            subprocess.run(["apt-get", "download", "-qq", name], cwd=folder, check=True)
        (deb,) = folder.glob(f"{name}_*.deb")
        root = folder / "root" / name
        if not root.exists():
            root.parent.mkdir(exist_ok=True)
            subprocess.run(["dpkg", "-x", str(deb), str(root)], check=True)
        version = deb.name.removeprefix(f"{name}_").rsplit("_", 1)[0].replace("%3a", ":")
        found.append(Package(name, version, hashlib.sha256(deb.read_bytes()).hexdigest(), root))
    return found


def pages(package: Package) -> Iterator[tuple[str, str]]:
    """(path below the package's documentation, text) of every page, in order of path."""
    top = package.root / "usr/share/doc"
    for path in sorted(top.rglob("*.html")):
        name = path.relative_to(top).as_posix()
        if path.is_symlink() or _LEFT_OUT.search(name):
            continue
        text = page_text(path.read_text("utf-8", "replace"))
        if len(text) >= 200:
            yield name, text
