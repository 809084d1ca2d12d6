"""How the server waits."""

from pathlib import Path

import luthier_server


def test_nothing_waits_by_wait_for_which_in_python_3_11_loses_a_cancel_that_comes_with_the_result() -> None:
    # A scheduler that lost the cancel of a stop ran on, and the server never ended: asyncio.timeout loses none.
    folder = Path(luthier_server.__file__).parent
    assert [each.name for each in folder.rglob("*.py") if "asyncio.wait_for(" in each.read_text()] == []
