"""A pass of TRL's SFTTrainer on a model that was made on the device."""

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]

from benchmarks.cuda import models
from benchmarks.cuda.cells import Cell, Setting, accumulation
from benchmarks.cuda.passes import DeviceWatch, Outcome
from benchmarks.cuda.shapes import RANK, SHAPES
from benchmarks.engine.clock import TrainerClock
from benchmarks.engine.trl_side import count


def has_flash() -> bool:
    """Whether flash-attention is installed, which keeps packed documents apart without a mask."""
    return importlib.util.find_spec("flash_attn") is not None


def run(cell: Cell, setting: Setting, folder: Path, rows: Path, device: torch.device) -> Outcome:
    """One epoch over the rows, in bfloat16."""
    attention = "flash_attention_2" if has_flash() and device.type == "cuda" else "sdpa"
    model = models.build(SHAPES[cell.shape], cell.length, cell.method, device, attention)
    return train(model, cell, setting, folder, rows, device)


def train(model: Any, cell: Cell, setting: Setting, folder: Path, rows: Path, device: torch.device) -> Outcome:
    """The same for a model that is there, which gets its adapter unless it has one."""
    warnings.simplefilter("ignore")
    watch = DeviceWatch(device)
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder / "trl"),
            num_train_epochs=1,
            per_device_train_batch_size=setting.batch,
            gradient_accumulation_steps=accumulation(cell, setting),
            gradient_checkpointing=setting.checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if setting.checkpointing else None,
            bf16=True,
            use_cpu=device.type == "cpu",
            learning_rate=2e-4,
            lr_scheduler_type="cosine",
            max_length=cell.length,
            packing=setting.packing,
            packing_strategy="bfd",
            train_sampling_strategy="sequential",
            assistant_only_loss=True,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=device.type == "cuda",
            seed=0,
        ),
        train_dataset=datasets.load_dataset(
            "json", data_files=str(rows), split="train", cache_dir=str(folder / "datasets")
        ),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=None if hasattr(model, "peft_config") else lora,
        callbacks=[clock := TrainerClock(watch)],
    )
    tokens, scored = count(trainer.train_dataset)
    result = trainer.train()
    return Outcome(
        setting=setting.name,
        seconds=watch.seconds,
        tokens=tokens,
        scored=scored,
        steps=clock.steps,
        loss=float(result.training_loss),
        peak_bytes=watch.peak_bytes,
    )
