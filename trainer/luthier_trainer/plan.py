"""The plan: everything a spec leaves open, decided before the first step."""

from dataclasses import dataclass
from typing import Any

import torch

from luthier.trainer.v1.task_pb2 import TrainerTask
from luthier.v1 import job_pb2
from luthier_trainer.forward import DOCUMENTS_IN_BLOCKS, Forward, set_attention
from luthier_trainer.probe import bfloat16_gain, blocks_gain
from luthier_trainer.products import through_onednn
from luthier_trainer.state import ResumedPlan

_CPU_TOKENS = 3072
_CUDA_TOKENS = 16384
_WORTHWHILE_GAIN = 1.5
_SMALLEST_BLOCKS_GAIN = 0.9
"""Attention in blocks is the rule: only a machine on which it is clearly slower does without, so that a measurement
beside other work does not decide."""

_IN_BLOCKS = "documents-blocks"


@dataclass(frozen=True)
class Compute:
    """Where and in which number format a job computes; decided before the model is loaded."""

    device: torch.device
    dtype: torch.dtype
    threads: int
    notes: tuple[str, ...]


def choose_compute(
    task: TrainerTask, wanted: job_pb2.Dtype.ValueType, config: Any, resumed: ResumedPlan | None
) -> Compute:
    """Device, dtype and threads. `config` is the base model's configuration; a resumed plan's dtype is kept.

    On CUDA bfloat16 where the device has it. On CPU bfloat16 when a product of this model's shape is at least 1.5 times
    faster in it, which takes AMX or avx512_bf16: without, it is several times slower.
    """
    if task.threads > 0:
        torch.set_num_threads(task.threads)
    device = torch.device("cuda", task.cuda_devices[0]) if task.cuda_devices else torch.device("cpu")
    dtype, notes = _dtype(device, wanted, config, resumed)
    if device.type == "cpu" and dtype == torch.float32 and through_onednn():
        notes.append("products go through oneDNN, which is faster than MKL on this processor")
    if resumed is not None:
        now = (str(device), torch.get_num_threads())
        if now != (resumed.device, resumed.threads):
            before = f"{resumed.device} with {resumed.threads} threads"
            notes.append(f"the checkpoint was made on {before}: results agree to rounding, not bit by bit")
    return Compute(device, dtype, torch.get_num_threads(), tuple(notes))


def _dtype(
    device: torch.device, wanted: job_pb2.Dtype.ValueType, config: Any, resumed: ResumedPlan | None
) -> tuple[torch.dtype, list[str]]:
    if wanted == job_pb2.DTYPE_FLOAT32:
        return torch.float32, []
    if wanted == job_pb2.DTYPE_BFLOAT16:
        return torch.bfloat16, []
    if resumed is not None:
        return (torch.bfloat16 if resumed.dtype == "bfloat16" else torch.float32), []
    if device.type == "cuda":
        return (torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32), []
    text = config.get_text_config()
    hidden = text.hidden_size
    gain = bfloat16_gain(hidden, getattr(text, "intermediate_size", None) or 4 * hidden)
    note = f"bfloat16 products of this model's shape run at {gain:.1f} times the speed of float32 here"
    return (torch.bfloat16 if gain >= _WORTHWHILE_GAIN else torch.float32), [note]


def most_tokens(compute: Compute) -> int:
    """Tokens that go through the model together at most, however much memory there is: more are no faster."""
    return _CUDA_TOKENS if compute.device.type == "cuda" else _CPU_TOKENS


def choose_blocks(forward: Forward, compute: Compute, resumed: ResumedPlan | None) -> list[str]:
    """On a CPU, has attention per document computed in blocks of products unless this machine is slower at it; a
    resumed plan's way is kept. Returns notes."""
    if not forward.documents or compute.device.type != "cpu":
        return []
    if resumed is not None:
        if resumed.attention == _IN_BLOCKS:
            set_attention(forward.model, DOCUMENTS_IN_BLOCKS)
        return []
    gain = blocks_gain(forward.model.config.get_text_config(), compute.dtype)
    if gain is None:
        return []
    note = f"attention in blocks of products runs at {gain:.1f} times the speed of torch's kernel here"
    if gain >= _SMALLEST_BLOCKS_GAIN:
        set_attention(forward.model, DOCUMENTS_IN_BLOCKS)
    return [note]


def attention_name(forward: Forward, compute: Compute) -> str:
    """The attention path as reports and checkpoints call it."""
    if not forward.documents:
        return f"padded-{forward.model.config._attn_implementation}"
    varlen = compute.device.type == "cuda" and compute.dtype != torch.float32
    if varlen:
        return "documents-varlen"
    return _IN_BLOCKS if forward.model.config._attn_implementation == DOCUMENTS_IN_BLOCKS else "documents-sdpa"
