"""Places for checks of jobs, and what an answer without an answer is to its caller."""

import asyncio

import pytest

from luthier.trainer.v1.task_pb2 import DataAnswer
from luthier.v1.job_pb2 import JobError
from luthier_server.checks import _Places, raise_error
from luthier_server.data_work import WorkFailed
from luthier_server.errors import InvalidArgument


async def test_a_check_that_nobody_waits_for_gives_its_place_up_when_another_of_its_kind_ends() -> None:
    places = _Places(1)
    begun: list[str] = []

    async def check(name: str, end: asyncio.Event) -> None:
        async with places.place(name):
            begun.append(name)
            await end.wait()

    async def settled() -> None:
        for _ in range(10):
            await asyncio.sleep(0)

    ends = {name: asyncio.Event() for name in "abc"}
    tasks = [asyncio.create_task(check(name, end)) for name, end in ends.items()]
    await settled()
    await places.step_aside("a")
    await settled()
    await places.step_aside("b")
    await settled()
    assert begun == ["a", "b"]
    ends["a"].set()
    await settled()
    assert begun == ["a", "b", "c"]
    ends["b"].set()
    ends["c"].set()
    await asyncio.gather(*tasks)
    async with places.place("d"):
        await places.step_aside("d")
        async with places.place("e"):  # both kinds are free again
            pass


@pytest.mark.parametrize(
    ("reason", "path", "error"),
    [
        ("INTERNAL", "", WorkFailed),
        ("INTERNAL", "spec.fine_tune.", WorkFailed),
        ("OUT_OF_MEMORY", "", WorkFailed),
        ("OUT_OF_MEMORY", "spec.fine_tune.", InvalidArgument),
        ("DATASET_INVALID", "", InvalidArgument),
    ],
)
def test_what_broke_in_the_child_is_no_fault_of_the_dataset(reason: str, path: str, error: type[Exception]) -> None:
    with pytest.raises(error, match="it broke"):
        raise_error(DataAnswer(error=JobError(reason=reason, message="it broke")), path)
