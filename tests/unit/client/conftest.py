"""Servers for the tests of the client."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from unit.client.fake_server import FakeServer


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    """One server for the tests that leave it alive."""
    server = FakeServer(tmp_path_factory.mktemp("fake"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def endpoint(shared_server: FakeServer) -> str:
    return shared_server.endpoint


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[FakeServer]:
    """A server for one test, which may kill it."""
    root = tmp_path / "fake"
    root.mkdir()
    server = FakeServer(root)
    server.start()
    yield server
    server.stop()
