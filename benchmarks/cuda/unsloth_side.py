"""A pass of Unsloth under TRL's SFTTrainer, where it is installed. It loads models from folders alone, so the weights
are written once: into memory (/dev/shm) where that has room, else beside the rows."""

import shutil
from pathlib import Path

import torch

from benchmarks.cuda import models
from benchmarks.cuda.cells import Cell, Setting
from benchmarks.cuda.passes import Outcome
from benchmarks.cuda.shapes import RANK, SHAPES, Shape

_MEMORY = Path("/dev/shm")
_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_SETTING = Setting(2, False)


def run(cell: Cell, folder: Path, rows: Path, device: torch.device) -> Outcome:
    """One epoch over the rows, with Unsloth's own checkpointing of activations. Raises ImportError without Unsloth,
    OSError when there is no room for the weights."""
    from unsloth import FastLanguageModel  # type: ignore[import-not-found]  # before trl, which it patches

    from benchmarks.cuda.trl_side import train

    weights = _written(SHAPES[cell.shape], cell.length, folder, device)
    model, _ = FastLanguageModel.from_pretrained(
        str(weights), max_seq_length=cell.length, dtype=torch.bfloat16, load_in_4bit=cell.method == "qlora"
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=2 * RANK,
        lora_dropout=0,
        target_modules=_LINEARS,
        use_gradient_checkpointing="unsloth",
    )
    return train(model, cell, _SETTING, folder, rows, device)


def _written(shape: Shape, length: int, folder: Path, device: torch.device) -> Path:
    """The folder of the model's weights, made at the first call."""
    needed = 2.2 * shape.parameters
    parent = _MEMORY if _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > needed else folder
    if shutil.disk_usage(parent).free < needed:
        raise OSError(f"no room for {needed / 1e9:.0f} GB of weights")
    found = parent / f"luthier-bench-{shape.name}-{folder.name}"
    if not (found / "config.json").exists():
        model = models.build(shape, length, "lora", device)
        model.save_pretrained(found)
        del model
        torch.cuda.empty_cache()
        for each in folder.glob("tokenizer*"):
            shutil.copy(each, found)
    return found


def forget(folder: Path) -> None:
    """Removes what was written."""
    for parent in (_MEMORY, folder):
        for each in parent.glob(f"luthier-bench-*-{folder.name}"):
            shutil.rmtree(each, ignore_errors=True)
