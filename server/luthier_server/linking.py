"""Files in two places at once: linked where the file system can do that, copied where it cannot."""

import os
import shutil
from pathlib import Path


def link(source: str | Path, target: str | Path) -> None:
    """Makes a file appear at another place too; it stays there when the first one goes. Raises OSError."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copy2(source, target)  # another file system, or one without links


def link_tree(source: Path, target: Path) -> None:
    """The same of a directory, whole or not at all, whatever ends half-way. Raises OSError."""
    aside = target.with_name(f".new-{target.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        shutil.copytree(source, aside, copy_function=link)
        aside.rename(target)
    except OSError:  # shutil's own error too
        shutil.rmtree(aside, ignore_errors=True)
        raise
