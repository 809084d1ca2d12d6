"""Secrets by name: a spec holds the name, the operator the value, and a trainer gets it through memory alone."""

import os
from dataclasses import dataclass
from pathlib import Path

from luthier.v1.job_pb2 import FineTuneTask
from luthier_server.errors import NotFound

_PREFIX = "LUTHIER_SECRET_"


@dataclass(frozen=True, slots=True)
class Secrets:
    """Looks a name up in the environment (`LUTHIER_SECRET_NAME`), then in a folder (`NAME`, one file each)."""

    directory: Path | None

    def value(self, name: str) -> str:
        """The secret. `name` was validated: lower-case letters, digits and `_`. Raises NotFound."""
        if value := os.environ.get(_PREFIX + name.upper()):
            return value
        if self.directory is not None and (path := self.directory / name).is_file():
            return path.read_text().strip()
        raise NotFound("secret", name, f"the operator sets {_PREFIX}{name.upper()} or a file in --secrets-dir")

    def for_task(self, task: FineTuneTask) -> dict[str, str]:
        """The environment that a task's trainer gets."""
        return {"HF_TOKEN": self.value(task.hub_token_secret)} if task.hub_token_secret else {}
