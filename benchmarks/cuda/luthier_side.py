"""A pass of Luthier's engine on a model that was made on the device."""

import shutil
from pathlib import Path

import torch

from benchmarks.cuda import models
from benchmarks.cuda.cells import Cell
from benchmarks.cuda.passes import DeviceWatch, Outcome
from benchmarks.cuda.shapes import SHAPES
from benchmarks.engine.luthier_side import PlanClock, task
from benchmarks.engine.points import replaced
from benchmarks.engine.workload import Chat
from luthier.trainer.v1.report_pb2 import Finished
from luthier.v1 import job_pb2
from luthier_trainer import sft
from luthier_trainer.control import NoControl

_QUANTIZATIONS = {"lora": job_pb2.LORA_QUANTIZATION_NONE, "qlora": job_pb2.LORA_QUANTIZATION_NF4}


def run(cell: Cell, folder: Path, rows: Path, chats: list[Chat], device: torch.device) -> Outcome:
    """One epoch over the rows by `sft.train`; only where the weights come from is different."""
    out = folder / "luthier"
    shutil.rmtree(out, ignore_errors=True)
    watch = DeviceWatch(device)
    clock = PlanClock(watch)
    asked = task(
        folder,
        rows,
        len(chats),
        out,
        dtype=job_pb2.DTYPE_BFLOAT16,
        batch_size=cell.rows_per_step,
        max_length=cell.length,
        quantization=_QUANTIZATIONS[cell.method],
    )
    if device.type == "cuda":
        asked.cuda_devices.append(device.index or 0)

    def load_base(*_args: object, **_named: object) -> object:
        return models.build(SHAPES[cell.shape], cell.length, cell.method, device)

    with replaced("luthier_trainer.job", "load_base", lambda _: load_base):
        end = sft.train(asked, clock, NoControl())
    assert isinstance(end, Finished), end
    plan = clock.plan
    return Outcome(
        setting=f"{plan.dtype}, {plan.attention}, micro-batches of {plan.micro_batch_tokens:,} tokens",
        seconds=watch.seconds,
        tokens=clock.tokens,
        scored=sum(each.scored for each in chats),
        steps=len(clock.losses),
        loss=sum(clock.losses) / len(clock.losses),
        peak_bytes=watch.peak_bytes,
    )
