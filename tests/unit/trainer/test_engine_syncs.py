"""A step waits for its device once: where values are asked for is seen on a CPU too."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fidelity.jobs import Recorder, chats, task, tiny_base
from torch.utils._python_dispatch import TorchDispatchMode

from luthier_trainer import sft
from luthier_trainer.control import NoControl

_ASKS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "_unique2"}
"""Operators whose result, or its shape, the host needs before it goes on."""


class _Asked(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes each operator that makes the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in _ASKS:
            self.operators.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_nothing_between_the_first_micro_batch_and_the_end_of_the_update_asks_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    asked, steps = _Asked(), 0
    lists: list[str] = []
    accumulate, tolist = sft._accumulate, torch.Tensor.tolist
    inside = False

    def begin(*arguments: Any) -> Any:
        nonlocal inside
        asked.__enter__()  # type: ignore[no-untyped-call]
        inside = True
        return accumulate(*arguments)

    def end(tensor: torch.Tensor) -> Any:  # the step's one look at its numbers
        nonlocal inside, steps
        if inside and tensor.shape == (3,) and tensor.dtype == torch.float64:
            asked.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            inside = False
            steps += 1
        elif inside:
            lists.append(str(tensor.shape))
        return tolist(tensor)

    monkeypatch.setattr(sft, "_accumulate", begin)
    monkeypatch.setattr(torch.Tensor, "tolist", end)
    base, data = tiny_base(tmp_path), chats(tmp_path / "chats.jsonl")
    sft.train(task(tmp_path, base, data, max_steps=3, full=kind == "full"), Recorder(), NoControl())
    assert steps == 3
    assert asked.operators == []
    assert lists == []
