"""Fixtures that every test may use."""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from daemon import Daemon, puppet


@pytest.fixture(autouse=True)
def temporary_folder_as_it_was() -> Iterator[None]:
    """A trainer makes its attempt's folder the process's temporary one, and tests run trainers in their own process."""
    before = tempfile.tempdir
    yield
    tempfile.tempdir = before


@pytest.fixture
def daemons(tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """Starts luthierds and ends them all after the test. Each call takes flags; `data` names the data directory."""
    started: list[Daemon] = []

    def start(*flags: str, data: str = "data", **options: Any) -> Daemon:
        daemon = Daemon(tmp_path / data, flags or puppet(), **options)
        started.append(daemon)
        return daemon.start()

    yield start
    for daemon in started:
        daemon.close()


@pytest.fixture(scope="session")
def samples() -> Path:
    """The folder of public samples; a test that needs it is skipped where it is not."""
    folder = Path(os.environ.get("LUTHIER_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("the public samples are not here (LUTHIER_TEST_DATA)")
    return folder
