"""The bound that lets most jobs through at once: never below what memory is foretold to be needed."""

from pathlib import Path

import pytest
from fidelity import jobs

from luthier.trainer.v1.report_pb2 import ModelReport
from luthier.v1 import job_pb2
from luthier.v1.estimate_pb2 import JobEstimate, Room
from luthier_server.fitting import does_not_fit, surely_needs_less
from luthier_trainer.config import read_settings
from luthier_trainer.data.tokens.task import tokens_for
from luthier_trainer.forecast import Extent, Outlook
from luthier_trainer.forecast import Room as Limits
from luthier_trainer.inspect import BUILTIN, locate
from luthier_trainer.plan import choose_compute

TINY = BUILTIN / "tiny"
LENGTH = 1024


@pytest.mark.parametrize(
    "adaptation",
    [{}, {"lora": job_pb2.Lora(rank=256)}, {"full": True}],
    ids=["lora", "a large rank", "full"],
)
def test_the_bound_lies_above_what_is_foretold(tmp_path: Path, adaptation: dict[str, object]) -> None:
    data = jobs.chats(tmp_path / "chats.jsonl")
    task = jobs.task(tmp_path, TINY, data, max_steps=1, max_length=LENGTH, **adaptation)  # type: ignore[arg-type]
    settings, tokens = read_settings(task), tokens_for(task)
    outlook = Outlook(task.base_model, settings, choose_compute(task, settings.dtype, tokens.config, None))
    foretold = outlook.forecast(Extent(LENGTH, LENGTH, LENGTH), Limits(0, 0, LENGTH, 1))
    assert foretold.host_bytes < surely_needs_less(locate("builtin/tiny"), task.spec.fine_tune) < 16 * 2**30


def test_what_little_is_known_of_settles_nothing() -> None:
    assert surely_needs_less(ModelReport(parameters=1000, is_hub=True), job_pb2.FineTuneTask()) == float("inf")


def test_a_refusal_says_how_much_where_and_what_helps() -> None:
    estimate = JobEstimate(
        device="cuda:0",
        device_memory=Room(needed_bytes=30 * 2**30, total_bytes=24 * 2**30),
        host_memory=Room(needed_bytes=2**30, total_bytes=2**35),
        remedies=["Lower max_length to 512.", "Set dtype to bfloat16."],
    )
    refusal = does_not_fit(estimate)
    assert refusal.message == (
        "the job needs about 30.0 GiB of memory on cuda:0, and may plan with 22.1 GiB, 92% of the 24.0 GiB there are"
    )
    assert refusal.metadata["hint"] == "Lower max_length to 512. Or: Set dtype to bfloat16."
    estimate.device_memory.needed_bytes = 1
    estimate.host_memory.needed_bytes = 2**36
    assert "memory of the host" in does_not_fit(estimate).message


def test_a_refusal_for_what_is_kept_free_does_not_contradict_itself() -> None:
    nearly = Room(needed_bytes=15 * 2**30, total_bytes=16 * 2**30)
    refusal = does_not_fit(JobEstimate(device="cpu", device_memory=nearly, host_memory=nearly))
    assert "about 15.0 GiB of memory, and may plan with 14.7 GiB, 92% of the 16.0 GiB" in refusal.message
    assert int(refusal.metadata["needed_bytes"]) > int(refusal.metadata["available_bytes"])
    limited = JobEstimate(device="cuda:0", device_memory=Room(needed_bytes=11, total_bytes=10))
    assert does_not_fit(limited, device_share=1).message.endswith("and there are 10 bytes")
